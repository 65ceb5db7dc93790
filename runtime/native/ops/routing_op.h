// The routing operators of domain "depthwire": their names and inputs, and the operands of a call.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace depthwire {

struct Backend;

enum class Routing { select, select_budget, gather, scatter, surprise };

constexpr int kMaxLevels = 31;  // of a name: the largest bucket has 2^31 tokens
constexpr int kMaxRoutingInputs = 6;

// One operator: SelectTokens_L, SelectTokensBudget_L, GatherTokens, ScatterTokens or SurpriseScore. L, the logarithm of
// the number of tokens, is what the function body needs to know; a kernel does not.
struct RoutingSpec {
  Routing kind;
  int levels = 0;

  std::string name() const;
  int inputs() const;
  int outputs() const;
  const char* input_name(int index) const;
};

std::vector<RoutingSpec> all_routing_specs();
std::optional<RoutingSpec> parse_routing_spec(std::string_view name);

struct RoutingAttributes {
  std::int64_t window = 0;
};

// What a call was given, checked as far as shapes, types and attributes go. Values that lie in the provider's memory
// are its own matter.
struct RoutingOperands {
  Tensor inputs[kMaxRoutingInputs];  // in the order of the names
  std::int64_t batch = 0, tokens = 0, slots = 0;
  std::int64_t row = 0;  // of gather and scatter: bytes of one token; of surprise: its width
};

// Fetches the inputs of a call. Returns an error that names the input, or null.
OrtStatus* fetch_routing(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                         const OrtKernelContext* context, RoutingOperands& operands);

// "input 'index' is int64 [2, 3], wanted ...", as an error.
OrtStatus* refuse_input(const OrtApi& api, const RoutingSpec& spec, const RoutingOperands& operands, int index,
                        const std::string& wanted);

// The CPU provider's kernels.
OrtStatus* compute_routing(const OrtApi& api, const RoutingSpec& spec, const RoutingAttributes& attributes,
                           OrtKernelContext* context);

// The operator as ONNX Runtime takes it; lives as long as the process.
OrtCustomOp* routing_custom_op(const RoutingSpec& spec, const Backend& backend);

}  // namespace depthwire
