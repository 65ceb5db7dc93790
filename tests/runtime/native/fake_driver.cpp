// A CUDA driver without a GPU: "device" memory is the host's, and a launch writes down what it was given.
//
// It stands where libcuda.so.1 would, so that the code that launches cubins runs as it is. PROBE_CC is the device's
// compute capability, PROBE_LOG the file that a launch appends one line to, PROBE_PARAMETERS how many parameters it
// reads, PROBE_OUTPUTS how many of these before the two hidden ones are outputs; output k gets 42 + k as its first value.
// PROBE_NUMBERS, if it is set, says how many numbers lie between the outputs and the hidden ones; pointers are then
// written down by the bits of what they point to.
#include <cuda.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define FAKE extern "C" __attribute__((visibility("default")))

static char name[256];

FAKE CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
FAKE CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
FAKE CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const int capability = std::atoi(std::getenv("PROBE_CC"));
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? capability / 10 : capability % 10;
  return CUDA_SUCCESS;
}
FAKE CUresult cuGetErrorString(CUresult, const char** text) { return *text = "refused by the fake driver", CUDA_SUCCESS; }
FAKE CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**, unsigned, CUlibraryOption*,
                                void**, unsigned) {
  if (std::memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;
  return *library = reinterpret_cast<CUlibrary>(name), CUDA_SUCCESS;
}
FAKE CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* symbol) {
  std::snprintf(name, sizeof(name), "%s", symbol);
  return *kernel = reinterpret_cast<CUkernel>(name), CUDA_SUCCESS;
}
FAKE CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                             unsigned shared, CUstream, void** parameters, void**) {
  std::FILE* log = std::fopen(std::getenv("PROBE_LOG"), "a");
  const int count = std::atoi(std::getenv("PROBE_PARAMETERS")), outputs = std::atoi(std::getenv("PROBE_OUTPUTS"));
  const char* set = std::getenv("PROBE_NUMBERS");
  const int numbers = set == nullptr ? 0 : std::atoi(set);
  std::fprintf(log, "%s %u %u %u %u %u", reinterpret_cast<const char*>(kernel), x, y, z, threads, shared);
  for (int i = 0; i < count; ++i) {
    if (i >= count - 2 - numbers && i < count - 2) {
      std::fprintf(log, " #%d", *static_cast<const int*>(parameters[i]));
      continue;
    }
    float* pointer = *static_cast<float**>(parameters[i]);
    const int output = i - (count - 2 - numbers - outputs);
    if (pointer == nullptr) {
      std::fprintf(log, " null");
    } else if (output >= 0) {
      *pointer = 42.0F + static_cast<float>(output);
      std::fprintf(log, " out%d", output);
    } else if (set != nullptr) {
      unsigned bits = 0;
      std::memcpy(&bits, pointer, sizeof(bits));
      std::fprintf(log, " %08x", bits);
    } else {
      std::fprintf(log, " %g", *pointer);
    }
  }
  std::fprintf(log, "\n");
  std::fclose(log);
  return CUDA_SUCCESS;
}
