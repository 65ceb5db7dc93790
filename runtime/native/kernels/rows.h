// The kernels over rows, written once for every instruction set and element type. See kernels.h for what they compute.
//
// Memory is what a read costs, so every source is fetched once: the pass that takes its sum of squares and its dot
// product brings the row into the cache (and asks for the next row), the weighted sum finds it there.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

constexpr int kPadded = kMaxSources + 16;          // room for the sources, the mixed one, and whole vectors
constexpr int64_t kCacheBytes = 256 * 1024;        // of one row of all sources at a time, well within the L2 cache
constexpr int kBlock = kLanes >= 16 ? 8 : 6;       // vectors of the weighted sum that are kept in registers
constexpr float kNegInfinity = -__builtin_inff();

// Dot products of NS rows with NQ queries, and with SS their sums of squares; whole vectors, then the tail.
// PREFETCH asks for the same place of the next row.
template <class T, int NS, int NQ, bool SS, bool PREFETCH>
[[gnu::always_inline]] inline void dots(const T* const* rows, const float* const* queries, int64_t width, float* squares,
                                        float* products, int64_t stride) {
  F32 square[NS] = {}, product[NQ][NS] = {};
  auto step = [&](int64_t at, auto&& fetch) __attribute__((always_inline)) {
    F32 query[NQ];
#pragma GCC unroll 8
    for (int k = 0; k < NQ; ++k) query[k] = fetch(queries[k] + at);
#pragma GCC unroll 8
    for (int i = 0; i < NS; ++i) {
      const F32 value = fetch(rows[i] + at);
      if constexpr (SS) square[i] += value * value;
#pragma GCC unroll 8
      for (int k = 0; k < NQ; ++k) product[k][i] += value * query[k];
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    if constexpr (PREFETCH) {
#pragma GCC unroll 8
      for (int i = 0; i < NS; ++i) __builtin_prefetch(rows[i] + at + width);
    }
    step(at, [](const auto* from) { return load(from); });
  }
  if (at < width) {
    const int64_t left = width - at;
    step(at, [left](const auto* from) { return load_first(from, left); });
  }
  for (int i = 0; i < NS; ++i) {
    if constexpr (SS) squares[i] = sum_lanes(square[i]);
    for (int k = 0; k < NQ; ++k) products[k * stride + i] = sum_lanes(product[k][i]);
  }
}

// sum = last + delta, rounded as it is stored, with its sum of squares and its dot product on the way.
template <class T>
inline void add_and_dot(const T* last, const T* delta, T* sum, const float* query, int64_t width, float* squares,
                        float* product) {
  F32 square[2] = {}, dot[2] = {};
  auto one = [&](int64_t at, int way) __attribute__((always_inline)) {
    store(sum + at, load(last + at) + load(delta + at));
    const F32 value = load(sum + at);
    square[way] += value * value;
    dot[way] += value * load(query + at);
  };
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    __builtin_prefetch(last + at + width);
    __builtin_prefetch(delta + at + width);
    __builtin_prefetch(last + at + width + kLanes);
    __builtin_prefetch(delta + at + width + kLanes);
    one(at, 0);
    one(at + kLanes, 1);
  }
  for (; at + kLanes <= width; at += kLanes) one(at, 0);
  if (at < width) {
    const int64_t left = width - at;
    store_first(sum + at, load_first(last + at, left) + load_first(delta + at, left), left);
    const F32 value = load_first(sum + at, left);
    square[0] += value * value;
    dot[0] += value * load_first(query + at, left);
  }
  *squares = sum_lanes(square[0] + square[1]);
  *product = sum_lanes(dot[0] + dot[1]);
}

// Where a weighted sum goes: into fp32 scratch, on top of what is there times `keep`, or straight to the output.
template <class T>
struct Sink {
  float* scratch;
  float keep;  // 0 for the first chunk, which finds the scratch uninitialised
  T* out;      // not null: write here, and nothing to the scratch
};

