// The reads over rows, written once for every instruction set and element type. See kernels.h for what they compute.
//
// Memory is what a read costs, so every source is fetched once, four sources at a time, as long runs of consecutive
// rows. The softmax is online: the weighted sum of a row is kept in fp32 scratch and rescaled when a later source has a
// larger logit. Taking all sources of one row together instead would look simpler, but activations of one shape often
// lie a multiple of 128 KiB apart, where a row of more than eight of them does not fit the ways of a cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

constexpr int kWave = 4;  // sources taken together
constexpr float kNegInfinity = -__builtin_inff();

// Dot products of NS rows with NQ queries, and with SS their sums of squares; whole vectors, then the tail. `ahead`, if
// not null, are NS rows to ask memory for meanwhile.
template <class T, int NS, int NQ, bool SS, class A = T>
[[gnu::always_inline]] inline void dots(const T* const* rows, const A* const* ahead, const float* const* queries,
                                        int64_t width, float* squares, float* products, int64_t stride) {
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
    if (ahead != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < NS; ++i) __builtin_prefetch(ahead[i] + at);
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
    __builtin_prefetch(last + at + width);
    __builtin_prefetch(delta + at + width);
    const F32 value = rounded<T>(load(last + at) + load(delta + at));
    store(sum + at, value);
    square[way] += value * value;
    dot[way] += value * load(query + at);
  };
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    one(at, 0);
    one(at + kLanes, 1);
  }
  for (; at + kLanes <= width; at += kLanes) one(at, 0);
  if (at < width) {
    const int64_t left = width - at;
    const F32 value = rounded<T>(load_first(last + at, left) + load_first(delta + at, left));
    store_first(sum + at, value, left);
    square[0] += value * value;
    dot[0] += value * load_first(query + at, left);
  }
  *squares = sum_lanes(square[0] + square[1]);
  *product = sum_lanes(dot[0] + dot[1]);
}

// Where the weighted sum of a wave goes: on to the next wave, to the output, or to the norm behind the read.
enum class Goal { scratch, out, norm };

// scratch * keep + sum_i weights[i] rows[i], without the first term for FIRST; returns the sum of squares for the norm.
template <class T, int NS, bool FIRST, Goal GOAL>
inline float mix(const T* const* rows, const float* weights, float keep, int64_t width, float* scratch, T* out) {
  F32 square[2] = {}, weight[NS];
  for (int i = 0; i < NS; ++i) weight[i] = splat(weights[i]);
  const F32 kept = splat(keep);
  auto one = [&](int64_t at, int way, auto&& fetch) __attribute__((always_inline)) {
    F32 mixed = {};
    if constexpr (!FIRST) mixed = fetch(scratch + at) * kept;
#pragma GCC unroll 8
    for (int i = 0; i < NS; ++i) mixed += weight[i] * fetch(rows[i] + at);
    if constexpr (GOAL == Goal::norm) square[way] += mixed * mixed;
    return mixed;
  };
  auto put = [&](int64_t at, F32 mixed) __attribute__((always_inline)) {
    if constexpr (GOAL == Goal::out) {
      store(out + at, mixed);
    } else {
      store(scratch + at, mixed);
    }
  };
  auto whole = [](const auto* from) { return load(from); };
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    const F32 left = one(at, 0, whole), right = one(at + kLanes, 1, whole);
    put(at, left);
    put(at + kLanes, right);
  }
  for (; at + kLanes <= width; at += kLanes) put(at, one(at, 0, whole));
  if (at < width) {
    const int64_t left = width - at;
    const F32 mixed = one(at, 0, [left](const auto* from) { return load_first(from, left); });
    if constexpr (GOAL == Goal::out) {
      store_first(out + at, mixed, left);
    } else {
      store_first(scratch + at, mixed, left);
    }
  }
  return sum_lanes(square[0] + square[1]);
}

// out = mixed * factor * norm_weight.
template <class T>
inline void finish(const float* mixed, float factor, const float* norm_weight, int64_t width, T* out) {
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) store(out + at, load(mixed + at) * factor * load(norm_weight + at));
  if (at < width) {
    const int64_t left = width - at;
    store_first(out + at, load_first(mixed + at, left) * factor * load_first(norm_weight + at, left), left);
  }
}

template <class T>
inline const T* row_of(const void* source, int64_t row, int64_t width) {
  return static_cast<const T*>(source) + row * width;
}

// The online softmax of one row: the largest logit so far, and the sum of exp(logit - most).
struct Softmax {
  float most, total;
};

// Turns the logits of a wave into weights and returns the factor for what was summed before. A NaN anywhere stays.
template <int NS>
inline float advance(Softmax& softmax, float* weights) {
  constexpr int kPadded = kLanes >= kWave + 1 ? kLanes : 2 * kLanes;
  alignas(64) float logits[kPadded];
  float most = softmax.most;
  for (int i = 0; i < NS; ++i) most = weights[i] > most ? weights[i] : most;
  for (int i = 0; i < NS; ++i) logits[i] = weights[i];
  for (int i = NS; i < kPadded; ++i) logits[i] = kNegInfinity;
  logits[kWave] = softmax.most;
  for (int i = 0; i < kPadded; i += kLanes) store(logits + i, exp_nonpositive(load(logits + i) - most));
  float total = 0;
  for (int i = 0; i < NS; ++i) {
    weights[i] = logits[i];
    total += logits[i];
  }
  const float keep = softmax.total == 0 ? 0 : logits[kWave];  // nothing before: -inf - -inf is no number
  softmax = {most, softmax.total * keep + total};
  return keep;
}

