// Surprise scores; see routing.h. The sums over the width are what they cost: each value is fetched once.
#pragma once

#include "routing.h"
#include "simd.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

// Sums of delta^2 and (delta - prior)^2 of one token.
template <class T>
inline void surprise_sum(const T* delta, const T* prior, int64_t width, float* sums) {
  F32 square[2] = {}, change[2] = {};
  auto one = [&](F32 actual, F32 expected, int way) __attribute__((always_inline)) {
    const F32 difference = actual - expected;
    square[way] += actual * actual;
    change[way] += difference * difference;
  };
  int64_t at = 0;
  for (; at + 2 * kLanes <= width; at += 2 * kLanes) {
    one(load(delta + at), load(prior + at), 0);
    one(load(delta + at + kLanes), load(prior + at + kLanes), 1);
  }
  for (; at < width; at += kLanes) {
    const int64_t left = width - at < kLanes ? width - at : kLanes;
    one(load_first(delta + at, left), load_first(prior + at, left), 0);
  }
  sums[0] = sum_lanes(square[0] + square[1]);
  sums[1] = sum_lanes(change[0] + change[1]);
}

inline void surprise_sum(const double* delta, const double* prior, int64_t width, double* sums) {
  double square = 0, change = 0;
  for (int64_t at = 0; at < width; ++at) {
    const double difference = delta[at] - prior[at];
    square += delta[at] * delta[at];
    change += difference * difference;
  }
  sums[0] = square;
  sums[1] = change;
}

// D_st, and CE = D_st - (D_ch - offset). Padding may hold anything, and is not looked at.
template <class T, class Rank>
void surprise_sums(const SurpriseCall& call, int64_t first, int64_t last) {
  Rank* const still = static_cast<Rank*>(call.static_surprise);
  Rank* const expected_change = static_cast<Rank*>(call.rank);
  const Rank offset = static_cast<Rank>(call.offset), width = static_cast<Rank>(call.width);
  for (int64_t token = first; token < last; ++token) {
    Rank sums[2] = {0, 0};
    if (call.valid[token] != 0) {
      const int64_t at = token * call.width;
      surprise_sum(static_cast<const T*>(call.delta) + at, static_cast<const T*>(call.prior) + at, call.width, sums);
    }
    still[token] = sums[0] / width;
    expected_change[token] = still[token] - (sums[1] / width - offset);
  }
}

// The mean of the last `window` values up to each; what comes before the first valid one counts as that one. Windows
// are cut where blocks of them meet, into the end of one block and the beginning of the next: only additions, so that
// neither rounding nor an infinity outlasts its window.
template <class Rank>
inline void moving_average(const Rank* values, const uint8_t* valid, int64_t tokens, int64_t window, double* mean,
                           double* tail) {
  int64_t lead = 0;
  while (lead < tokens && valid[lead] == 0) ++lead;
  const double before = lead < tokens ? static_cast<double>(values[lead]) : 0;
  const auto value = [&](int64_t i) { return valid[i] != 0 ? static_cast<double>(values[i]) : before; };
  for (int64_t i = 0; i < lead; ++i) mean[i] = before;
  for (int64_t first = lead; first < tokens; first += window) {
    const int64_t count = tokens - first < window ? tokens - first : window;
    if (first > lead) {
      // tail[i]: the sum of the previous block from i on
      tail[window] = 0;
      for (int64_t i = window - 1; i > 0; --i) tail[i] = tail[i + 1] + value(first - window + i);
    }
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t missing = window - 1 - i;  // of the window's tokens, those in front of this block
      sum += value(first + i);
      const double front = first > lead ? tail[i + 1] : missing == 0 ? 0 : static_cast<double>(missing) * before;
      mean[first + i] = (front + sum) / static_cast<double>(window);
    }
  }
}

// log(1 + u) for u in [0, 1]; Cephes' polynomial for logarithms around 1. Relative error at most 2 units in the last
// place.
inline F32 log1p_of_fraction(F32 u) {
  const U32 large = (U32)(u > 0.41421356f);  // 1 + u beyond sqrt(2): log(2) + log((1 + u) / 2)
  const F32 x = large ? (u - 1.0f) * 0.5f : u;
  const F32 square = x * x;
  F32 p = x * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const F32 log = x + (square * x * p - 0.5f * square);
  return large ? log + 0.693147181f : log;
}

// log(1 + e^z), without overflow: max(z, 0) + log(1 + e^-|z|).
inline F32 softplus(F32 z) {
  const F32 zero = {};
  const F32 positive = z > zero ? z : zero;  // NaN comes in with the other term
  return positive + log1p_of_fraction(exp_nonpositive(z > zero ? -z : z));
}
inline double softplus(double z) { return (z > 0 ? z : 0) + __builtin_log1p(__builtin_exp(z > 0 ? -z : z)); }

inline void ranks(const SurpriseCall& call, const float* still, const double* mean, const uint8_t* valid, float* rank) {
  const float m_cu = static_cast<float>(call.m_cu);
  const F32 beta_ce = splat(static_cast<float>(call.beta_ce)), beta_cu = splat(static_cast<float>(call.beta_cu));
  for (int64_t at = 0; at < call.tokens; at += kLanes) {
    const int64_t left = call.tokens - at < kLanes ? call.tokens - at : kLanes;
    float average[kLanes] = {};
    for (int64_t i = 0; i < left; ++i) average[i] = static_cast<float>(mean[at + i]);
    const F32 unexpected_change = load_first(still + at, left) - m_cu * load(average);
    const F32 expected_change = load_first(rank + at, left);
    store_first(rank + at, softplus(beta_ce * expected_change) + softplus(beta_cu * unexpected_change), left);
  }
  for (int64_t i = 0; i < call.tokens; ++i) rank[i] = valid[i] != 0 ? rank[i] : 0;
}

inline void ranks(const SurpriseCall& call, const double* still, const double* mean, const uint8_t* valid,
                  double* rank) {
  for (int64_t i = 0; i < call.tokens; ++i) {
    const double score = softplus(call.beta_ce * rank[i]) + softplus(call.beta_cu * (still[i] - call.m_cu * mean[i]));
    rank[i] = valid[i] != 0 ? score : 0;
  }
}

template <class Rank>
void surprise_rank(const SurpriseCall& call, int64_t row, double* scratch) {
  const int64_t at = row * call.tokens;
  const Rank* const still = static_cast<const Rank*>(call.static_surprise) + at;
  moving_average(still, call.valid + at, call.tokens, call.window, scratch, scratch + call.tokens);
  ranks(call, still, scratch, call.valid + at, static_cast<Rank*>(call.rank) + at);
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
