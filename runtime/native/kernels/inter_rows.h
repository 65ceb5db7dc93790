// Phase 1: several queries over the same sources; see kernels.h.
#pragma once

#include "rows.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

// Columns [at, at + NB vectors) of NQ weighted sums of the same rows; each loaded value serves all of them.
template <class T, int NQ, int NB>
[[gnu::always_inline]] inline void mix_queries(const T* const* rows, const float* const* weights, int count, int64_t at,
                                               T* const* outs) {
  F32 mixed[NQ][NB] = {};
  for (int i = 0; i < count; ++i) {
    F32 value[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) value[b] = load(rows[i] + at + b * kLanes);
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

template <class T, int NQ>
inline void mix_tail(const T* const* rows, const float* const* weights, int count, int64_t at, int64_t left,
                     T* const* outs) {
  F32 mixed[NQ] = {};
  for (int i = 0; i < count; ++i) {
    const F32 value = load_first(rows[i] + at, left);
    for (int k = 0; k < NQ; ++k) mixed[k] += splat(weights[k][i]) * value;
  }
  for (int k = 0; k < NQ; ++k) store_first(outs[k] + at, mixed[k], left);
}

// The dot products of all sources with NQ queries, from query `k` on.
template <class T, int NQ, bool SS>
inline void products_of(const T* const* rows, int count, const float* const* queries, int64_t width, float* squares,
                        float* products) {
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    dots<T, 4, NQ, SS, SS>(rows + i, queries, width, squares + i, products + i, kPadded);
  }
  for (; i < count; ++i) dots<T, 1, NQ, SS, SS>(rows + i, queries, width, squares + i, products + i, kPadded);
}

template <class T>
inline void inter_row(const InterCall& call, int64_t row, float* scratch) {
  constexpr int kQ = kQueriesAtOnce, kB = kLanes >= 16 ? 4 : 2;
  const int64_t width = call.width;
  const int count = call.count;
  float* const rstd = scratch;
  float* const weights = scratch + kPadded;  // [query_count][kPadded]
  const T* rows[kMaxSources];
  for (int i = 0; i < count; ++i) rows[i] = row_of<T>(call.sources[i], row, width);

  // The squares come with the first query: that pass is the one that waits for memory.
  const float* queries[kQ] = {call.queries};
  products_of<T, 1, true>(rows, count, queries, width, rstd, weights);
  int k = 1;
  for (; k + kQ <= call.query_count; k += kQ) {
    for (int j = 0; j < kQ; ++j) queries[j] = call.queries + (k + j) * width;
    products_of<T, kQ, false>(rows, count, queries, width, rstd, weights + k * kPadded);
  }
  for (; k < call.query_count; ++k) {
    queries[0] = call.queries + k * width;
    products_of<T, 1, false>(rows, count, queries, width, rstd, weights + k * kPadded);
  }

  for (int i = 0; i < count; ++i) rstd[i] = 1.0f / __builtin_sqrtf(rstd[i] / static_cast<float>(width) + call.eps);
  for (k = 0; k < call.query_count; ++k) {
    float* const own = weights + k * kPadded;
    for (int i = 0; i < count; ++i) own[i] = call.scale * own[i] * rstd[i];
    const float most = largest(own, count, kNegInfinity);
    const float total = exponentials(own, count, most);
    const float share = 1.0f / total;
    for (int i = 0; i < count; ++i) own[i] *= share;
    call.lse[k * call.rows + row] = most + __builtin_logf(total);
  }

  // Columns outside, queries inside: a block of columns of all sources stays in the first cache.
  const float* shares[kQ];
  T* outs[kQ];
  auto aim = [&](int query, int number) {
    for (int j = 0; j < number; ++j) {
      shares[j] = weights + (query + j) * kPadded;
      outs[j] = static_cast<T*>(call.out) + ((query + j) * call.rows + row) * width;
    }
  };
  int64_t at = 0;
  for (; at + kB * kLanes <= width; at += kB * kLanes) {
    for (k = 0; k + kQ <= call.query_count; k += kQ) {
      aim(k, kQ);
      mix_queries<T, kQ, kB>(rows, shares, count, at, outs);
    }
    for (; k < call.query_count; ++k) {
      aim(k, 1);
      mix_queries<T, 1, kB>(rows, shares, count, at, outs);
    }
  }
  for (; at < width; at += kLanes) {
    const int64_t left = width - at < kLanes ? width - at : kLanes;
    for (k = 0; k < call.query_count; ++k) {
      aim(k, 1);
      mix_tail<T, 1>(rows, shares, count, at, left, outs);
    }
  }
}

template <class T>
void inter_rows(const InterCall& call, int64_t first, int64_t last, float* scratch) {
  for (int64_t row = first; row < last; ++row) inter_row<T>(call, row, scratch);
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
