// Phase 1: several queries over the same sources; see kernels.h.
//
// Here every value is used many times. A few rows of all sources are copied to fp32 scratch, where they lie side by
// side in the L2 cache; the dot products with all queries are taken on the way, the weighted sums from the copy.
#pragma once

#include "rows.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

// Copies one row of one source; returns its sum of squares.
template <class T>
inline float pack(const T* from, float* to, int64_t width) {
  F32 square[2] = {};
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    const F32 left = load(from + at), right = load(from + at + kLanes);
    store(to + at, left);
    store(to + at + kLanes, right);
    square[0] += left * left;
    square[1] += right * right;
  }
  for (; at < width; at += kLanes) {
    const int64_t left = width - at < kLanes ? width - at : kLanes;
    const F32 value = load_first(from + at, left);
    store_first(to + at, value, left);
    square[0] += value * value;
  }
  return sum_lanes(square[0] + square[1]);
}

// The largest of the logits, NaN aside; pads them with -inf to whole vectors.
inline float largest(float* logits, int count) {
  float most = kNegInfinity;
  for (int i = 0; i < count; ++i) most = logits[i] > most ? logits[i] : most;
  for (int i = count; i % kLanes != 0; ++i) logits[i] = kNegInfinity;
  return most;
}

// logits -> exp(logits - most), in place; returns their sum. A NaN or an infinity among them makes the sum NaN.
inline float exponentials(float* logits, int count, float most) {
  F32 total = {};
  for (int i = 0; i < count; i += kLanes) {
    const F32 value = exp_nonpositive(load(logits + i) - most);
    store(logits + i, value);
    total += value;
  }
  return sum_lanes(total);
}

// Columns [at, at + NB vectors) of NQ weighted sums of the same rows; each loaded value serves all of them.
template <class T, int NQ, int NB>
[[gnu::always_inline]] inline void mix_queries(const float* rows, int64_t width, const float* const* weights, int count,
                                               int64_t at, T* const* outs) {
  F32 mixed[NQ][NB] = {};
  for (int i = 0; i < count; ++i) {
    F32 value[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) value[b] = load(rows + i * width + at + b * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < NQ; ++k) {
      const F32 weight = splat(weights[k][i]);
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) mixed[k][b] += weight * value[b];
    }
  }
  for (int k = 0; k < NQ; ++k) {
    for (int b = 0; b < NB; ++b) store(outs[k] + at + b * kLanes, mixed[k][b]);
  }
}

template <class T>
struct InterBlock {
  static constexpr int kQ = kQueriesAtOnce, kB = kLanes >= 16 ? 4 : 2;
  const InterCall& call;
  int64_t first;   // row
  int rows, step;  // step: logits of a query, to whole vectors
  float* packed;   // [rows, count, width]
  float* rstd;     // [rows, step]
  float* weights;  // [rows, query_count, step]

  float* packed_row(int r, int source) const {
    return packed + (static_cast<int64_t>(r) * call.count + source) * call.width;
  }
  float* weights_of(int r, int query) const { return weights + (r * call.query_count + query) * step; }

  // NS sources from `from` on, all rows: copied, and their dot products with every query while they are near.
  template <int NS>
  void wave(int from) {
    const int64_t width = call.width;
    for (int r = 0; r < rows; ++r) {
      const float* row[NS];
      const T* ahead[NS];
      for (int i = 0; i < NS; ++i) {
        float* const place = packed_row(r, from + i);
        const T* const source = row_of<T>(call.sources[from + i], first + r, width);
        const bool more = r + 1 == rows && from + NS + i < call.count;
        ahead[i] = more ? row_of<T>(call.sources[from + NS + i], first, width) : source + width;
        const float square = pack(source, place, width);
        rstd[r * step + from + i] = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + call.eps);
        row[i] = place;
      }
      const float* queries[kQ];
      int k = 0;
      for (; k + kQ <= call.query_count; k += kQ) {
        for (int j = 0; j < kQ; ++j) queries[j] = call.queries + (k + j) * width;
        dots<float, NS, kQ, false>(row, k == 0 ? ahead : nullptr, queries, width, nullptr, weights_of(r, k) + from,
                                   step);
      }
      for (; k < call.query_count; ++k) {
        queries[0] = call.queries + k * width;
        dots<float, NS, 1, false>(row, k == 0 ? ahead : nullptr, queries, width, nullptr, weights_of(r, k) + from,
                                  step);
      }
    }
  }

  void softmax(int r, int query) {
    float* const own = weights_of(r, query);
    for (int i = 0; i < call.count; ++i) own[i] = call.scale * own[i] * rstd[r * step + i];
    const float most = largest(own, call.count);
    const float total = exponentials(own, call.count, most);
    const float share = 1.0f / total;
    for (int i = 0; i < call.count; ++i) own[i] *= share;
    call.lse[query * call.rows + first + r] = most + __builtin_logf(total);
  }

  // Columns outside, queries inside: a block of columns of all sources stays in the first cache.
  void mix_row(int r) {
    const int64_t width = call.width, row = first + r;
    const float* const values = packed_row(r, 0);
    const float* shares[kQ];
    T* outs[kQ];
    auto aim = [&](int query, int number) {
      for (int j = 0; j < number; ++j) {
        shares[j] = weights_of(r, query + j);
        outs[j] = static_cast<T*>(call.out) + ((query + j) * call.rows + row) * width;
      }
    };
    int64_t at = 0;
    for (; at + kB * kLanes <= width; at += kB * kLanes) {
      int k = 0;
      for (; k + kQ <= call.query_count; k += kQ) {
        aim(k, kQ);
        mix_queries<T, kQ, kB>(values, width, shares, call.count, at, outs);
      }
      for (; k < call.query_count; ++k) {
        aim(k, 1);
        mix_queries<T, 1, kB>(values, width, shares, call.count, at, outs);
      }
    }
    for (; at < width; at += kLanes) {
      const int64_t left = width - at < kLanes ? width - at : kLanes;
      for (int k = 0; k < call.query_count; ++k) {
        aim(k, 1);
        F32 mixed = {};
        for (int i = 0; i < call.count; ++i) mixed += splat(shares[0][i]) * load_first(values + i * width + at, left);
        store_first(outs[0] + at, mixed, left);
      }
    }
  }

  void run() {
    int from = 0;
    for (; from + kWave <= call.count; from += kWave) wave<kWave>(from);
    for (; from < call.count; ++from) wave<1>(from);
    for (int r = 0; r < rows; ++r) {
      for (int k = 0; k < call.query_count; ++k) softmax(r, k);
      mix_row(r);
    }
  }
};

template <class T>
void inter_rows(const InterCall& call, int64_t first, int64_t last, float* scratch) {
  const int block = packed_rows(call.width, call.count), step = padded_logits(call.count);
  float* const rstd = scratch + static_cast<int64_t>(block) * call.count * call.width;
  float* const weights = rstd + block * step;
  for (int64_t row = first; row < last; row += block) {
    const int rows = static_cast<int>(last - row < block ? last - row : block);
    InterBlock<T>{call, row, rows, step, scratch, rstd, weights}.run();
  }
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
