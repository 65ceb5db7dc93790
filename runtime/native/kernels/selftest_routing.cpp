// The routing kernels against their rules one token at a time, for every instruction set; see selftest.cpp.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "routing.h"
#include "selftest.h"

namespace {

using depthwire::BudgetCall;
using depthwire::SelectCall;
using depthwire::SurpriseCall;

constexpr double kLowest = -static_cast<double>(std::numeric_limits<float>::max());
constexpr double kTiny = std::numeric_limits<float>::min();

double canonical(double score) {
  if (std::isnan(score) || score < kLowest) return kLowest;
  return std::fabs(score) < kTiny ? 0 : score;
}

template <class T>
struct Selection {
  std::int64_t tokens, slots, windows;
  std::vector<T> score;
  std::vector<std::uint8_t> valid, taken;
  std::vector<std::int64_t> index;

  Selection(std::mt19937& generator, std::int64_t tokens, std::int64_t slots, std::int64_t windows, int kind)
      : tokens(tokens), slots(slots), windows(windows), taken(slots), index(slots) {
    constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    constexpr float odd[] = {inf, -inf, nan, -nan, 0.0f, -0.0f, 1e-45f, -1e-40f, 1.2e-38f, -3.4e38f, 1, 1, 2, -2};
    for (std::int64_t i = 0; i < tokens; ++i) {
      const float plain = static_cast<float>(generator() / 4294967296.0 - 0.5);
      score.push_back(kind == 0 ? plain : kind == 1 ? odd[generator() % std::size(odd)] : T{0.25});
      valid.push_back(generator() % 4 != 0 || kind == 0);
    }
  }

  SelectCall call() { return {score.data(), valid.data(), tokens, slots, windows, index.data(), taken.data()}; }

  // Whether the slots hold the selected tokens, then the first others.
  bool holds(const std::vector<bool>& selected) const {
    std::vector<std::int64_t> wanted;
    for (const bool flag : {true, false}) {
      for (std::int64_t i = 0; i < tokens; ++i) {
        if (selected[static_cast<std::size_t>(i)] == flag) wanted.push_back(i);
      }
    }
    wanted.resize(static_cast<std::size_t>(slots));
    const auto count = std::count(selected.begin(), selected.end(), true);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
      if (taken[static_cast<std::size_t>(slot)] != (slot < count)) return false;
    }
    return wanted == index;
  }

  bool top_k(const depthwire::RoutingKernels& kernels) {
    std::vector<T> scratch(static_cast<std::size_t>(tokens));
    kernels.select[sizeof(T) == 8](call(), 0, scratch.data());
    std::vector<bool> selected(static_cast<std::size_t>(tokens));
    const std::int64_t size = tokens / windows;
    for (std::int64_t first = 0; first < tokens; first += size) {
      std::vector<std::size_t> order;
      for (std::int64_t i = first; i < first + size; ++i) {
        if (valid[static_cast<std::size_t>(i)] != 0) order.push_back(static_cast<std::size_t>(i));
      }
      std::stable_sort(order.begin(), order.end(),
                       [&](std::size_t a, std::size_t b) { return canonical(score[a]) > canonical(score[b]); });
      const auto most = static_cast<std::size_t>(slots / windows);
      for (std::size_t i = 0; i < std::min(most, order.size()); ++i) selected[order[i]] = true;
    }
    return holds(selected);
  }

  bool budget(const depthwire::RoutingKernels& kernels, double threshold, std::int64_t numerator,
              std::int64_t denominator, std::int64_t margin, std::int64_t seen, std::int64_t before) {
    const std::int64_t state[] = {seen, before};
    std::int64_t state_out[2];
    const BudgetCall budget{call(), threshold, numerator, denominator, margin, state, state_out};
    kernels.select_budget[sizeof(T) == 8](budget, 0);
    std::vector<bool> selected(static_cast<std::size_t>(tokens));
    std::int64_t count = before;
    for (std::size_t i = 0; i < selected.size(); ++i) {
      if (valid[i] == 0) continue;
      ++seen;
      const std::int64_t cap = std::min(numerator * seen / denominator + margin, before + slots);
      if (canonical(score[i]) < threshold || count >= cap) continue;
      selected[i] = true;
      ++count;
    }
    return holds(selected) && state_out[0] == seen && state_out[1] == count;
  }
};

