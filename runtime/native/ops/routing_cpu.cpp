// The CPU provider's routing kernels: a call's operands to the kernels, and tokens moved as bytes.
#include <algorithm>
#include <new>
#include <vector>

#include "kernels.h"
#include "operands.h"
#include "parallel.h"
#include "routing.h"
#include "routing_op.h"

namespace depthwire {

namespace {

constexpr std::int64_t kMostSeen = std::int64_t{1} << 62;  // a count that this many more tokens fit behind

struct Call {
  const OrtApi& api;
  const RoutingSpec& spec;
  OrtKernelContext* context;
  RoutingOperands operands;

  template <class T>
  const T* data(int index) const {
    return static_cast<const T*>(operands.inputs[index].data);
  }

  OrtStatus* output(std::size_t index, std::initializer_list<std::int64_t> shape, void** data) const {
    return make_output(api, context, index, -1, shape.begin(), shape.size(), data);
  }

  OrtStatus* select_outputs(SelectCall& call) const {
    call.score = operands.inputs[0].data;
    call.valid = data<std::uint8_t>(1);
    call.tokens = operands.tokens;
    call.slots = operands.slots;
    void *index = nullptr, *taken = nullptr;
    DEPTHWIRE_TRY(output(0, {operands.batch, operands.slots}, &index));
    DEPTHWIRE_TRY(output(1, {operands.batch, operands.slots}, &taken));
    call.index = static_cast<std::int64_t*>(index);
    call.taken = static_cast<std::uint8_t*>(taken);
    return nullptr;
  }

  bool wide() const { return operands.inputs[0].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE; }

  OrtStatus* select(std::int64_t window) const {
    SelectCall call{};
    DEPTHWIRE_TRY(select_outputs(call));
    call.windows = window == 0 ? 1 : operands.tokens / window;
    const std::size_t bytes = static_cast<std::size_t>(operands.tokens) * (wide() ? 8 : 4);
    std::vector<std::uint64_t> keys((bytes * static_cast<std::size_t>(operands.batch) + 7) / 8);
    const auto run = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        void* own = reinterpret_cast<char*>(keys.data()) + bytes * static_cast<std::size_t>(row);
        routing_kernels().select[wide()](call, row, own);
      }
    };
    return in_parts(api, context, operands.batch, operands.tokens * 32, run);  // as long as fetching so many bytes
  }

