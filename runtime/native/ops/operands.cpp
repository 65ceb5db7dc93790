#include "operands.h"

namespace depthwire {

namespace {

constexpr std::int64_t kMaxQueries = 4096;

struct Reader {
  const OrtApi& api;
  const OpSpec& spec;
  const OrtKernelContext* context;

  OrtStatus* fetch(int index, Tensor& tensor) const {
    DEPTHWIRE_TRY(fetch_input(api, context, index, tensor));
    if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return nullptr;
    return refuse(api, spec, "input '" + spec.input_name(index) + "' is missing");
  }

  OrtStatus* wrong(int index, const Tensor& tensor, const std::string& wanted) const {
    return refuse(api, spec, "input '" + spec.input_name(index) + "' is " + describe(tensor) + ", wanted " + wanted);
  }

  // A parameter: fp32, or of the sources' type.
  OrtStatus* parameter(int index, const Operands& operands, bool matrix, Tensor& tensor) const {
    DEPTHWIRE_TRY(fetch(index, tensor));
    const std::size_t rank = matrix ? 2 : 1;
    const bool typed = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || tensor.type == operands.row.type;
    if (typed && tensor.rank == rank && tensor.shape[rank - 1] == operands.width) {
      if (!matrix || (tensor.shape[0] >= 1 && tensor.shape[0] <= kMaxQueries)) return nullptr;
    }
    std::string wanted = "float";
    if (operands.row.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      wanted += std::string(" or ") + type_name(operands.row.type);
    }
    wanted += (matrix ? " [S, " : " [") + std::to_string(operands.width) + "]";
    if (matrix) wanted += " with S from 1 to " + std::to_string(kMaxQueries);
    return wrong(index, tensor, wanted);
  }

  OrtStatus* like_row(int index, const Operands& operands, Tensor& tensor) const {
    DEPTHWIRE_TRY(fetch(index, tensor));
    if (tensor.type == operands.row.type && same_shape(tensor, operands.row)) return nullptr;
    return wrong(index, tensor, describe(operands.row) + ", as the other sources");
  }
};

}  // namespace

std::optional<Element> element_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return Element::f32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return Element::f16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return Element::bf16;
    default:
      return std::nullopt;
  }
}

std::size_t element_bytes(Element element) { return element == Element::f32 ? 4 : 2; }

OrtStatus* fetch_operands(const OrtApi& api, const OpSpec& spec, const Attributes& attributes,
                          const OrtKernelContext* context, Operands& operands) {
  const Reader reader{api, spec, context};
  const bool merge = spec.family == Family::merge;

  // What all others must look like: the first source, or a row of phase 1's mean.
  const int model = merge ? spec.inter_out() : spec.first_source();
  Tensor first;
  DEPTHWIRE_TRY(reader.fetch(model, first));
  const std::optional<Element> element = element_of(first.type);
  if (!element) return reader.wrong(model, first, "float, float16 or bfloat16");
  const std::size_t least = merge ? 2 : 1;
  if (first.rank < least || first.rank > kMaxRank || first.shape[first.rank - 1] < 1) {
    return reader.wrong(model, first, merge ? "[S, ..., width] with a width" : "[..., width] with a width");
  }
  operands.element = *element;
  operands.row = {nullptr, first.type, first.shape + (merge ? 1 : 0), first.rank - (merge ? 1 : 0)};
  operands.width = first.shape[first.rank - 1];
  operands.rows = 1;
  for (std::size_t i = 0; i + 1 < operands.row.rank; ++i) operands.rows *= operands.row.shape[i];

  DEPTHWIRE_TRY(reader.parameter(0, operands, spec.family == Family::inter, operands.query));
  if (spec.family == Family::inter) operands.query_count = operands.query.shape[0];
  if (spec.norm) DEPTHWIRE_TRY(reader.parameter(spec.norm_weight(), operands, false, operands.norm_weight));

  if (merge) {
    if (attributes.index < 0 || attributes.index >= first.shape[0]) {
      return refuse(api, spec,
                    "attribute 'index' is " + std::to_string(attributes.index) + ", and input 'inter_out' is " +
                        describe(first) + ": no such row");
    }
    DEPTHWIRE_TRY(reader.fetch(spec.inter_lse(), operands.mixed_logit));
    const Tensor& lse = operands.mixed_logit;
    const Tensor leading{nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, first.shape, first.rank - 1};
    if (lse.type != leading.type || !same_shape(lse, leading)) {
      return reader.wrong(spec.inter_lse(), lse, describe(leading));
    }
    const auto before = static_cast<std::size_t>(attributes.index * operands.rows);
    const std::size_t bytes = before * static_cast<std::size_t>(operands.width) * element_bytes(*element);
    operands.mixed = {static_cast<const char*>(first.data) + bytes, first.type, operands.row.shape, operands.row.rank};
    operands.mixed_logit.data = static_cast<const float*>(lse.data) + before;
  }
  for (int i = 0; i < spec.sources; ++i) {
    Tensor source;
    DEPTHWIRE_TRY(reader.like_row(spec.first_source() + i, operands, source));
    operands.sources[i] = source.data;
  }
  if (spec.add) DEPTHWIRE_TRY(reader.like_row(spec.delta(), operands, operands.delta));
  return nullptr;
}

OrtStatus* make_output(const OrtApi& api, OrtKernelContext* context, std::size_t index, std::int64_t leading,
                       const std::int64_t* shape, std::size_t rank, void** data) {
  std::int64_t dims[kMaxRank + 1];
  std::size_t count = 0;
  if (leading >= 0) dims[count++] = leading;
  if (rank != 0) std::memcpy(dims + count, shape, rank * sizeof(*shape));
  OrtValue* value = nullptr;
  DEPTHWIRE_TRY(api.KernelContext_GetOutput(context, index, dims, count + rank, &value));
  *data = nullptr;
  return value == nullptr ? nullptr : api.GetTensorMutableData(value, data);
}

}  // namespace depthwire