// Columns [at, at + NB vectors) of sum_i weights[i] rows[i]; returns their sum of squares.
template <class T, int NB>
[[gnu::always_inline]] inline F32 mix_block(const T* const* rows, const float* weights, int count, int64_t at,
                                            const Sink<T>& sink) {
  F32 mixed[NB] = {};
  if (sink.keep != 0) {
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) mixed[b] = load(sink.scratch + at + b * kLanes) * sink.keep;
  }
  for (int i = 0; i < count; ++i) {
    const F32 weight = splat(weights[i]);
    const T* row = rows[i] + at;
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) mixed[b] += weight * load(row + b * kLanes);
  }
  F32 square = {};
#pragma GCC unroll 8
  for (int b = 0; b < NB; ++b) {
    square += mixed[b] * mixed[b];
    if (sink.out != nullptr) {
      store(sink.out + at + b * kLanes, mixed[b]);
    } else {
      store(sink.scratch + at + b * kLanes, mixed[b]);
    }
  }
  return square;
}

// The weighted sum over whole rows; returns the sum of squares of what was written.
template <class T>
inline float mix(const T* const* rows, const float* weights, int count, int64_t width, const Sink<T>& sink) {
  F32 square = {};
  int64_t at = 0;
  for (; at + kBlock * kLanes <= width; at += kBlock * kLanes) {
    square += mix_block<T, kBlock>(rows, weights, count, at, sink);
  }
  if (at + 4 * kLanes <= width) {
    square += mix_block<T, 4>(rows, weights, count, at, sink);
    at += 4 * kLanes;
  }
  for (; at + kLanes <= width; at += kLanes) square += mix_block<T, 1>(rows, weights, count, at, sink);
  if (at < width) {
    const int64_t left = width - at;
    F32 mixed = sink.keep != 0 ? load_first(sink.scratch + at, left) * sink.keep : F32{};
    for (int i = 0; i < count; ++i) mixed += splat(weights[i]) * load_first(rows[i] + at, left);
    square += mixed * mixed;
    if (sink.out != nullptr) {
      store_first(sink.out + at, mixed, left);
    } else {
      store_first(sink.scratch + at, mixed, left);
    }
  }
  return sum_lanes(square);
}

// out = mixed * factor, times the norm's weight where there is one.
template <class T>
inline void finish(const float* mixed, float factor, const float* norm_weight, int64_t width, T* out) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    F32 value = load(mixed + at) * factor;
    if (norm_weight != nullptr) value *= load(norm_weight + at);
    store(out + at, value);
  }
  if (at < width) {
    const int64_t left = width - at;
    F32 value = load_first(mixed + at, left) * factor;
    if (norm_weight != nullptr) value *= load_first(norm_weight + at, left);
    store_first(out + at, value, left);
  }
}

