#include "launch.h"

#include "bundle.h"
#include "status.h"

namespace depthwire {

namespace {

// Kernels are compiled for pointers that are divisible by this, as those of ONNX Runtime's allocators are.
constexpr std::uintptr_t kAlignment = 16;
constexpr std::size_t kHidden = 2;  // triton's own trailing pointers, which these kernels do not use
constexpr std::int64_t kMaxBlocks = 0x7fffffff;

OrtStatus* fail(const OrtApi& api, const Launch& launch, const std::string& text) {
  return api.CreateStatus(ORT_FAIL, ("depthwire " + launch.op + ": " + text).c_str());
}

struct Place {
  const Driver* driver = nullptr;
  int major = 0, minor = 0;
};

OrtStatus* find_device(const OrtApi& api, const Launch& launch, Place& place) {
  std::string reason;
  place.driver = driver(reason);
  if (place.driver == nullptr) return fail(api, launch, reason);
  CUdevice device = 0;
  CUresult result = place.driver->current_device(&device);
  const auto read = [&](CUdevice_attribute attribute, int& value) {
    if (result == CUDA_SUCCESS) result = place.driver->device_attribute(&value, attribute, device);
  };
  read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, place.major);
  read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, place.minor);
  return result == CUDA_SUCCESS ? nullptr : fail(api, launch, "no CUDA device: " + place.driver->describe(result));
}

}  // namespace

OrtStatus* launch_kernel(const OrtApi& api, OrtKernelContext* context, const Launch& launch) {
  Place place;
  DEPTHWIRE_TRY(find_device(api, launch, place));
  std::string reason;
  Cubin* cubin = select_cubin(launch.key, place.major, place.minor, reason);
  if (cubin == nullptr) return fail(api, launch, reason);
  const std::size_t count = launch.pointers.size() + launch.numbers.size() + kHidden;
  if (count != cubin->parameters) {
    return fail(api, launch, "'" + cubin->path + "' takes " + std::to_string(cubin->parameters) +
                                 " parameters, wanted " + std::to_string(count));
  }
  for (std::size_t i = 0; i < launch.pointers.size(); ++i) {
    if (reinterpret_cast<std::uintptr_t>(launch.pointers[i]) % kAlignment != 0) {
      return fail(api, launch, "operand " + std::to_string(i) + " is not aligned to 16 bytes");
    }
  }
  const std::int64_t programs = cubin->programs;
  const std::int64_t each = launch.size == 0 ? programs : (launch.size - 1) / programs + 1;
  if (launch.rows > kMaxBlocks / each) {
    return fail(api, launch, "has " + std::to_string(launch.rows) + " rows: too many");
  }
  const CUkernel kernel = load_cubin(*cubin, *place.driver, reason);
  if (kernel == nullptr) return fail(api, launch, reason);
  void* stream = nullptr;
  DEPTHWIRE_TRY(api.KernelContext_GetGPUComputeStream(context, &stream));
  const void* hidden = nullptr;
  std::vector<const void*> addresses;
  for (const void* const& pointer : launch.pointers) addresses.push_back(&pointer);
  for (const std::int32_t& number : launch.numbers) addresses.push_back(&number);
  addresses.insert(addresses.end(), kHidden, &hidden);
  const CUresult result = place.driver->launch(
      reinterpret_cast<CUfunction>(kernel), static_cast<unsigned>(launch.rows * each), 1, 1, cubin->threads, 1, 1,
      cubin->shared, static_cast<CUstream>(stream), const_cast<void**>(addresses.data()), nullptr);
  return result == CUDA_SUCCESS ? nullptr : fail(api, launch, "the launch failed: " + place.driver->describe(result));
}

}  // namespace depthwire
