// A routing operator as ONNX Runtime's C interface takes it.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "op.h"
#include "routing_op.h"
#include "shapes.h"

namespace depthwire {

namespace {

struct Op : OrtCustomOp {
  RoutingSpec spec;
  std::string name;
  const Backend* backend;
};

struct Kernel {
  const OrtApi* api;
  const Op* op;
  RoutingAttributes attributes;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

OrtStatus* create_kernel(const OrtCustomOp* base, const OrtApi* api, const OrtKernelInfo* info, void** kernel) try {
  const Op& op = self(base);
  RoutingAttributes found;
  const bool averages = op.spec.kind == Routing::surprise;
  if (averages || op.spec.kind == Routing::select) {
    if (OrtStatus* status = api->KernelInfoGetAttribute_int64(info, "window", &found.window)) {
      api->ReleaseStatus(status);
      found.window = averages ? 100 : 0;
    }
  }
  *kernel = new Kernel{api, &op, found};
  return nullptr;
} catch (const std::bad_alloc&) {
  return api->CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

// What is scattered into mostly dies there; the result takes its memory.
std::size_t base_inplace(int** inputs, int** outputs) {
  *inputs = static_cast<int*>(std::calloc(1, sizeof(int)));
  *outputs = static_cast<int*>(std::calloc(1, sizeof(int)));
  return *inputs == nullptr || *outputs == nullptr ? 0 : 1;
}

// Types of outputs that do not follow an input's.
ONNXTensorElementDataType output_type(const RoutingSpec& spec, std::size_t index) {
  if (spec.kind != Routing::select && spec.kind != Routing::select_budget)
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

}  // namespace

OrtCustomOp* routing_custom_op(const RoutingSpec& spec, const Backend& backend) {
  static std::mutex guard;
  static auto& known = *new std::map<std::pair<std::string, const Backend*>, std::unique_ptr<Op>>();  // never destroyed
  const std::lock_guard lock(guard);
  std::unique_ptr<Op>& entry = known[{spec.name(), &backend}];
  if (entry != nullptr) return entry.get();
  entry = std::make_unique<Op>();
  Op& op = *entry;
  op.spec = spec;
  op.name = spec.name();
  op.backend = &backend;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* base) { return self(base).name.c_str(); };
  op.GetExecutionProviderType = [](const OrtCustomOp* base) { return self(base).backend->provider; };
  op.GetInputTypeCount = [](const OrtCustomOp* base) { return static_cast<std::size_t>(self(base).spec.inputs()); };
  op.GetInputType = [](const OrtCustomOp*, std::size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
  op.GetOutputTypeCount = [](const OrtCustomOp* base) { return static_cast<std::size_t>(self(base).spec.outputs()); };
  op.GetOutputType = [](const OrtCustomOp* base, std::size_t index) { return output_type(self(base).spec, index); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = [](void* state, OrtKernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(state);
    return kernel.op->backend->route(*kernel.api, kernel.op->spec, kernel.attributes, context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp* base, OrtShapeInferContext* context) {
    return infer_routing_shapes(self(base).spec, context);
  };
  if (spec.kind == Routing::scatter) {
    op.GetMayInplace = base_inplace;
    op.ReleaseMayInplace = [](int* inputs, int* outputs) { std::free(inputs), std::free(outputs); };
  }
  return &op;
}

}  // namespace depthwire
