// Runs every kernel of every instruction set that this CPU has against the formulas in fp64, and prints one line each.
// For machines without Python or ONNX Runtime: cross-compiled builds run it under qemu-user. Exit status 0 if all hold.
#include "selftest.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using depthwire::Element;

namespace {

// Values of an element type, as stored and as fp64.
struct Values {
  std::vector<std::uint8_t> stored;
  std::vector<double> exact;
};

double unit_of(Element element) {
  return element == Element::f32 ? 0x1p-24 : element == Element::f16 ? 0x1p-11 : 0x1p-8;
}

float widened(Element element, std::uint16_t bits) {
  if (element == Element::bf16) {
    const std::uint32_t raw = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &raw, sizeof value);
    return value;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

std::size_t bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

double read_back(Element element, const std::vector<std::uint8_t>& stored, std::size_t at) {
  if (element == Element::f32) {
    float value;
    std::memcpy(&value, stored.data() + 4 * at, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, stored.data() + 2 * at, 2);
  return widened(element, bits);
}

std::mt19937 generator(1);  // the same numbers everywhere

// Random values around +-magnitude that the element type holds exactly: its own bit patterns.
Values draw(Element element, std::size_t count, double magnitude) {
  Values values{std::vector<std::uint8_t>(count * bytes_of(element)), std::vector<double>(count)};
  for (std::size_t i = 0; i < count; ++i) {
    const double uniform = generator() / 4294967296.0 * 4 - 2;
    const float wanted = static_cast<float>(uniform * magnitude);
    if (element == Element::f32) {
      std::memcpy(values.stored.data() + 4 * i, &wanted, 4);
    } else {
      std::uint16_t bits;
      if (element == Element::bf16) {
        std::uint32_t raw;
        std::memcpy(&raw, &wanted, 4);
        bits = static_cast<std::uint16_t>(raw >> 16);
      } else {
        int exponent;
        const double fraction = std::frexp(std::fabs(wanted), &exponent);  // [0.5, 1)
        const int biased = exponent + 14;
        const int whole = (biased << 10) | (static_cast<int>(fraction * 2048) & 1023);
        bits = static_cast<std::uint16_t>(biased < 1 ? static_cast<int>(std::fabs(wanted) * 0x1p24f) : whole);
        if (wanted < 0) bits |= 0x8000;
      }
      std::memcpy(values.stored.data() + 2 * i, &bits, 2);
    }
    values.exact[i] = read_back(element, values.stored, i);
  }
  return values;
}

struct Shape {
  int count, rows;
  std::int64_t width;
};

struct Checker {
  const char* instruction_set;
  Element element;
  const depthwire::Kernels* kernels;
  int failed = 0, checked = 0;

  // Every 16-bit pattern: widened, and as the only source of a read, whose output it must be again, bit for bit.
  void conversions() {
    if (element == Element::f32) return;
    const Shape shape{1, 1024, 64};
    std::vector<std::uint16_t> patterns(65536), back(65536);
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      patterns[i] = static_cast<std::uint16_t>(i);
      const int exponent = element == Element::f16 ? (patterns[i] >> 10) & 31 : (patterns[i] >> 7) & 255;
      // Beyond them are infinities, NaN, and bfloat16 whose squares overflow fp32.
      if (exponent > (element == Element::f16 ? 30 : 180)) patterns[i] = 0;
    }
    std::vector<float> wide(patterns.size());
    kernels->widen(patterns.data(), static_cast<std::int64_t>(patterns.size()), wide.data());
    std::vector<double> wanted, found(wide.begin(), wide.end());
    for (const std::uint16_t bits : patterns) wanted.push_back(widened(element, bits));
    const std::vector<float> query(64, 0.5f);
    const void* source = patterns.data();
    depthwire::ReadCall call{};
    call.sources = &source;
    call.count = 1;
    call.width = shape.width;
    call.query = query.data();
    call.out = back.data();
    call.eps = 1e-6f;
    std::vector<float> scratch(depthwire::read_scratch(call));
    kernels->read(call, 0, shape.rows, scratch.data());
    checked += 2;
    if (wanted != found) ++failed, std::printf("%s: 16-bit values are widened wrongly\n", instruction_set);
    bool same = true;
    for (std::size_t i = 0; i < back.size(); ++i)
      same = same && (back[i] == patterns[i] || (patterns[i] | back[i]) == 0x8000);
    if (!same) ++failed, std::printf("%s: 16-bit values are not stored as they were read\n", instruction_set);
  }

  // Allowed: one rounding to the element type, and fp32 arithmetic over `width` values.
  void compare(const char* what, const Shape& shape, const std::vector<double>& wanted,
               const std::vector<double>& found) {
    double largest = 0, worst = 0;
    for (const double value : wanted) largest = std::fmax(largest, std::fabs(value));
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const double error = std::fabs(wanted[i] - found[i]);
      worst = error <= worst ? worst : error;  // NaN counts
    }
    const double arithmetic = std::fmax(32, 4 * std::sqrt(static_cast<double>(shape.width))) * 0x1p-24;
    ++checked;
    const double subnormal = element == Element::f16 ? 0x1p-24 : 0;
    if (worst <= largest * (unit_of(element) + arithmetic) + subnormal) return;
    ++failed;
    std::printf("%s element %d: %s, %d sources, %d rows, width %ld: off by %g of %g\n", instruction_set,
                static_cast<int>(element), what, shape.count, shape.rows, static_cast<long>(shape.width), worst,
                largest);
  }

  std::vector<double> values(const std::vector<std::uint8_t>& stored, std::size_t count) const {
    std::vector<double> found(count);
    for (std::size_t i = 0; i < count; ++i) found[i] = read_back(element, stored, i);
    return found;
  }

  struct Mixed {
    std::vector<double> out;
    double lse;
  };

  // The formulas of kernels.h for one row.
  static Mixed exact(const std::vector<const double*>& sources, const double* query, std::int64_t width, double eps,
                     double scale, double last_bias, bool unit, const double* known, double known_logit) {
    std::vector<double> logits, factors;
    for (const double* source : sources) {
      double square = 0, product = 0;
      for (std::int64_t j = 0; j < width; ++j) square += source[j] * source[j], product += source[j] * query[j];
      const double rstd = 1 / std::sqrt(square / static_cast<double>(width) + eps);
      logits.push_back(scale * product * rstd);
      factors.push_back(unit ? rstd : 1);
    }
    if (!logits.empty()) logits.back() += last_bias;
    std::vector<const double*> values = sources;
    if (known != nullptr) values.push_back(known), logits.push_back(known_logit), factors.push_back(1);
    double most = logits[0], total = 0;
    for (const double logit : logits) most = std::fmax(most, logit);
    for (const double logit : logits) total += std::exp(logit - most);
    Mixed mixed{std::vector<double>(static_cast<std::size_t>(width)), most + std::log(total)};
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double weight = std::exp(logits[i] - most) / total * factors[i];
      for (std::int64_t j = 0; j < width; ++j) mixed.out[static_cast<std::size_t>(j)] += weight * values[i][j];
    }
    return mixed;
  }

