// The depth-attention kernels, apart from ONNX Runtime: plain pointers in, plain pointers out.
//
// For every row (token) independently, with sources v_1 .. v_n and one query u:
//
//   r_i = 1 / sqrt(mean(v_i^2) + eps),  s_i = scale (u . v_i) r_i,  p = softmax(s),  out = sum_i p_i v_i
//
// in fp32, whatever the sources are stored as. depthwire/ops/_reference.py holds the same formulas in torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace depthwire {

enum class Element : std::uint8_t { f32, f16, bf16 };

constexpr int kMaxSources = 256;

// One read over all rows. `sources`, `delta`, `sum`, `mixed` and `out` are row-major [rows, width] of one element type.
struct ReadCall {
  const void* const* sources;  // `count` of them; 0 only together with `mixed`
  int count;
  std::int64_t width;
  const float* query;        // [width]
  const float* norm_weight;  // [width]; null for a read without the RMSNorm behind it
  const void* delta;         // null unless the last source is a sum that is made on the way,
  void* sum;                 // which is written here; may be the memory of the last source or of `delta`
  const void* mixed;         // phase 1's mean, one more source; null for a plain read
  const float* mixed_logit;  // [rows], its logit
  void* out;                 // may be the memory of any source
  float eps, scale, last_bias, norm_eps;
  bool unit;  // mix the normalised sources
};

// Phase 1: `queries` reads of the same sources in one pass over them.
struct InterCall {
  const void* const* sources;
  int count;
  std::int64_t width, rows;
  const float* queries;  // [query_count, width]
  int query_count;
  void* out;   // [query_count, rows, width]
  float* lse;  // [query_count, rows]: the logsumexp of the logits
  float eps, scale;
};

// Both work on rows [first, last), best a multiple of block_rows(width) of them. `scratch` belongs to the calling
// thread and holds as many floats as read_scratch or inter_scratch say.
struct Kernels {
  void (*read)(const ReadCall& call, std::int64_t first, std::int64_t last, float* scratch);
  void (*inter)(const InterCall& call, std::int64_t first, std::int64_t last, float* scratch);
  void (*widen)(const void* from, std::int64_t count, float* to);  // any element type to fp32
};

// The rows that a read works on together, whose sums stay in half an L1 cache to half an L2 cache, and at most.
constexpr int kBlockRows = 16;
static inline int block_rows(std::int64_t width) {
  const std::int64_t rows = 16 * 1024 / width;
  return rows < 1 ? 1 : rows > kBlockRows ? kBlockRows : static_cast<int>(rows);
}
static inline std::size_t read_scratch(const ReadCall& call) {
  return static_cast<std::size_t>(block_rows(call.width)) * static_cast<std::size_t>(call.width);
}

// The rows of all sources that phase 1 keeps a copy of, one beside the other, in the L2 cache.
constexpr int kPackedFloats = 96 * 1024;
static inline int packed_rows(std::int64_t width, int count) {
  const std::int64_t rows = kPackedFloats / (width * count);
  return rows < 1 ? 1 : rows > kBlockRows ? kBlockRows : static_cast<int>(rows);
}
static inline int padded_logits(int count) { return (count + 15) / 16 * 16; }  // whole vectors of any width
static inline std::size_t inter_scratch(const InterCall& call) {
  const auto rows = static_cast<std::size_t>(packed_rows(call.width, call.count));
  const auto copy = static_cast<std::size_t>(call.count) * static_cast<std::size_t>(call.width);
  return rows * (copy + static_cast<std::size_t>(padded_logits(call.count)) * (call.query_count + 1));
}

// The best kernels this CPU runs, or those of the named instruction set ("avx512", "avx2", "neon", "baseline"), null
// where this CPU or this build lacks it.
const Kernels& kernels(Element element);
const Kernels* kernels_of(const char* instruction_set, Element element);
const char* instruction_set();

}  // namespace depthwire
