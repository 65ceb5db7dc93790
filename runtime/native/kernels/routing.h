// The routing kernels, apart from ONNX Runtime: which tokens a routed block computes, and what its surprise scores are.
//
// Selection is exact: every build and instruction set picks the same tokens, those that depthwire/ops/select_tokens.py
// picks. A score is made canonical first (what is below -FLT_MAX or no number becomes -FLT_MAX, what is closer to zero
// than FLT_MIN becomes +0), so that neither NaN nor flushed denormals decide.
#pragma once

#include <cstddef>
#include <cstdint>

namespace depthwire {

enum class Score : std::uint8_t { f32, f64 };

// Rows of `tokens` scores, of which the valid ones compete for `slots` places. `index` becomes the selected tokens in
// ascending order, then in the places left over the smallest others; `taken` says which places are the former.
struct SelectCall {
  const void* score;          // [rows, tokens]
  const std::uint8_t* valid;  // [rows, tokens]
  std::int64_t tokens, slots;
  std::int64_t windows;  // each has tokens / windows tokens and slots / windows places of its own
  std::int64_t* index;   // [rows, slots]
  std::uint8_t* taken;   // [rows, slots]
};

// The running budget: a valid token whose score reaches the threshold is selected while fewer were, since the sequence
// began, than numerator * (its number among the valid tokens) / denominator, rounded down, + margin.
struct BudgetCall {
  SelectCall select;  // `windows` is not used
  double threshold;
  std::int64_t numerator, denominator, margin;
  const std::int64_t* state;  // [rows, 2]: valid tokens before, and selected ones among them
  std::int64_t* state_out;    // [rows, 2]
};

// Surprise scores of rows of tokens. The sums of a token come first, in any order; then a row's scores.
struct SurpriseCall {
  const void *delta, *prior;  // [rows * tokens, width]
  std::int64_t tokens, width, window;
  const std::uint8_t* valid;  // [rows, tokens]
  double offset, m_cu, beta_ce, beta_cu;
  void* static_surprise;  // scratch [rows * tokens], of the rank's type: D_st
  void* rank;             // [rows, tokens]: the criterion CE until surprise_rank
};

// `row` is one sequence, `first` to `last` are tokens of any. Arrays by Score or by the element type of delta and
// prior: f32, f16, bf16 with ranks of f32, and f64 with ranks of f64.
struct RoutingKernels {
  void (*select[2])(const SelectCall& call, std::int64_t row, void* keys);  // scratch: `tokens` scores
  void (*select_budget[2])(const BudgetCall& call, std::int64_t row);
  void (*surprise_sums[4])(const SurpriseCall& call, std::int64_t first, std::int64_t last);
  void (*surprise_rank[2])(const SurpriseCall& call, std::int64_t row, double* scratch);
};

// Doubles of scratch that the scores of a row take: the moving average, and sums of a window.
static inline std::size_t surprise_scratch(const SurpriseCall& call) {
  return static_cast<std::size_t>(call.tokens + (call.window < call.tokens ? call.window : call.tokens) + 1);
}

// The best this CPU runs, or those of the named instruction set; see kernels.h.
const RoutingKernels& routing_kernels();
const RoutingKernels* routing_kernels_of(const char* instruction_set);

}  // namespace depthwire
