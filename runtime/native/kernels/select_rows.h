// Selection of tokens; see routing.h. Plain loops, which the compiler makes vectors of.
#pragma once

#include "routing.h"
#include "simd.h"

namespace depthwire::DEPTHWIRE_ISA {
namespace {

inline float canonical_of(float score) {
  // In integers throughout, so that no mode that flushes denormals shows.
  uint32_t raw = bits<uint32_t>(score);
  const uint32_t magnitude = raw & 0x7fffffffu;
  raw = magnitude > 0x7f800000u || raw == 0xff800000u ? 0xff7fffffu : raw;  // NaN, -inf: -FLT_MAX
  return bits<float>(magnitude < 0x00800000u ? 0u : raw);
}

inline double canonical_of(double score) {
  const double lowest = -0x1.fffffep127;  // the constants of fp32 also here
  const double above = score >= lowest ? score : lowest;
  return above < 0x1p-126 && above > -0x1p-126 ? 0.0 : above;
}

// Canonical scores as unsigned integers of the same order. All are above 0, which stands for padding.
inline uint32_t key_of(float score) {
  const uint32_t raw = bits<uint32_t>(canonical_of(score));
  return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}
inline uint64_t key_of(double score) {
  const uint64_t raw = bits<uint64_t>(canonical_of(score));
  return raw >> 63 ? ~raw : raw | 0x8000000000000000u;
}

template <class Key>
inline int64_t at_least(const Key* keys, int64_t count, Key key) {
  Key found = 0;  // of the keys' width: whole vectors of them
  for (int64_t i = 0; i < count; ++i) found += keys[i] >= key;
  return static_cast<int64_t>(found);
}

// The largest key that at least `wanted` keys reach, bit by bit. Takes the same time whatever the scores are.
template <class Key>
inline Key threshold_of(const Key* keys, int64_t count, int64_t wanted) {
  Key key = 0;
  for (Key bit = Key{1} << (8 * sizeof(Key) - 1); bit != 0; bit >>= 1) {
    if (at_least(keys, count, key | bit) >= wanted) key |= bit;
  }
  return key;
}

// Places from `selected` on: the smallest tokens that are not among the selected ones, which are in ascending order.
inline void fill_up(const SelectCall& call, int64_t row, int64_t selected) {
  int64_t* const index = call.index + row * call.slots;
  uint8_t* const taken = call.taken + row * call.slots;
  memset(taken, 1, static_cast<size_t>(selected));
  memset(taken + selected, 0, static_cast<size_t>(call.slots - selected));
  int64_t token = 0, next = 0;
  for (int64_t slot = selected; slot < call.slots; ++token) {
    if (next < selected && index[next] == token) {
      ++next;
    } else {
      index[slot++] = token;
    }
  }
}

template <class T, class Key>
void select_row(const SelectCall& call, int64_t row, void* scratch) {
  if (call.slots == 0) return;
  const T* const score = static_cast<const T*>(call.score) + row * call.tokens;
  const uint8_t* const valid = call.valid + row * call.tokens;
  int64_t* const index = call.index + row * call.slots;
  Key* const keys = static_cast<Key*>(scratch);
  const int64_t size = call.tokens / call.windows, places = call.slots / call.windows;
  int64_t selected = 0;
  for (int64_t first = 0; first < call.tokens; first += size) {
    for (int64_t i = 0; i < size; ++i) keys[i] = valid[first + i] ? key_of(score[first + i]) : Key{0};
    const int64_t there = at_least(keys, size, Key{1});
    const int64_t wanted = there < places ? there : places;
    if (wanted == 0) continue;
    const Key least = threshold_of(keys, size, wanted);
    // All above the threshold, and of those on it the first ones, as many as are left.
    int64_t equal = wanted - (least == static_cast<Key>(-1) ? 0 : at_least(keys, size, static_cast<Key>(least + 1)));
    for (int64_t i = 0, end = selected + wanted; selected < end; ++i) {
      const bool on_it = keys[i] == least;
      index[selected] = first + i;
      selected += (keys[i] > least) | (on_it & (equal > 0));
      equal -= on_it;
    }
  }
  fill_up(call, row, selected);
}

__extension__ typedef __int128 Int128;

template <class T>
void select_budget_row(const BudgetCall& budget, int64_t row) {
  const SelectCall& call = budget.select;
  const T* const score = static_cast<const T*>(call.score) + row * call.tokens;
  const uint8_t* const valid = call.valid + row * call.tokens;
  int64_t* const index = call.index + row * call.slots;
  const int64_t seen_before = budget.state[2 * row], before = budget.state[2 * row + 1];
  // numerator * seen / denominator, rounded down, advances by a whole part and a remainder: no division in the loop.
  const Int128 start = static_cast<Int128>(budget.numerator) * seen_before;
  const int64_t whole = budget.numerator / budget.denominator;
  const auto denominator = static_cast<uint64_t>(budget.denominator);
  const uint64_t part = static_cast<uint64_t>(budget.numerator) % denominator;
  auto remainder = static_cast<uint64_t>(start % budget.denominator);
  Int128 room = start / budget.denominator + budget.margin - before;  // for selected tokens of this call
  int64_t selected = 0, seen = 0;
  for (int64_t i = 0; i < call.tokens; ++i) {
    if (valid[i] == 0) continue;
    ++seen;
    remainder += part;
    const bool carry = remainder >= denominator;
    remainder -= carry ? denominator : 0;
    room += whole;
    room += carry;
    if (selected == call.slots || selected >= room) continue;
    if (static_cast<double>(canonical_of(score[i])) >= budget.threshold) index[selected++] = i;
  }
  budget.state_out[2 * row] = seen_before + seen;
  budget.state_out[2 * row + 1] = before + selected;
  fill_up(call, row, selected);
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