  OrtStatus* select_budget() const {
    BudgetCall call{};
    call.state = data<std::int64_t>(4);
    const std::int64_t* budget = data<std::int64_t>(3);
    call.numerator = budget[0], call.denominator = budget[1], call.margin = budget[2];
    if (call.numerator < 0 || call.denominator < 1) {
      return refuse(api, spec,
                    "input 'budget' begins with " + std::to_string(call.numerator) + " and " +
                        std::to_string(call.denominator) +
                        ", wanted a numerator of 0 or more, a denominator of 1 or more");
    }
    for (std::int64_t i = 0; i < 2 * operands.batch; ++i) {
      if (call.state[i] >= 0 && call.state[i] <= kMostSeen) continue;
      return refuse(api, spec, "input 'state' holds " + std::to_string(call.state[i]) + ", wanted counts of tokens");
    }
    call.threshold = wide() ? *data<double>(2) : static_cast<double>(*data<float>(2));
    void* state_out = nullptr;
    DEPTHWIRE_TRY(select_outputs(call.select));
    DEPTHWIRE_TRY(output(2, {operands.batch, 2}, &state_out));
    call.state_out = static_cast<std::int64_t*>(state_out);
    const auto run = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) routing_kernels().select_budget[wide()](call, row);
    };
    return in_parts(api, context, operands.batch, operands.tokens * 32, run);
  }

  // Every index, or those of taken slots, must be one of a token's.
  OrtStatus* check_index(const std::uint8_t* taken) const {
    const std::int64_t* const index = data<std::int64_t>(1);
    const auto tokens = static_cast<std::uint64_t>(operands.tokens);
    for (std::int64_t i = 0; i < operands.batch * operands.slots; ++i) {
      if (static_cast<std::uint64_t>(index[i]) < tokens || (taken != nullptr && taken[i] == 0)) continue;
      return wrong_index(i, "wanted a token of '" + std::string(spec.input_name(0)) + "', which has " +
                                std::to_string(operands.tokens));
    }
    return nullptr;
  }

  OrtStatus* wrong_index(std::int64_t at, const std::string& text) const {
    return refuse(api, spec,
                  "input 'index' is " + std::to_string(data<std::int64_t>(1)[at]) + " at [" +
                      std::to_string(at / operands.slots) + ", " + std::to_string(at % operands.slots) + "], " + text);
  }

  OrtStatus* row_output(std::int64_t tokens, void** out) const {
    const Tensor& x = operands.inputs[0];
    std::int64_t shape[kMaxRank];
    std::memcpy(shape, x.shape, x.rank * sizeof(*shape));
    shape[1] = tokens;
    return make_output(api, context, 0, -1, shape, x.rank, out);
  }

  OrtStatus* gather() const {
    DEPTHWIRE_TRY(check_index(nullptr));
    void* made = nullptr;
    DEPTHWIRE_TRY(row_output(operands.slots, &made));
    const std::int64_t row = operands.row;
    if (row == 0) return nullptr;
    const char* const x = data<char>(0);
    const std::int64_t* const index = data<std::int64_t>(1);
    char* const out = static_cast<char*>(made);
    const auto run = [&](std::int64_t first, std::int64_t last) {
      with_size(row, [&](auto size) {
        for (std::int64_t i = first; i < last; ++i) {
          const std::int64_t token = i / operands.slots * operands.tokens + index[i];
          std::memcpy(out + i * row, x + token * row, size());
        }
      });
    };
    return in_parts(api, context, operands.batch * operands.slots, 2 * row, run);
  }

  OrtStatus* scatter() const {
    const std::uint8_t* const taken = data<std::uint8_t>(2);
    DEPTHWIRE_TRY(check_index(taken));
    // The slot that each token's row comes from; -1 for the base.
    std::vector<std::int64_t> slot_of(static_cast<std::size_t>(operands.batch * operands.tokens), -1);
    const std::int64_t* const index = data<std::int64_t>(1);
    for (std::int64_t i = 0; i < operands.batch * operands.slots; ++i) {
      if (taken[i] == 0) continue;
      std::int64_t& slot = slot_of[static_cast<std::size_t>(i / operands.slots * operands.tokens + index[i])];
      if (slot >= 0) return wrong_index(i, "as in an earlier slot of the row; wanted each token once");
      slot = i;
    }
    void* made = nullptr;
    DEPTHWIRE_TRY(row_output(operands.tokens, &made));
    const std::int64_t row = operands.row;
    if (row == 0) return nullptr;
    const char *const base = data<char>(0), *const rows = data<char>(3);
    char* const out = static_cast<char*>(made);
    const bool in_place = out == base;
    const auto run = [&](std::int64_t first, std::int64_t last) {
      with_size(row, [&](auto size) {
        for (std::int64_t token = first; token < last; ++token) {
          const std::int64_t slot = slot_of[static_cast<std::size_t>(token)];
          if (slot < 0 && in_place) continue;
          std::memcpy(out + token * row, slot < 0 ? base + token * row : rows + slot * row, size());
        }
      });
    };
    return in_parts(api, context, operands.batch * operands.tokens, in_place ? row : 2 * row, run);
  }

  // Sizes of single numbers are constants, which memcpy turns into one instruction.
  template <class Body>
  static void with_size(std::int64_t bytes, const Body& body) {
    switch (bytes) {
      case 1:
        return body([] { return std::size_t{1}; });
      case 2:
        return body([] { return std::size_t{2}; });
      case 4:
        return body([] { return std::size_t{4}; });
      case 8:
        return body([] { return std::size_t{8}; });
      default:
        return body([bytes] { return static_cast<std::size_t>(bytes); });
    }
  }

  // Numbers of any floating-point type in fp64.
  static void widened(const Tensor& tensor, double* to, std::int64_t count) {
    if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
      std::copy_n(static_cast<const double*>(tensor.data), count, to);
      return;
    }
    float values[4];
    kernels(*element_of(tensor.type)).widen(tensor.data, count, values);
    std::copy_n(values, count, to);
  }

  OrtStatus* surprise(std::int64_t window) const {
    double criteria[4];
    widened(operands.inputs[2], criteria, 4);
    SurpriseCall call{};
    call.delta = operands.inputs[0].data;
    call.prior = operands.inputs[1].data;
    call.tokens = operands.tokens;
    call.width = operands.row;
    call.window = window;
    call.valid = data<std::uint8_t>(3);
    call.offset = criteria[0], call.m_cu = criteria[1], call.beta_ce = criteria[2], call.beta_cu = criteria[3];
    DEPTHWIRE_TRY(output(0, {operands.batch, operands.tokens}, &call.rank));
    const std::int64_t rows = operands.batch * operands.tokens;
    const std::size_t element = wide() ? 3 : static_cast<std::size_t>(*element_of(operands.inputs[0].type));
    const std::size_t scratch_size = surprise_scratch(call);
    std::vector<double> sums(static_cast<std::size_t>(rows));  // room for either type of rank
    std::vector<double> scratch(scratch_size * static_cast<std::size_t>(operands.batch));
    call.static_surprise = sums.data();
    const auto sum = [&](std::int64_t first, std::int64_t last) {
      routing_kernels().surprise_sums[element](call, first, last);
    };
    const std::int64_t bytes = 2 * operands.row * element_type(operands.inputs[0].type).bytes;
    DEPTHWIRE_TRY(in_parts(api, context, rows, bytes, sum));
    const auto rank = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t row = first; row < last; ++row) {
        routing_kernels().surprise_rank[wide()](call, row,
                                                scratch.data() + scratch_size * static_cast<std::size_t>(row));
      }
    };
    return in_parts(api, context, operands.batch, operands.tokens * 64, rank);
  }
};

}  // namespace

OrtStatus* compute_routing(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
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
