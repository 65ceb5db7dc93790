#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"

namespace depthwire {

namespace {

struct Row {
  std::string_view dtype, kind;
  double rtol, atol;
};

// Made from depthwire/runtime/tolerances.py by tools/write_cpp_tolerances.py: no artefact can widen its own budget.
constexpr Row kTable[] = {
#include "tolerances.inc"
};

const Row& row_of(Element element, Kind kind) {
  for (const Row& row : kTable)
    if (row.dtype == facts(element).name && row.kind == name_of(kind)) return row;
  throw Error(Exit::usage, "verify.no-tolerance", "There is no tolerance for this kind of tensor", "tolerances.inc",
              "a row of the table", std::string(facts(element).name) + ", " + std::string(name_of(kind)),
              "Give the graph outputs of these dtypes, or add a row with its reason to the table.");
}

struct Extent {
  std::size_t nan = 0, inf = 0;
  double largest = 0;
};

Extent extent_of(Element element, const std::byte* data, std::size_t count) {
  Extent found;
  for (std::size_t i = 0; i < count; ++i) {
    const double size = std::abs(value_at(element, data, i));
    if (std::isfinite(size)) {
      found.largest = std::max(found.largest, size);
    } else {
      ++(std::isnan(size) ? found.nan : found.inf);
    }
  }
  return found;
}

std::string type_text(Element element, const Shape& shape) {
  return std::string(facts(element).name) + " " + text_of(shape);
}

std::string structure(const Verdict& verdict, const Tensor& expected, const TensorView& actual, std::size_t& count) {
  if (actual.element != verdict.element || actual.shape != expected.shape)
    return type_text(verdict.element, expected.shape) + " was expected, found " +
           type_text(actual.element, actual.shape);
  if (!count_of(expected.shape, expected.element, count) || count == 0) return "empty: no element to compare";
  return "";
}

void judge_top1(Verdict& verdict, const Tensor& expected, const TensorView& actual, std::size_t count, double allowed) {
  const auto width = static_cast<std::size_t>(expected.shape.back());
  const auto best_of = [&](Element element, const std::byte* data, std::size_t begin) {
    std::size_t best = begin;
    double highest = value_at(element, data, begin);
    for (std::size_t i = begin + 1; i < begin + width; ++i)
      if (const double value = value_at(element, data, i); value > highest) best = i, highest = value;
    return best;
  };
  for (std::size_t begin = 0; begin < count; begin += width) {
    const std::size_t wanted = best_of(expected.element, expected.data.data(), begin);
    const std::size_t found = best_of(actual.element, actual.data, begin);
    ++verdict.positions;
    if (wanted == found) continue;
    const double gap = value_at(expected.element, expected.data.data(), wanted) -
                       value_at(expected.element, expected.data.data(), found);
    ++verdict.flips;
    verdict.beyond += gap < allowed ? 0 : 1;
    verdict.largest_gap = std::max(verdict.largest_gap, gap);
  }
}

// Integers by their bytes: int64 beyond 2^53 is not exact in fp64.
bool same(const Tensor& expected, const TensorView& actual, std::size_t index) {
  const std::size_t bytes = facts(expected.element).bytes;
  return std::memcmp(expected.data.data() + index * bytes, actual.data + index * bytes, bytes) == 0;
}

}  // namespace

std::string_view name_of(Kind kind) {
  return kind == Kind::logits ? "logits" : kind == Kind::hidden ? "hidden" : "integer";
}

Kind kind_of(const std::string& output, Element element) {
  if (facts(element).exact) return Kind::integer;
  return output == "logits" || output.ends_with("_logits") || output.ends_with(".logits") ? Kind::logits : Kind::hidden;
}

void judge(Verdict& verdict, const Tensor& expected, const TensorView& actual, Element judged) {
  ++verdict.windows;
  if (!verdict.problem.empty()) return;
  std::size_t count = 0;
  verdict.problem = structure(verdict, expected, actual, count);
  if (!verdict.problem.empty()) return;
  const Extent e = extent_of(expected.element, expected.data.data(), count);
  const Extent a = extent_of(actual.element, actual.data, count);
  if (e.nan + e.inf + a.nan + a.inf != 0) {
    verdict.problem = "not finite: expected has " + std::to_string(e.nan) + " NaN and " + std::to_string(e.inf) +
                      " Inf, actual has " + std::to_string(a.nan) + " NaN and " + std::to_string(a.inf) + " Inf";
    return;
  }
  const bool exact = verdict.kind == Kind::integer;
  double max_abs = 0;
  std::size_t unequal = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double left = value_at(expected.element, expected.data.data(), i),
                 right = value_at(actual.element, actual.data, i);
    unequal += exact ? !same(expected, actual, i) : left != right;
    max_abs = std::max(max_abs, std::abs(left - right));
  }
  if (!std::isfinite(max_abs)) {
    verdict.problem = "the difference overflows float64";
    return;
  }
  double allowed = 0;
  if (!exact) {
    const Row& row = row_of(judged, verdict.kind);
    allowed = row.atol + row.rtol * e.largest;
  }
  const bool first = verdict.windows == 1;
  // The larger share of its budget; cross-multiplied, as either budget may be 0.
  if (first || max_abs * verdict.allowed > verdict.max_abs * allowed) {
    verdict.max_abs = max_abs;
    verdict.allowed = allowed;
  }
  verdict.unequal += unequal;
  verdict.within = verdict.within && (exact ? unequal == 0 : max_abs <= allowed);
  if (verdict.kind == Kind::logits && !expected.shape.empty()) judge_top1(verdict, expected, actual, count, allowed);
}

}  // namespace depthwire
