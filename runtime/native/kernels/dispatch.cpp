// Which instruction set's kernels this CPU runs.
#include <cstring>

#include "kernels.h"
#include "routing.h"

namespace depthwire {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kTable[3];
extern const RoutingKernels kRouting;
}  // namespace avx512
namespace avx2 {
extern const Kernels kTable[3];
extern const RoutingKernels kRouting;
}  // namespace avx2
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kTable[3];
extern const RoutingKernels kRouting;
}  // namespace neon
#endif
#if !defined(__aarch64__)
namespace baseline {
extern const Kernels kTable[3];
extern const RoutingKernels kRouting;
}  // namespace baseline
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* table;
  const RoutingKernels* routing;
  bool supported;
};

const Choice* choices() {
  // __builtin_cpu_supports also asks whether the operating system saves the registers.
  static const Choice found[] = {
#if defined(__x86_64__)
      {"avx512", avx512::kTable, &avx512::kRouting,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq")},
      {"avx2", avx2::kTable, &avx2::kRouting,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#elif defined(__aarch64__)
      {"neon", neon::kTable, &neon::kRouting, true},
#endif
#if !defined(__aarch64__)
      {"baseline", baseline::kTable, &baseline::kRouting, true},
#endif
      {nullptr, nullptr, nullptr, true},
  };
  return found;
}

const Choice& best() {
  static const Choice& chosen = []() -> const Choice& {
    const Choice* choice = choices();
    while (!choice->supported) ++choice;
    return *choice;
  }();
  return chosen;
}

// Null where this CPU or this build lacks it.
const Choice* named(const char* instruction_set) {
  for (const Choice* choice = choices(); choice->name != nullptr; ++choice) {
    if (std::strcmp(choice->name, instruction_set) == 0) return choice->supported ? choice : nullptr;
  }
  return nullptr;
}

}  // namespace

const Kernels& kernels(Element element) { return best().table[static_cast<int>(element)]; }

const RoutingKernels& routing_kernels() { return *best().routing; }

const Kernels* kernels_of(const char* instruction_set, Element element) {
  const Choice* choice = named(instruction_set);
  return choice != nullptr ? choice->table + static_cast<int>(element) : nullptr;
}

const RoutingKernels* routing_kernels_of(const char* instruction_set) {
  const Choice* choice = named(instruction_set);
  return choice != nullptr ? choice->routing : nullptr;
}

const char* instruction_set() { return best().name; }

}  // namespace depthwire
