#include "cuda_backend.h"

#include <array>
#include <bit>
#include <cstdio>
#include <new>
#include <vector>

#include "bundle.h"
#include "status.h"

namespace depthwire {

namespace {

// Kernels are compiled for pointers that are divisible by this, as those of ONNX Runtime's allocators are.
constexpr std::uintptr_t kAlignment = 16;
constexpr std::size_t kHidden = 2;  // triton's own trailing pointers, which these kernels do not use
constexpr std::int64_t kMaxBlocks = 0x7fffffff;

const char* type_key(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "fp16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bf16";
    default: return "fp32";  // operands.cpp lets no other through
  }
}

OrtStatus* fail(const OrtApi& api, const OpSpec& spec, const std::string& text) {
  return api.CreateStatus(ORT_FAIL, ("depthwire " + spec.name() + ": " + text).c_str());
}

// The parameters of the kernel: the node's inputs and outputs in their order, and triton's.
std::vector<const void*> parameters(const OpSpec& spec, const Attributes& attributes, const Operands& operands,
                                    const std::array<void*, 2>& outputs) {
  std::vector<const void*> values{operands.query.data};
  if (spec.norm) values.push_back(operands.norm_weight.data);
  if (spec.family == Family::merge) {
    // The kernel finds row `index` itself; the operands point to it already.
    const std::int64_t before = attributes.index * operands.rows;
    const auto bytes = static_cast<std::int64_t>(element_bytes(operands.element)) * before * operands.width;
    values.push_back(static_cast<const char*>(operands.mixed.data) - bytes);
    values.push_back(static_cast<const float*>(operands.mixed_logit.data) - before);
  }
  values.insert(values.end(), operands.sources, operands.sources + spec.sources);
  if (spec.add) values.push_back(operands.delta.data);
  values.insert(values.end(), outputs.begin(), outputs.begin() + spec.outputs());
  values.insert(values.end(), kHidden, nullptr);
  return values;
}

struct Place {
  const Driver* driver = nullptr;
  int major = 0, minor = 0;
};

OrtStatus* find_device(const OrtApi& api, const OpSpec& spec, Place& place) {
  std::string reason;
  place.driver = driver(reason);
  if (place.driver == nullptr) return fail(api, spec, reason);
  CUdevice device = 0;
  CUresult result = place.driver->current_device(&device);
  const auto read = [&](CUdevice_attribute attribute, int& value) {
    if (result == CUDA_SUCCESS) result = place.driver->device_attribute(&value, attribute, device);
  };
  read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, place.major);
  read(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, place.minor);
  return result == CUDA_SUCCESS ? nullptr : fail(api, spec, "no CUDA device: " + place.driver->describe(result));
}

OrtStatus* launch(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context,
                  const Operands& operands, const std::array<void*, 2>& outputs) {
  Place place;
  DEPTHWIRE_TRY(find_device(api, spec, place));
  std::string reason;
  Cubin* cubin = select_cubin(kernel_key(spec, attributes, operands), place.major, place.minor, reason);
  if (cubin == nullptr) return fail(api, spec, reason);
  std::vector<const void*> values = parameters(spec, attributes, operands, outputs);
  if (values.size() != cubin->parameters) {
    return fail(api, spec, "'" + cubin->path + "' takes " + std::to_string(cubin->parameters) + " parameters, wanted " +
                               std::to_string(values.size()));
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (reinterpret_cast<std::uintptr_t>(values[i]) % kAlignment != 0) {
      return fail(api, spec, "operand " + std::to_string(i) + " is not aligned to 16 bytes");
    }
  }
  const std::int64_t blocks = operands.rows * cubin->programs;
  if (blocks > kMaxBlocks) return fail(api, spec, "has " + std::to_string(operands.rows) + " rows: too many");
  const CUkernel kernel = load_cubin(*cubin, *place.driver, reason);
  if (kernel == nullptr) return fail(api, spec, reason);
  void* stream = nullptr;
  DEPTHWIRE_TRY(api.KernelContext_GetGPUComputeStream(context, &stream));
  std::vector<void*> addresses;
  for (const void*& value : values) addresses.push_back(&value);
  const CUresult result =
      place.driver->launch(reinterpret_cast<CUfunction>(kernel), static_cast<unsigned>(blocks), 1, 1, cubin->threads, 1, 1,
                           cubin->shared, static_cast<CUstream>(stream), addresses.data(), nullptr);
  return result == CUDA_SUCCESS ? nullptr : fail(api, spec, "the launch failed: " + place.driver->describe(result));
}

OrtStatus* compute(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context) try {
  Operands operands;
  DEPTHWIRE_TRY(fetch_operands(api, spec, attributes, context, operands));
  const Tensor& row = operands.row;
  const bool inter = spec.family == Family::inter;
  std::array<void*, 2> outputs{};
  DEPTHWIRE_TRY(make_output(api, context, 0, inter ? operands.query_count : -1, row.shape, row.rank, &outputs[0]));
  if (inter) DEPTHWIRE_TRY(make_output(api, context, 1, operands.query_count, row.shape, row.rank - 1, &outputs[1]));
  if (spec.add) DEPTHWIRE_TRY(make_output(api, context, 1, -1, row.shape, row.rank, &outputs[1]));
  if (operands.rows == 0) return nullptr;
  return launch(api, spec, attributes, context, operands, outputs);
} catch (const std::bad_alloc&) {
  return api.CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend{"CUDAExecutionProvider", compute};
  return backend;
}

OrtStatus* add_kernels(const OrtApi& api, const std::string& folder) {
  std::string reason;
  if (add_bundle(folder, reason)) return nullptr;
  const std::string text = std::string("session configuration entry '") + kKernelsEntry + "': " + reason;
  return api.CreateStatus(ORT_INVALID_ARGUMENT, text.c_str());
}

std::string kernel_key(const OpSpec& spec, const Attributes& attributes, const Operands& operands) {
  const bool inter = spec.family == Family::inter;
  const auto bits = [](float value) { return std::bit_cast<std::uint32_t>(value); };
  char tail[160];
  std::snprintf(tail, sizeof(tail), "-d%lld-%s-%s-%08x-%08x-%08x-%08x-i%lld-s%lld",
                static_cast<long long>(operands.width), type_key(operands.row.type), type_key(operands.query.type),
                bits(attributes.eps), bits(attributes.scale), inter ? 0U : bits(attributes.last_bias),
                spec.norm ? bits(attributes.norm_eps) : 0U, static_cast<long long>(attributes.index),
                inter ? static_cast<long long>(operands.query_count) : 1LL);
  return spec.name() + tail;
}

}  // namespace depthwire

#define DEPTHWIRE_EXPORT extern "C" __attribute__((visibility("default")))

// Which cubin a device of a capability gets: its path, or why there is none. For tools and tests; needs no driver.
DEPTHWIRE_EXPORT int DepthwireSelectCubin(const char* folder, const char* key, int major, int minor, char* text,
                                          std::size_t size) {
  std::string reason;
  const bool known = depthwire::add_bundle(folder, reason);
  const depthwire::Cubin* cubin = known ? depthwire::select_cubin(key, major, minor, reason) : nullptr;
  std::snprintf(text, size, "%s", cubin == nullptr ? reason.c_str() : cubin->path.c_str());
  return cubin == nullptr ? 1 : 0;
}
