// Which instruction set's kernels this CPU runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdint>
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

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avx512 = false;
};

// Asked of the CPU itself: __builtin_cpu_supports answers no to everything in what Zig links.
Cpu this_cpu() {
  const auto has = [](std::uint32_t word, std::uint32_t bits) { return (word & bits) == bits; };
  Cpu cpu;
  std::uint32_t a = 0, b = 0, c = 0, d = 0, features = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !has(c, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C)) return cpu;
  if (__get_cpuid_count(7, 0, &a, &features, &c, &d) == 0) return cpu;
  // Which registers the operating system saves: SSE and AVX; for AVX-512 the masks and both halves of its own too.
  std::uint32_t saved = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  cpu.avx2 = has(saved, 0x06) && has(features, bit_AVX2);
  cpu.avx512 = cpu.avx2 && has(saved, 0xe6) && has(features, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ);
  return cpu;
}
#endif

const Choice* choices() {
#if defined(__x86_64__)
  static const Cpu cpu = this_cpu();
#endif
  static const Choice found[] = {
#if defined(__x86_64__)
      {"avx512", avx512::kTable, &avx512::kRouting, cpu.avx512},
      {"avx2", avx2::kTable, &avx2::kRouting, cpu.avx2},
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
