#include <initializer_list>

#include "routing_op.h"

namespace depthwire {

namespace {

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kDouble = ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
constexpr ONNXTensorElementDataType kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr ONNXTensorElementDataType kBfloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr ONNXTensorElementDataType kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr ONNXTensorElementDataType kBool = ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
constexpr std::int64_t kLongestWindow = std::int64_t{1} << 31;

struct Checker {
  const OrtApi& api;
  const RoutingSpec& spec;
  RoutingOperands& operands;

  const Tensor& input(int index) const { return operands.inputs[index]; }

  OrtStatus* wrong(int index, const std::string& wanted) const {
    return refuse_input(api, spec, operands, index, wanted);
  }

  // Type and shape, those of another tensor or written out.
  OrtStatus* like(int index, const Tensor& model, const std::string& why = "") const {
    if (input(index).type == model.type && same_shape(input(index), model)) return nullptr;
    return wrong(index, describe(model) + why);
  }
  OrtStatus* exact(int index, ONNXTensorElementDataType type, std::initializer_list<std::int64_t> shape) const {
    return like(index, {nullptr, type, shape.begin(), shape.size()});
  }

  OrtStatus* scores() const {
    const Tensor& score = input(0);
    if ((score.type != kFloat && score.type != kDouble) || score.rank != 2) return wrong(0, "float or double [B, T]");
    operands.batch = score.shape[0], operands.tokens = score.shape[1];
    return exact(1, kBool, {operands.batch, operands.tokens});
  }

  OrtStatus* slots(int index) const {
    const Tensor& slots = input(index);
    const bool typed = slots.type == kInt64 && slots.rank == 1;
    if (!typed || slots.shape[0] < 1 || slots.shape[0] > operands.tokens) {
      return wrong(index, "int64 [K] with K from 1 to " + std::to_string(operands.tokens) + ", the number of tokens");
    }
    operands.slots = slots.shape[0];
    return nullptr;
  }

  OrtStatus* select(std::int64_t window) const {
    DEPTHWIRE_TRY(scores());
    DEPTHWIRE_TRY(slots(2));
    if (window == 0) return nullptr;
    const std::string text = "attribute 'window' is " + std::to_string(window);
    if (window < 0) return refuse(api, spec, text + ", wanted a number of tokens, or 0 for no windows");
    if (operands.tokens % window != 0) {
      return refuse(api, spec, text + ", which does not divide input 'score', " + describe(input(0)));
    }
    const std::int64_t windows = operands.tokens / window;
    if (operands.slots % windows == 0) return nullptr;
    return wrong(2, "a number of slots that " + std::to_string(windows) + " windows share evenly");
  }

  OrtStatus* select_budget() const {
    DEPTHWIRE_TRY(scores());
    DEPTHWIRE_TRY(slots(5));
    const Tensor& threshold = input(2);
    const bool one = threshold.rank == 0 || (threshold.rank == 1 && threshold.shape[0] == 1);
    if (threshold.type != input(0).type || !one) return wrong(2, std::string(type_name(input(0).type)) + " [] or [1]");
    DEPTHWIRE_TRY(exact(3, kInt64, {3}));
    return exact(4, kInt64, {operands.batch, 2});
  }

  // What is gathered from, or scattered into, and the slots.
  OrtStatus* rows() const {
    const Tensor& x = input(0);
    const ElementType type = element_type(x.type);
    if (type.name == nullptr) return wrong(0, "numbers or bool");
    if (x.rank < 2 || x.rank > kMaxRank) return wrong(0, "[B, T, ...]");
    operands.batch = x.shape[0], operands.tokens = x.shape[1], operands.row = type.bytes;
    for (std::size_t axis = 2; axis < x.rank; ++axis) operands.row *= x.shape[axis];
    const Tensor& index = input(1);
    if (index.type != kInt64 || index.rank != 2 || index.shape[0] != operands.batch) {
      return wrong(1, "int64 [" + std::to_string(operands.batch) + ", K]");
    }
    operands.slots = index.shape[1];
    return nullptr;
  }

  OrtStatus* scatter() const {
    DEPTHWIRE_TRY(rows());
    if (operands.slots > operands.tokens) {
      return wrong(1, "at most " + std::to_string(operands.tokens) + " slots, the number of tokens");
    }
    DEPTHWIRE_TRY(exact(2, kBool, {operands.batch, operands.slots}));
    const Tensor& base = input(0);
    std::int64_t shape[kMaxRank];
    std::memcpy(shape, base.shape, base.rank * sizeof(*shape));
    shape[1] = operands.slots;
    return like(3, {nullptr, base.type, shape, base.rank}, ", as 'base' and 'index' are");
  }

  static bool floating(const Tensor& tensor) {
    return tensor.type == kFloat || tensor.type == kDouble || tensor.type == kHalf || tensor.type == kBfloat;
  }

  OrtStatus* surprise(std::int64_t window) const {
    const Tensor& delta = input(0);
    if (!floating(delta) || delta.rank != 3 || delta.shape[2] < 1) {
      return wrong(0, "float, float16, bfloat16 or double [B, T, width] with a width");
    }
    operands.batch = delta.shape[0], operands.tokens = delta.shape[1], operands.row = delta.shape[2];
    DEPTHWIRE_TRY(like(1, delta, ", as 'delta'"));
    const Tensor& criteria = input(2);
    if (!floating(criteria) || criteria.rank != 1 || criteria.shape[0] != 4) return wrong(2, "float [4]");
    DEPTHWIRE_TRY(exact(3, kBool, {operands.batch, operands.tokens}));
    if (window >= 1 && window <= kLongestWindow) return nullptr;
    return refuse(api, spec, "attribute 'window' is " + std::to_string(window) + ", wanted from 1 to 2^31 tokens");
  }
};

}  // namespace

OrtStatus* refuse_input(const OrtApi& api, const RoutingSpec& spec, const RoutingOperands& operands, int index,
                        const std::string& wanted) {
  const std::string text = std::string("input '") + spec.input_name(index) + "' is ";
  return refuse(api, spec, text + describe(operands.inputs[index]) + ", wanted " + wanted);
}

OrtStatus* fetch_routing(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                         const OrtKernelContext* context, RoutingOperands& operands) {
  for (int index = 0; index < spec.inputs(); ++index) {
    Tensor& tensor = operands.inputs[index];
    DEPTHWIRE_TRY(fetch_input(api, context, index, tensor));
    if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) {
      return refuse(api, spec, std::string("input '") + spec.input_name(index) + "' is missing");
    }
  }
  const Checker checker{api, spec, operands};
  switch (spec.kind) {
    case Routing::select:
      return checker.select(attributes.window);
    case Routing::select_budget:
      return checker.select_budget();
    case Routing::gather:
      return checker.rows();
    case Routing::scatter:
      return checker.scatter();
    default:
      return checker.surprise(attributes.window);
  }
}

}  // namespace depthwire
