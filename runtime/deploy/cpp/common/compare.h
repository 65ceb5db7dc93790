// The judgement of depthwire's verify: structure first, then max|d| by the one table of tolerances, then top-1.
#pragma once

#include <string>

#include "tensor.h"

namespace depthwire {

enum class Kind { logits, hidden, integer };

std::string_view name_of(Kind kind);

// Logits are told by their name, as in depthwire/runtime/_judge.py.
Kind kind_of(const std::string& output, Element element);

// How one output compares, over all windows so far: the worst of each number.
struct Verdict {
  std::string name;
  Element element = Element::unknown;
  Kind kind = Kind::hidden;
  Shape shape;
  std::string problem;  // why it could not be compared; empty where it could
  std::size_t windows = 0;
  bool within = true;  // max|d| <= allowed in every window
  double max_abs = 0;  // max|expected - actual| of the window where it is the largest share of what is allowed
  double allowed = 0;  // there: atol + rtol * max|expected|
  std::size_t unequal = 0;
  // Most likely token at every position, for logits. A flip is forgiven where the reference holds the two tokens
  // closer together than `allowed`.
  std::size_t positions = 0, flips = 0, beyond = 0;
  double largest_gap = 0;

  bool passed() const { return problem.empty() && windows > 0 && within && beyond == 0; }
};

// Judges one window of one output. `judged` is the type whose row of the table applies. Throws Error
// (verify.no-tolerance) where the table has none.
void judge(Verdict& verdict, const Tensor& expected, const TensorView& actual, Element judged);

}  // namespace depthwire