  void read(const Shape& shape, bool add, bool norm, bool unit, bool mixed, double magnitude) {
    const auto size = static_cast<std::size_t>(shape.rows * shape.width), width = static_cast<std::size_t>(shape.width);
    std::vector<Values> sources;
    for (int i = 0; i < shape.count; ++i) sources.push_back(draw(element, size, magnitude));
    const Values delta = draw(element, size, magnitude), known = draw(element, size, magnitude);
    const Values query = draw(Element::f32, width, 2 / std::sqrt(static_cast<double>(width)));
    const Values gain = draw(Element::f32, width, 1),
                 logit = draw(Element::f32, static_cast<std::size_t>(shape.rows), 1);
    std::vector<const void*> pointers;
    for (const Values& source : sources) pointers.push_back(source.stored.data());
    std::vector<std::uint8_t> out(size * bytes_of(element)), sum(size * bytes_of(element));
    depthwire::ReadCall call{};
    call.sources = pointers.data();
    call.count = shape.count;
    call.width = shape.width;
    call.query = reinterpret_cast<const float*>(query.stored.data());
    call.norm_weight = norm ? reinterpret_cast<const float*>(gain.stored.data()) : nullptr;
    call.delta = add ? delta.stored.data() : nullptr;
    call.sum = sum.data();
    call.mixed = mixed ? known.stored.data() : nullptr;
    call.mixed_logit = reinterpret_cast<const float*>(logit.stored.data());
    call.out = out.data();
    call.eps = 1e-6f, call.scale = 0.5f, call.last_bias = 0.25f, call.norm_eps = 1e-6f, call.unit = unit;
    std::vector<float> scratch(depthwire::read_scratch(call));
    kernels->read(call, 0, shape.rows, scratch.data());

    if (add) {
      std::vector<double> wanted(size);
      for (std::size_t i = 0; i < size; ++i) wanted[i] = sources.back().exact[i] + delta.exact[i];
      compare("sum", shape, wanted, values(sum, size));
      sources.back().exact = values(sum, size);
    }
    std::vector<double> wanted;
    for (int r = 0; r < shape.rows; ++r) {
      const std::size_t at = static_cast<std::size_t>(r) * width;
      std::vector<const double*> rows;
      for (const Values& source : sources) rows.push_back(source.exact.data() + at);
      Mixed row = exact(rows, query.exact.data(), shape.width, 1e-6f, 0.5, 0.25, unit,
                        mixed ? known.exact.data() + at : nullptr, logit.exact[static_cast<std::size_t>(r)]);
      if (norm) {
        double square = 0;
        for (const double value : row.out) square += value * value;
        const double factor = 1 / std::sqrt(square / static_cast<double>(width) + 1e-6f);
        for (std::size_t j = 0; j < width; ++j) row.out[j] *= factor * gain.exact[j];
      }
      wanted.insert(wanted.end(), row.out.begin(), row.out.end());
    }
    compare(mixed ? "merge" : "read", shape, wanted, values(out, size));
  }

