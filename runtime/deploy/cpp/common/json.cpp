#include "json.h"

#include <charconv>
#include <cstdio>
#include <set>

namespace depthwire {

namespace {

constexpr const char* kNames[] = {"null", "a boolean", "a number", "a string", "a list", "an object"};

[[noreturn]] void wrong(const char* want, Json::Kind got) {
  throw JsonError(std::string("wanted ") + want + ", found " + kNames[static_cast<int>(got)]);
}

void append_utf8(std::string& text, std::uint32_t code) {
  const auto byte = [&](std::uint32_t value) { text.push_back(static_cast<char>(value)); };
  const auto tail = [&](int shift) { byte(0x80 | ((code >> shift) & 0x3f)); };
  if (code < 0x80) {
    byte(code);
  } else if (code < 0x800) {
    byte(0xc0 | (code >> 6)), tail(0);
  } else if (code < 0x10000) {
    byte(0xe0 | (code >> 12)), tail(6), tail(0);
  } else {
    byte(0xf0 | (code >> 18)), tail(12), tail(6), tail(0);
  }
}

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = read(0);
    space();
    if (at_ != text_.size()) fail("text behind the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw JsonError("not JSON: " + what + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool take(char wanted) {
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void need(char wanted) {
    if (!take(wanted)) fail(std::string("no '") + wanted + "'");
  }

  Json read(int depth) {
    if (depth > Json::kDeepest) fail("nested too deep");
    space();
    Json value;
    if (peek() == '{') {
      object(value, depth);
    } else if (peek() == '[') {
      array(value, depth);
    } else if (peek() == '"') {
      value.kind_ = Json::Kind::string;
      value.text_ = string();
    } else if (!word("null", Json::Kind::null, value) && !word("true", Json::Kind::boolean, value) &&
               !word("false", Json::Kind::boolean, value)) {
      number(value);
    }
    return value;
  }

  bool word(std::string_view name, Json::Kind kind, Json& value) {
    if (text_.substr(at_, name.size()) != name) return false;
    at_ += name.size();
    value.kind_ = kind;
    value.text_ = name;
    return true;
  }

  void digits() {
    const std::size_t begin = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    if (begin == at_) fail("no value");
  }

  void number(Json& value) {
    const std::size_t begin = at_;
    take('-');
    if (!take('0')) digits();
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    value.kind_ = Json::Kind::number;
    value.text_ = text_.substr(begin, at_ - begin);
  }

  std::uint32_t hex() {
    std::uint32_t code = 0;
    const std::string_view part = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), code, 16);
    if (error != std::errc() || end != part.data() + 4) fail("a bad \\u");
    at_ += 4;
    return code;
  }

  void escape(std::string& out) {
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    if (take('u')) {
      std::uint32_t code = hex();
      if (code >= 0xdc00 && code < 0xe000) fail("half a surrogate pair");
      if (code >= 0xd800 && code < 0xdc00) {
        need('\\'), need('u');
        const std::uint32_t low = hex();
        if (low < 0xdc00 || low >= 0xe000) fail("half a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      }
      append_utf8(out, code);
      return;
    }
    const std::size_t place = at_ < text_.size() ? kFrom.find(text_[at_]) : std::string_view::npos;
    if (place == std::string_view::npos) fail("a bad escape");
    out.push_back(kTo[place]);
    ++at_;
  }

  std::string string() {
    need('"');
    std::string out;
    while (!take('"')) {
      if (at_ >= text_.size()) fail("a string without its end");
      const char next = text_[at_];
      if (static_cast<unsigned char>(next) < 0x20) fail("a control character in a string");
      ++at_;
      if (next == '\\') {
        escape(out);
      } else {
        out.push_back(next);
      }
    }
    return out;
  }

  void array(Json& value, int depth) {
    value.kind_ = Json::Kind::array;
    need('[');
    space();
    if (take(']')) return;
    do {
      value.items_.push_back(read(depth + 1));
      space();
    } while (take(','));
    need(']');
  }

  void object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    std::set<std::string> keys;
    need('{');
    space();
    if (take('}')) return;
    do {
      space();
      std::string key = string();
      if (!keys.insert(key).second) fail("the key " + json_text(key) + " for the second time");
      space();
      need(':');
      value.members_.emplace_back(std::move(key), read(depth + 1));
      space();
    } while (take(','));
    need('}');
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).whole(); }

const std::string& Json::string() const {
  if (kind_ != Kind::string) wrong("a string", kind_);
  return text_;
}

std::uint64_t Json::unsigned_integer() const {
  if (kind_ != Kind::number) wrong("a number", kind_);
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
  if (error != std::errc() || end != text_.data() + text_.size())
    throw JsonError("wanted an integer from 0 to 2^64 - 1, found " + text_);
  return value;
}

const std::vector<Json>& Json::array() const {
  if (kind_ != Kind::array) wrong("a list", kind_);
  return items_;
}

const std::vector<std::pair<std::string, Json>>& Json::object() const {
  if (kind_ != Kind::object) wrong("an object", kind_);
  return members_;
}

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : object())
    if (name == key) return &value;
  return nullptr;
}

const Json& Json::at(std::string_view key) const {
  const Json* value = find(key);
  if (value == nullptr) throw JsonError("no key " + json_text(key));
  return *value;
}

std::string json_text(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

}  // namespace depthwire
