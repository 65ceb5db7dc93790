// The parts that need no model, against their definitions: ctest, or the program alone; also under an emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>

#include "compare.h"
#include "error.h"
#include "json.h"
#include "sha256.h"

namespace {

using namespace depthwire;

int checks = 0, failures = 0;

void check(bool passed, const char* what, const std::string& detail = "") {
  ++checks;
  if (passed) return;
  ++failures;
  std::printf("failed: %s %s\n", what, detail.c_str());
}

// NIST's examples, and a text in pieces of every length.
void check_sha256() {
  const auto hash = [](const std::string& text, std::size_t piece) {
    Sha256 sum;
    for (std::size_t at = 0; at < text.size(); at += piece)
      sum.update(std::as_bytes(std::span(text.data() + at, std::min(piece, text.size() - at))));
    return sum.hex();
  };
  check(hash("", 1) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "sha256 of nothing");
  check(hash("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "sha256 of abc");
  check(hash(std::string(1'000'000, 'a'), 999) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
        "sha256 of a million a");
  for (std::size_t length = 0; length < 200; ++length) {
    const std::string text(length, 'x');
    for (const std::size_t piece : {1, 3, 63, 64, 65}) check(hash(text, piece) == hash(text, 200), "sha256 in pieces");
  }
}

void check_values() {
  const auto half = [](std::uint16_t bits) {
    return value_at(Element::f16, reinterpret_cast<const std::byte*>(&bits), 0);
  };
  check(half(0) == 0 && half(0x3c00) == 1 && half(0xc000) == -2 && half(0x7bff) == 65504, "float16 landmarks");
  check(std::isinf(half(0x7c00)) && std::isnan(half(0x7e00)), "float16 infinity and NaN");
  // A step is 2^-24 up to exponent 1 and doubles with every exponent.
  for (std::uint16_t bits = 0; bits < 0x7bff; ++bits) {
    const int exponent = bits >> 10;
    check(half(bits + 1) - half(bits) == std::ldexp(1, std::max(exponent, 1) - 25), "float16", std::to_string(bits));
    check(half(bits | 0x8000) == -half(bits), "negative float16", std::to_string(bits));
  }
  const std::uint16_t brain = 0x4049;
  check(value_at(Element::bf16, reinterpret_cast<const std::byte*>(&brain), 0) == 3.140625, "bfloat16");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  std::size_t count = 1;
  check(!count_of({most, 2}, Element::u8, count) && !count_of({most}, Element::f32, count), "sizes that overflow");
  check(!count_of({-1}, Element::u8, count) && !count_of({0, most, most}, Element::u8, count), "sizes that cannot be");
  check(count_of({3, 0, 5}, Element::f64, count) && count == 0, "an empty tensor");
  check(count_of({}, Element::f64, count) && count == 1, "a scalar");
}

bool parses(const std::string& text) {
  try {
    Json::parse(text);
    return true;
  } catch (const JsonError&) {
    return false;
  }
}

void check_json() {
  for (const char* text : {"{}", " [ ] ", "-0.5e+10", "\"\\u00e9\\ud83d\\ude00\\n\"", "[1,2,{\"a\":null}]", "true"})
    check(parses(text), "valid JSON is refused:", text);
  for (const char* text :
       {"",      "{",   "[1,]", "{\"a\":1,}",  "{\"a\":1,\"a\":2}", "01",      "1.",     ".5",        "+1",
        "1e",    "nul", "tru",  "\"\\ud800\"", "\"\\udc00\"",       "\"\\x\"", "\"\t\"", "\"\\u12\"", "[1] 2",
        "{1:2}", "'a'", "NaN"})
    check(!parses(text), "invalid JSON is accepted:", text);
  const std::string deep(Json::kDeepest + 1, '[');
  check(!parses(std::string(1'000'000, '[')), "brackets without end");
  check(!parses(deep + "1" + std::string(deep.size(), ']')), "nested too deep");
  const Json value =
      Json::parse("{\"n\":18446744073709551615,\"o\":18446744073709551616,\"m\":-1,\"s\":\"\\u00e9\\/\"}");
  check(value.at("n").unsigned_integer() == std::numeric_limits<std::uint64_t>::max(), "the largest integer");
  check(value.at("s").string() == "\xc3\xa9/", "an escaped character");
  for (const char* key : {"o", "m", "s", "absent"}) {
    bool refused = false;
    try {
      value.at(key).unsigned_integer();
    } catch (const JsonError&) {
      refused = true;
    }
    check(refused, "not an unsigned integer:", key);
  }
  // Whatever a byte turns into, there is a value or a JsonError: the sanitizers watch.
  const std::string seed =
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,-2.5e3],\"x\":[true,null,\"\\u00e9\\ud83d\\ude00\"]}}";
  check(parses(seed), "the text to damage");
  for (std::size_t at = 0; at < seed.size(); ++at) {
    check(!parses(seed.substr(0, at)), "half a text", std::to_string(at));
    for (int byte = 0; byte < 256; ++byte) {
      std::string damaged = seed;
      damaged[at] = static_cast<char>(byte);
      parses(damaged), ++checks;
    }
  }
  check(json_text("a\"\\\n") == "\"a\\\"\\\\\\u000a\"", "quotes");
}

template <class T>
Tensor tensor_of(Element element, const std::vector<T>& values, Shape shape) {
  Tensor tensor{"logits", element, std::move(shape), std::vector<std::byte>(values.size() * sizeof(T))};
  if (!values.empty()) std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
  return tensor;
}

Verdict verdict_on(const Tensor& expected, const Tensor& actual) {
  Verdict verdict;
  verdict.name = "logits", verdict.element = expected.element, verdict.kind = kind_of("logits", expected.element);
  judge(verdict, expected, actual.view(), expected.element);
  return verdict;
}

// An output passes or fails exactly at its budget, and not at all where it cannot be compared.
void check_judgement() {
  const auto f32 = [](std::vector<float> values, Shape shape) {
    return tensor_of(Element::f32, values, std::move(shape));
  };
  const Tensor expected = f32({1, 0, 0.5f, 2}, {2, 2});
  check(verdict_on(expected, expected).passed(), "the same");
  check(verdict_on(expected, f32({1, 0, 0.5f, 2.00003f}, {2, 2})).passed(), "within 2e-5 * 2");
  check(!verdict_on(expected, f32({1, 0, 0.5f, 2.00005f}, {2, 2})).passed(), "beyond 2e-5 * 2");
  check(!verdict_on(expected, f32({1, 0, 0.5f, 2}, {4})).passed(), "another shape");
  check(!verdict_on(expected, tensor_of<double>(Element::f64, {1, 0, 0.5, 2}, {2, 2})).passed(), "another dtype");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  check(!verdict_on(f32({nan}, {1}), f32({nan}, {1})).passed(), "NaN on both sides");
  check(!verdict_on(f32({}, {0}), f32({}, {0})).passed(), "nothing to compare");
  check(!Verdict().passed(), "no window");
  const Verdict flipped = verdict_on(f32({1, 1.00001f, 9}, {1, 3}), f32({1, 1.00001f, 9}, {1, 3}));
  check(flipped.passed() && flipped.positions == 1 && flipped.flips == 0, "top-1");
  const Verdict tie = verdict_on(f32({4.00002f, 4}, {1, 2}), f32({4, 4.00002f}, {1, 2}));
  check(tie.passed() && tie.flips == 1 && tie.beyond == 0, "a near-tie");
  const std::int64_t large = (std::int64_t{1} << 53) + 1;
  const auto i64 = [](std::int64_t value) { return tensor_of<std::int64_t>(Element::i64, {value}, {1}); };
  check(verdict_on(i64(large), i64(large)).passed(), "a large integer");
  check(!verdict_on(i64(large), i64(large - 1)).passed(), "large integers that fp64 cannot tell apart");
  // The window that fails stays failed, and its numbers stay.
  Verdict verdict = verdict_on(expected, f32({1, 0, 0.5f, 3}, {2, 2}));
  judge(verdict, expected, expected.view(), Element::f32);
  check(!verdict.passed() && verdict.windows == 2 && verdict.max_abs == 1, "one bad window of two");
}

}  // namespace

int main() {
  const std::pair<const char*, void (*)()> parts[] = {
      {"sha256", check_sha256}, {"values", check_values}, {"json", check_json}, {"judgement", check_judgement}};
  for (const auto& [name, part] : parts) {
    const int before = checks, failed = failures;
    part();
    std::printf("%s: %d checks, %d failed\n", name, checks - before, failures - failed);
  }
  return failures == 0 ? 0 : 1;
}
