// The CUDA provider's routing kernels: a call's operands to the launches of its cubins. What lies in device memory is
// not looked at here: an index that is no token's is not followed by the kernels.
#include <algorithm>
#include <bit>
#include <limits>
#include <new>

#include "cuda_backend.h"
#include "launch.h"
#include "operands.h"
#include "routing_op.h"

namespace depthwire {

namespace {

constexpr std::int64_t kSmallestBlock = 32;
constexpr std::int64_t kBudgetBlock = 2048;  // rows beyond it are scanned in steps: block 0

const char* type_key(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "fp16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      return "bf16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      return "fp64";
    default:
      return "fp32";
  }
}

std::int64_t power_of_two(std::int64_t count) {
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(count)));
}

// Memory of the provider for as long as a call takes; on one stream, what is freed here is used again behind it.
class Scratch {
 public:
  explicit Scratch(const OrtApi& api) : api_(api) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (data_ != nullptr) allocator_->Free(allocator_, data_);
    if (allocator_ != nullptr) api_.ReleaseAllocator(allocator_);
  }

  // Where the operator's first input lies.
  OrtStatus* allocate(OrtKernelContext* context, const std::string& op, std::size_t bytes, const void** data) {
    const OrtValue* value = nullptr;
    const OrtMemoryInfo* place = nullptr;
    DEPTHWIRE_TRY(api_.KernelContext_GetInput(context, 0, &value));
    DEPTHWIRE_TRY(api_.GetTensorMemoryInfo(value, &place));
    DEPTHWIRE_TRY(api_.KernelContext_GetAllocator(context, place, &allocator_));
    data_ = allocator_->Alloc(allocator_, bytes);
    if (data_ == nullptr) return api_.CreateStatus(ORT_FAIL, ("depthwire " + op + ": out of memory").c_str());
    *data = data_;
    return nullptr;
  }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* data_ = nullptr;
};

struct Call {
  const OrtApi& api;
  const RoutingSpec& spec;
  OrtKernelContext* context;
  RoutingOperands operands;

  const void* data(int index) const { return operands.inputs[index].data; }

  OrtStatus* output(std::size_t index, std::initializer_list<std::int64_t> shape, const void** data) const {
    void* made = nullptr;
    DEPTHWIRE_TRY(make_output(api, context, index, -1, shape.begin(), shape.size(), &made));
    *data = made;
    return nullptr;
  }

  // T and, where the kernel takes it, K.
  OrtStatus* launch(const std::string& key, std::vector<const void*> pointers, std::int64_t size, bool slots) const {
    if (operands.tokens > std::numeric_limits<std::int32_t>::max()) {
      return refuse(api, spec, "has " + std::to_string(operands.tokens) + " tokens: too many");
    }
    Launch made{spec.name(), key, std::move(pointers), {static_cast<std::int32_t>(operands.tokens)}};
    if (slots) made.numbers.push_back(static_cast<std::int32_t>(operands.slots));
    made.rows = operands.batch, made.size = size;
    return launch_kernel(api, context, made);
  }