  void inter(const Shape& shape, int query_count) {
    const auto size = static_cast<std::size_t>(shape.rows * shape.width), width = static_cast<std::size_t>(shape.width);
    std::vector<Values> sources;
    std::vector<const void*> pointers;
    for (int i = 0; i < shape.count; ++i) sources.push_back(draw(element, size, 1));
    for (const Values& source : sources) pointers.push_back(source.stored.data());
    const auto queries = static_cast<std::size_t>(query_count), rows = static_cast<std::size_t>(shape.rows);
    const Values query = draw(Element::f32, width * queries, 2 / std::sqrt(static_cast<double>(width)));
    std::vector<std::uint8_t> out(queries * size * bytes_of(element));
    std::vector<float> lse(queries * rows);
    depthwire::InterCall call{};
    call.sources = pointers.data();
    call.count = shape.count;
    call.width = shape.width;
    call.rows = shape.rows;
    call.queries = reinterpret_cast<const float*>(query.stored.data());
    call.query_count = query_count;
    call.out = out.data();
    call.lse = lse.data();
    call.eps = 1e-6f, call.scale = 0.5f;
    std::vector<float> scratch(depthwire::inter_scratch(call));
    kernels->inter(call, 0, shape.rows, scratch.data());
    std::vector<double> wanted, logits;
    for (std::size_t k = 0; k < queries; ++k) {
      for (std::size_t r = 0; r < rows; ++r) {
        std::vector<const double*> own;
        for (const Values& source : sources) own.push_back(source.exact.data() + r * width);
        const Mixed row = exact(own, query.exact.data() + k * width, shape.width, 1e-6f, 0.5, 0, false, nullptr, 0);
        wanted.insert(wanted.end(), row.out.begin(), row.out.end());
        logits.push_back(row.lse);
      }
    }
    compare("inter", shape, wanted, values(out, queries * size));
    compare("lse", shape, logits, std::vector<double>(lse.begin(), lse.end()));
  }
};

}  // namespace

int main() {
  int failed = 0;
  for (const char* name : {"avx512", "avx2", "neon", "baseline"}) {
    for (const Element element : {Element::f32, Element::f16, Element::bf16}) {
      Checker checker{name, element, depthwire::kernels_of(name, element)};
      if (checker.kernels == nullptr) continue;
      for (const Shape shape : {Shape{1, 3, 64}, Shape{2, 3, 77}, Shape{5, 17, 33}, Shape{9, 3, 576}, Shape{9, 1, 1},
                                Shape{61, 2, 100}, Shape{129, 1, 64}, Shape{256, 2, 19}, Shape{3, 2, 7168}}) {
        for (int flags = 0; flags < 8; ++flags) {
          checker.read(shape, flags & 1, flags & 2, flags & 4, false, 1);
          if (!(flags & 4)) checker.read(shape, flags & 1, flags & 2, false, true, 1);
        }
        checker.read(shape, true, true, false, false, 1e3);
        checker.read(shape, true, false, false, false, 1e-6);
        checker.inter(shape, 1);
        checker.inter(shape, 7);
      }
      checker.conversions();
      checker.read(Shape{0, 3, 77}, false, false, false, true, 1);
      checker.read(Shape{0, 3, 77}, false, true, false, true, 1);
      std::printf("%s element %d: %d comparisons, %d failed\n", name, static_cast<int>(element), checker.checked,
                  checker.failed);
      failed += checker.failed;
    }
    failed += check_routing(name);
  }
  return failed == 0 ? 0 : 1;
}
