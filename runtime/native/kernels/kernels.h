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

// Both work on rows [first, last). `scratch` holds scratch_floats(...) values and belongs to the calling thread.
struct Kernels {
  void (*read)(const ReadCall& call, std::int64_t first, std::int64_t last, float* scratch);
  void (*inter)(const InterCall& call, std::int64_t first, std::int64_t last, float* scratch);
  void (*widen)(const void* from, std::int64_t count, float* to);  // any element type to fp32
};

inline std::size_t read_scratch_floats(const ReadCall& call) { return static_cast<std::size_t>(call.width); }
inline std::size_t inter_scratch_floats(const InterCall& call) {
  // Logits of every query, padded to whole vectors, and the rstd of every source.
  return static_cast<std::size_t>(call.query_count + 1) * (kMaxSources + 16);
}

// The best kernels this CPU runs, or those of the named instruction set ("avx512", "avx2", "neon", "baseline"), null
// where this CPU or this build lacks it.
const Kernels& kernels(Element element);
const Kernels* kernels_of(const char* instruction_set, Element element);
const char* instruction_set();

}  // namespace depthwire
