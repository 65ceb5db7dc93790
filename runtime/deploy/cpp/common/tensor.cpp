#include "tensor.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace depthwire {

namespace {

constexpr ElementFacts kFacts[] = {
    {"float64", "F64", 8, false},   {"float32", "F32", 4, false}, {"float16", "F16", 2, false},
    {"bfloat16", "BF16", 2, false}, {"int64", "I64", 8, true},    {"int32", "I32", 4, true},
    {"int16", "I16", 2, true},      {"int8", "I8", 1, true},      {"uint64", "U64", 8, true},
    {"uint32", "U32", 4, true},     {"uint16", "U16", 2, true},   {"uint8", "U8", 1, true},
    {"bool", "BOOL", 1, true},      {"?", "?", 0, true},
};
constexpr int kElements = static_cast<int>(Element::unknown);

template <class T>
T read(const std::byte* data, std::size_t index) {
  T value;
  std::memcpy(&value, data + index * sizeof(T), sizeof(T));
  return value;
}

double half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
  double size = 0;
  if (exponent == 0x1f) {
    size = fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else {
    size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 0x400, exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -size : size;
}

}  // namespace

const ElementFacts& facts(Element element) { return kFacts[static_cast<int>(element)]; }

Element element_by_name(std::string_view name) {
  int found = 0;
  while (found < kElements && kFacts[found].name != name) ++found;
  return static_cast<Element>(found);
}

Element element_by_safetensors(std::string_view name) {
  int found = 0;
  while (found < kElements && kFacts[found].safetensors != name) ++found;
  return static_cast<Element>(found);
}

bool count_of(const Shape& shape, Element element, std::size_t& count) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  std::uint64_t total = 1;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) return false;
    if (size == 0) {
      empty = true;
    } else if (total > kMost / static_cast<std::uint64_t>(size)) {
      return false;
    } else {
      total *= static_cast<std::uint64_t>(size);
    }
  }
  if (total > kMost / (facts(element).bytes + 1)) return false;
  count = empty ? 0 : static_cast<std::size_t>(total);
  return true;
}

std::string text_of(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

double value_at(Element element, const std::byte* data, std::size_t index) {
  switch (element) {
    case Element::f64:
      return read<double>(data, index);
    case Element::f32:
      return read<float>(data, index);
    case Element::f16:
      return half(read<std::uint16_t>(data, index));
    case Element::bf16:
      return std::bit_cast<float>(static_cast<std::uint32_t>(read<std::uint16_t>(data, index)) << 16);
    case Element::i64:
      return static_cast<double>(read<std::int64_t>(data, index));
    case Element::i32:
      return read<std::int32_t>(data, index);
    case Element::i16:
      return read<std::int16_t>(data, index);
    case Element::i8:
      return read<std::int8_t>(data, index);
    case Element::u64:
      return static_cast<double>(read<std::uint64_t>(data, index));
    case Element::u32:
      return read<std::uint32_t>(data, index);
    case Element::u16:
      return read<std::uint16_t>(data, index);
    case Element::u8:
      return read<std::uint8_t>(data, index);
    case Element::boolean:
      return read<std::uint8_t>(data, index) != 0 ? 1 : 0;
    case Element::unknown:
      break;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace depthwire
