// A strict reader of JSON, for the manifest and for the header of the goldens: both may come from anywhere.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace depthwire {

// The text is not JSON, or a value is not what was asked for. What reads a file turns it into an Error.
struct JsonError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One value. Asking it for what it is not throws JsonError.
class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  // Values may be nested kDeepest deep; a key that comes twice, or text behind the value, is refused.
  static constexpr int kDeepest = 64;
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }
  bool is_true() const { return kind_ == Kind::boolean && text_ == "true"; }

  const std::string& string() const;
  std::uint64_t unsigned_integer() const;  // digits alone: sizes, shapes, offsets
  const std::vector<Json>& array() const;
  const std::vector<std::pair<std::string, Json>>& object() const;
  const Json* find(std::string_view key) const;  // nullptr where the object has no such key
  const Json& at(std::string_view key) const;

 private:
  friend class JsonReader;

  Kind kind_ = Kind::null;
  std::string text_;  // of a string, unescaped; of a number or a boolean, as it stands
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

// Text with quotes around it, escaped.
std::string json_text(std::string_view text);

}  // namespace depthwire