inline int whole_vectors(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// logits = scale * products * rstd, in place, padded with -inf to whole vectors; squares become rstd.
inline void logits_of(float* squares, float* products, int count, float width, float scale, float eps) {
  for (int i = 0; i < count; ++i) {
    squares[i] = 1.0f / __builtin_sqrtf(squares[i] / width + eps);
    products[i] = scale * products[i] * squares[i];
  }
}

// The largest of the logits and `so_far`, NaN aside; pads them.
inline float largest(float* logits, int count, float so_far) {
  const int padded = whole_vectors(count);
  for (int i = count; i < padded; ++i) logits[i] = kNegInfinity;
  F32 most = splat(so_far);
  for (int i = 0; i < padded; i += kLanes) {
    const F32 value = load(logits + i);
    most = value > most ? value : most;
  }
  for (int i = 0; i < kLanes; ++i) so_far = most[i] > so_far ? most[i] : so_far;
  return so_far;
}

// logits -> exp(logits - most), in place; returns their sum. A NaN or an infinity among them makes the sum NaN.
inline float exponentials(float* logits, int count, float most) {
  const int padded = whole_vectors(count);
  F32 total = {};
  for (int i = 0; i < padded; i += kLanes) {
    const F32 value = exp_nonpositive(load(logits + i) - most);
    store(logits + i, value);
    total += value;
  }
  return sum_lanes(total);
}

template <class T>
inline const T* row_of(const void* source, int64_t row, int64_t width) {
  return static_cast<const T*>(source) + row * width;
}

// One row of a read. Sources that do not fit the cache together go in chunks, by the online softmax.
template <class T>
inline void read_row(const ReadCall& call, int64_t row, int chunk, float* scratch) {
  const int64_t width = call.width;
  T* const out = static_cast<T*>(call.out) + row * width;
  const bool whole = call.count <= chunk;
  float most = kNegInfinity, total = 0, square = 0;
  int done = 0;
  bool first = true;
  do {
    const T* rows[kPadded];
    alignas(64) float rstd[kPadded], weights[kPadded];
    const int last = call.count - done <= chunk ? call.count : done + chunk;
    int count = last - done;
    for (int i = 0; i < count; ++i) rows[i] = row_of<T>(call.sources[done + i], row, width);
    const bool add = call.delta != nullptr && last == call.count;
    const int plain = add ? count - 1 : count;
    int i = 0;
    for (; i + 4 <= plain; i += 4) {
      dots<T, 4, 1, true, true>(rows + i, &call.query, width, rstd + i, weights + i, 0);
    }
    if (i + 2 <= plain) {
      dots<T, 2, 1, true, true>(rows + i, &call.query, width, rstd + i, weights + i, 0);
      i += 2;
    }
    if (i < plain) dots<T, 1, 1, true, true>(rows + i, &call.query, width, rstd + i, weights + i, 0);
    if (add) {
      T* const sum = static_cast<T*>(call.sum) + row * width;
      add_and_dot(rows[plain], row_of<T>(call.delta, row, width), sum, call.query, width, rstd + plain, weights + plain);
      rows[plain] = sum;
    }
    logits_of(rstd, weights, count, static_cast<float>(width), call.scale, call.eps);
    if (last == call.count && count > 0) weights[count - 1] += call.last_bias;
    if (first && call.mixed != nullptr) {
      rows[count] = row_of<T>(call.mixed, row, width);
      weights[count] = call.mixed_logit[row];
      rstd[count++] = 1;
    }
    const float before = most;
    most = largest(weights, count, most);
    const float sum = exponentials(weights, count, most);
    const float keep = first ? 0.0f : __builtin_expf(before - most);
    total = total * keep + sum;
    if (call.unit) {
      for (int j = 0; j < count; ++j) weights[j] *= rstd[j];
    }
    if (whole) {
      const float share = 1.0f / total;
      for (int j = 0; j < count; ++j) weights[j] *= share;
    }
    const bool direct = whole && call.norm_weight == nullptr;
    square = mix<T>(rows, weights, count, width, Sink<T>{scratch, keep, direct ? out : nullptr});
    if (direct) return;
    done = last;
    first = false;
  } while (done < call.count);
  float factor = whole ? 1.0f : 1.0f / total;
  if (call.norm_weight != nullptr) {
    factor /= __builtin_sqrtf(square * factor * factor / static_cast<float>(width) + call.norm_eps);
  }
  finish(scratch, factor, call.norm_weight, width, out);
}

template <class T>
void read_rows(const ReadCall& call, int64_t first, int64_t last, float* scratch) {
  const int64_t fits = kCacheBytes / (call.width * static_cast<int64_t>(sizeof(T)) + 1);
  const int chunk = fits < 8 ? 8 : fits > kMaxSources ? kMaxSources : static_cast<int>(fits);
  for (int64_t row = first; row < last; ++row) read_row<T>(call, row, chunk, scratch);
}

template <class T>
void widen_all(const void* from, int64_t count, float* to) {
  const T* source = static_cast<const T*>(from);
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) store(to + at, load(source + at));
  if (at < count) store_first(to + at, load_first(source + at, count - at), count - at);
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
