// Element types under their three names, and tensors of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace depthwire {

enum class Element { f64, f32, f16, bf16, i64, i32, i16, i8, u64, u32, u16, u8, boolean, unknown };

using Shape = std::vector<std::int64_t>;

struct ElementFacts {
  std::string_view name;         // in the manifest: numpy's
  std::string_view safetensors;  // in the header of the goldens
  std::size_t bytes;
  bool exact;  // integers and booleans are compared for equality
};

const ElementFacts& facts(Element element);
Element element_by_name(std::string_view name);         // Element::unknown where there is none
Element element_by_safetensors(std::string_view name);  // the same

// The number of elements; false where a dimension is negative or the bytes would not fit 63 bits.
bool count_of(const Shape& shape, Element element, std::size_t& count);

std::string text_of(const Shape& shape);

// A tensor in memory of somebody else.
struct TensorView {
  std::string name;
  Element element = Element::unknown;
  Shape shape;
  const std::byte* data = nullptr;
};

struct Tensor {
  std::string name;
  Element element = Element::unknown;
  Shape shape;
  std::vector<std::byte> data;

  TensorView view() const { return {name, element, shape, data.data()}; }
};

// Values as fp64; exact for every element type but 64-bit integers beyond 2^53.
double value_at(Element element, const std::byte* data, std::size_t index);

}  // namespace depthwire