// One block of rows. The reads of all its rows advance together, wave by wave.
template <class T>
struct Block {
  const ReadCall& call;
  int64_t first;  // row
  int rows;
  float* scratch;  // [rows, width]
  Softmax softmax[kBlockRows];

  T* out_row(int r) const { return static_cast<T*>(call.out) + (first + r) * call.width; }
  float* scratch_row(int r) const { return scratch + r * call.width; }

  // Phase 1's mean comes first, as a source whose logit is known.
  void begin() {
    for (int r = 0; r < rows; ++r) softmax[r] = {kNegInfinity, 0};
    if (call.mixed == nullptr) return;
    for (int r = 0; r < rows; ++r) {
      const T* row = row_of<T>(call.mixed, first + r, call.width);
      softmax[r] = {call.mixed_logit[first + r], 1};
      const float one = 1;
      if (call.count == 0) {
        settle<1>(r, &row, &one, 0, true);
      } else {
        mix<T, 1, true, Goal::scratch>(&row, &one, 0, call.width, scratch_row(r), nullptr);
      }
    }
  }

  // The weighted sum of the last wave, and the norm.
  template <int NS>
  void settle(int r, const T* const* values, const float* weights, float keep, bool alone) {
    const int64_t width = call.width;
    if (call.norm_weight == nullptr) {
      if (alone) {
        mix<T, NS, true, Goal::out>(values, weights, 0, width, scratch_row(r), out_row(r));
      } else {
        mix<T, NS, false, Goal::out>(values, weights, keep, width, scratch_row(r), out_row(r));
      }
      return;
    }
    const float square = alone ? mix<T, NS, true, Goal::norm>(values, weights, 0, width, scratch_row(r), nullptr)
                               : mix<T, NS, false, Goal::norm>(values, weights, keep, width, scratch_row(r), nullptr);
    const float factor = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + call.norm_eps);
    finish(scratch_row(r), factor, call.norm_weight, width, out_row(r));
  }

  // Given the squares and products of NS sources of row r, from source `from` on.
  template <int NS>
  void advance_row(int r, int from, const T* const* values, float* squares, float* products) {
    const int64_t width = call.width;
    const bool last = from + NS == call.count;
    const bool alone = from == 0 && call.mixed == nullptr;  // nothing in the scratch yet
    for (int i = 0; i < NS; ++i) {
      squares[i] = 1.0f / __builtin_sqrtf(squares[i] / static_cast<float>(width) + call.eps);
      products[i] = call.scale * products[i] * squares[i];
    }
    if (last) products[NS - 1] += call.last_bias;
    float keep = advance<NS>(softmax[r], products);
    if (call.unit) {
      for (int i = 0; i < NS; ++i) products[i] *= squares[i];
    }
    if (last) {
      const float share = 1.0f / softmax[r].total;
      for (int i = 0; i < NS; ++i) products[i] *= share;
      settle<NS>(r, values, products, keep * share, alone);
    } else if (alone) {
      mix<T, NS, true, Goal::scratch>(values, products, 0, width, scratch_row(r), nullptr);
    } else {
      mix<T, NS, false, Goal::scratch>(values, products, keep, width, scratch_row(r), nullptr);
    }
  }

  // NS sources for all rows. While a row is worked on, the next one of the same sources is on its way, and with the
  // last row the first one of the sources that follow.
  template <int NS>
  void wave(int from) {
    const int64_t width = call.width;
    const T *values[NS], *ahead[NS];
    const bool more = from + 2 * NS <= call.count;
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < NS; ++i) {
        values[i] = row_of<T>(call.sources[from + i], first + r, width);
        ahead[i] = r + 1 < rows || !more ? values[i] + width : row_of<T>(call.sources[from + NS + i], first, width);
      }
      float squares[NS], products[NS];
      dots<T, NS, 1, true>(values, ahead, &call.query, width, squares, products, 0);
      advance_row<NS>(r, from, values, squares, products);
    }
  }

  void add_wave() {
    const int64_t width = call.width;
    const int from = call.count - 1;
    for (int r = 0; r < rows; ++r) {
      const T* last = row_of<T>(call.sources[from], first + r, width);
      const T* delta = row_of<T>(call.delta, first + r, width);
      T* const sum = static_cast<T*>(call.sum) + (first + r) * width;
      float square, product;
      add_and_dot(last, delta, sum, call.query, width, &square, &product);
      const T* value = sum;
      advance_row<1>(r, from, &value, &square, &product);
    }
  }

  void run() {
    begin();
    const int plain = call.delta != nullptr ? call.count - 1 : call.count;
    int from = 0;
    for (; from + kWave <= plain; from += kWave) wave<kWave>(from);
    switch (plain - from) {
      case 3:
        wave<3>(from);
        break;
      case 2:
        wave<2>(from);
        break;
      case 1:
        wave<1>(from);
        break;
    }
    if (call.delta != nullptr) add_wave();
  }
};

template <class T>
void read_rows(const ReadCall& call, int64_t first, int64_t last, float* scratch) {
  const int step = block_rows(call.width);
  for (int64_t row = first; row < last; row += step) {
    Block<T>{call, row, static_cast<int>(last - row < step ? last - row : step), scratch, {}}.run();
  }
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