template <class T>
int select_failures(const depthwire::RoutingKernels& kernels, std::mt19937& generator, int& checked) {
  int failed = 0;
  for (const std::int64_t tokens : {1, 7, 64, 100, 513}) {
    for (const std::int64_t slots : {std::int64_t{1}, (tokens + 1) / 2, tokens}) {
      for (int kind = 0; kind < 3; ++kind) {
        Selection<T> one(generator, tokens, slots, 1, kind);
        failed += !one.top_k(kernels);
        failed += !one.budget(kernels, -0.25, 1, 3, 1, 0, 0);
        failed += !one.budget(kernels, -std::numeric_limits<double>::infinity(), 5, 7, -2, 40, 26);
        checked += 3;
      }
    }
  }
  for (int kind = 0; kind < 3; ++kind) {
    Selection<T> one(generator, 96, 24, 4, kind);
    failed += !one.top_k(kernels);
    ++checked;
  }
  return failed;
}

// Largest error of the surprise scores, as a part of the largest of them; `element` as in RoutingKernels.
template <class T, class Rank>
double surprise_error(const depthwire::RoutingKernels& kernels, int element, std::mt19937& generator, int tokens,
                      int width, int lead, int window, double beta) {
  const auto count = static_cast<std::size_t>(tokens), values = count * static_cast<std::size_t>(width);
  std::vector<T> delta(values), prior(values);
  for (std::size_t i = 0; i < values; ++i) {
    const double size = 1.0 + static_cast<double>(i / static_cast<std::size_t>(width) % 5);
    delta[i] = static_cast<T>((generator() / 4294967296.0 - 0.5) * size);
    prior[i] = static_cast<T>((generator() / 4294967296.0 - 0.5) * size);
  }
  std::vector<std::uint8_t> valid(count, 1);
  std::fill_n(valid.begin(), lead, 0);
  std::vector<Rank> still(count), rank(count);
  SurpriseCall call{delta.data(), prior.data(), tokens, width,    window,       valid.data(),
                    0.0247,       1.1,          beta,   beta / 2, still.data(), rank.data()};
  std::vector<double> scratch(depthwire::surprise_scratch(call));
  kernels.surprise_sums[element](call, 0, tokens);
  kernels.surprise_rank[sizeof(Rank) == 8](call, 0, scratch.data());
  std::vector<double> squares;
  double worst = 0, largest = 0;
  for (int t = 0; t < tokens; ++t) {
    double square = 0, change = 0;
    for (int j = 0; j < width; ++j) {
      const auto at = static_cast<std::size_t>(t) * static_cast<std::size_t>(width) + static_cast<std::size_t>(j);
      square += static_cast<double>(delta[at]) * delta[at] / width;
      change += std::pow(static_cast<double>(delta[at]) - prior[at], 2) / width;
    }
    double exact = 0;
    if (t >= lead) {
      squares.push_back(square);
      double mean = 0;
      for (int back = 0; back < window; ++back) {
        const int from = static_cast<int>(squares.size()) - 1 - back;
        mean += squares[static_cast<std::size_t>(std::max(from, 0))] / window;
      }
      const auto softplus = [](double z) { return std::fmax(z, 0) + std::log1p(std::exp(-std::fabs(z))); };
      exact = softplus(beta * (square - (change - 0.0247))) + softplus(beta / 2 * (square - 1.1 * mean));
    }
    const double error = std::fabs(exact - static_cast<double>(rank[static_cast<std::size_t>(t)]));
    worst = error <= worst ? worst : error;  // NaN counts
    largest = std::fmax(largest, exact);
  }
  return worst / largest;
}

}  // namespace

int check_routing(const char* instruction_set) {
  const depthwire::RoutingKernels* const kernels = depthwire::routing_kernels_of(instruction_set);
  if (kernels == nullptr) return 0;
  std::mt19937 generator(2);
  int checked = 0;
  int failed = select_failures<float>(*kernels, generator, checked);
  failed += select_failures<double>(*kernels, generator, checked);
  for (const int tokens : {1, 6, 33, 150}) {
    for (const int window : {1, 5, 33, 400}) {
      const int lead = tokens > 20 ? 7 : 0;
      for (const int width : {1, 77, 576}) {
        // Sums of the width in fp32, and CE, a difference of two of them.
        const double allowed = 8 * std::sqrt(static_cast<double>(width)) * 0x1p-24;
        failed += !(surprise_error<float, float>(*kernels, 0, generator, tokens, width, lead, window, 0.5) <= allowed);
        failed += !(surprise_error<float, float>(*kernels, 0, generator, tokens, width, lead, window, 30) <= allowed);
        failed += !(surprise_error<double, double>(*kernels, 3, generator, tokens, width, lead, window, 30) <= 1e-13);
        checked += 3;
      }
    }
  }
  std::printf("%s routing: %d comparisons, %d failed\n", instruction_set, checked, failed);
  return failed;
}
