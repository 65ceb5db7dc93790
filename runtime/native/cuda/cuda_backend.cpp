#include "cuda_backend.h"

#include <array>
#include <bit>
#include <cstdio>
#include <new>
#include <vector>

#include "bundle.h"
#include "launch.h"
#include "status.h"

namespace depthwire {

namespace {

const char* type_key(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "fp16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bf16";
    default: return "fp32";  // operands.cpp lets no other through
  }
}

// The pointers of the kernel: the node's inputs and outputs in their order.
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
  return values;
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
  Launch launch{spec.name(), kernel_key(spec, attributes, operands), parameters(spec, attributes, operands, outputs), {}};
  launch.rows = operands.rows;
  return launch_kernel(api, context, launch);
} catch (const std::bad_alloc&) {
  return api.CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend{"CUDAExecutionProvider", compute, route_on_cuda};
  return backend;
}

OrtStatus* add_kernels(const OrtApi& api, const std::string& folder, bool& routing) {
  std::string reason;
  if (add_bundle(folder, reason)) {
    routing = bundle_routes(folder);
    return nullptr;
  }
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