  OrtStatus* fp32_scores() const {
    if (operands.inputs[0].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return nullptr;
    return refuse_input(api, spec, operands, 0, "float: there is no kernel for double");
  }

  OrtStatus* select(std::int64_t window) const {
    DEPTHWIRE_TRY(fp32_scores());
    const void *index = nullptr, *taken = nullptr;
    DEPTHWIRE_TRY(output(0, {operands.batch, operands.slots}, &index));
    DEPTHWIRE_TRY(output(1, {operands.batch, operands.slots}, &taken));
    if (operands.batch == 0) return nullptr;
    const std::int64_t named = std::int64_t{1} << spec.levels;
    const std::int64_t block = std::max(kSmallestBlock, window == 0 ? named : power_of_two(window));
    if (window == 0 && operands.tokens > named) return too_long(named);
    return launch("SelectTokens-b" + std::to_string(block) + "-w" + std::to_string(window),
                  {data(0), data(1), index, taken}, 1, true);
  }

  OrtStatus* too_long(std::int64_t most) const {
    return refuse(api, spec, "has " + std::to_string(operands.tokens) + " tokens, wanted at most " +
                                 std::to_string(most) + ", as its name says");
  }

  OrtStatus* select_budget() const {
    DEPTHWIRE_TRY(fp32_scores());
    const void *index = nullptr, *taken = nullptr, *state = nullptr;
    DEPTHWIRE_TRY(output(0, {operands.batch, operands.slots}, &index));
    DEPTHWIRE_TRY(output(1, {operands.batch, operands.slots}, &taken));
    DEPTHWIRE_TRY(output(2, {operands.batch, 2}, &state));
    if (operands.batch == 0) return nullptr;
    const std::int64_t named = std::int64_t{1} << spec.levels;
    if (operands.tokens > named) return too_long(named);
    const std::int64_t block = named > kBudgetBlock ? 0 : std::max(kSmallestBlock, named);
    return launch("SelectTokensBudget-b" + std::to_string(block),
                  {data(0), data(1), data(2), data(3), data(4), index, taken, state}, 1, true);
  }

  OrtStatus* row_output(std::int64_t tokens, const void** out) const {
    const Tensor& x = operands.inputs[0];
    std::int64_t shape[kMaxRank];
    std::memcpy(shape, x.shape, x.rank * sizeof(*shape));
    shape[1] = tokens;
    void* made = nullptr;
    DEPTHWIRE_TRY(make_output(api, context, 0, -1, shape, x.rank, &made));
    *out = made;
    return nullptr;
  }

  OrtStatus* gather() const {
    const void* out = nullptr;
    DEPTHWIRE_TRY(row_output(operands.slots, &out));
    if (operands.batch == 0 || operands.slots == 0 || operands.row == 0) return nullptr;
    return launch("GatherTokens-r" + std::to_string(operands.row), {data(0), data(1), out}, operands.slots, true);
  }

  OrtStatus* scatter() const {
    const void* out = nullptr;
    DEPTHWIRE_TRY(row_output(operands.tokens, &out));
    if (operands.batch == 0 || operands.tokens == 0 || operands.row == 0) return nullptr;
    return launch("ScatterTokens-r" + std::to_string(operands.row), {data(0), data(1), data(2), data(3), out},
                  operands.tokens, true);
  }

  OrtStatus* surprise(std::int64_t window) const {
    const void *rank = nullptr, *sums = nullptr;
    DEPTHWIRE_TRY(output(0, {operands.batch, operands.tokens}, &rank));
    if (operands.batch == 0 || operands.tokens == 0) return nullptr;
    Scratch scratch(api);
    const auto numbers = static_cast<std::size_t>(2 * operands.batch * operands.tokens);
    DEPTHWIRE_TRY(scratch.allocate(context, spec.name(), numbers * sizeof(float), &sums));
    const std::string delta = type_key(operands.inputs[0].type), criteria = type_key(operands.inputs[2].type);
    DEPTHWIRE_TRY(launch("SurpriseScore-sums-d" + std::to_string(operands.row) + "-" + delta,
                         {data(0), data(1), data(3), sums}, operands.tokens, false));
    return launch("SurpriseScore-rank-w" + std::to_string(window) + "-" + criteria, {sums, data(2), data(3), rank},
                  operands.tokens, false);
  }
};

}  // namespace

OrtStatus* route_on_cuda(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                         OrtKernelContext* context) try {
  Call call{api, spec, context, {}};
  DEPTHWIRE_TRY(fetch_routing(api, spec, attributes, context, call.operands));
  switch (spec.kind) {
    case Routing::select:
      return call.select(attributes.window);
    case Routing::select_budget:
      return call.select_budget();
    case Routing::gather:
      return call.gather();
    case Routing::scatter:
      return call.scatter();
    default:
      return call.surprise(attributes.window);
  }
} catch (const std::bad_alloc&) {
  return api.CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

}  // namespace depthwire
