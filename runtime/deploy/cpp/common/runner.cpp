#include "runner.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <new>
#include <sstream>

#include "goldens.h"

namespace depthwire {

namespace {

const std::vector<OptionSpec> kCommon = {
    {"--json", "", "print the result as JSON"},
    {"--time", "N", "time N runs of the first window after the comparison"},
    {"--no-hashes", "", "check the sizes of the files, not their hashes"},
    {"--help", "", "print this"},
};

struct Result {
  std::vector<std::pair<std::string, std::string>> facts;
  std::vector<Verdict> outputs;
  std::size_t windows = 0;
  std::vector<double> times;  // sorted

  bool passed() const {
    return !outputs.empty() && windows > 0 &&
           std::all_of(outputs.begin(), outputs.end(), [](const Verdict& verdict) { return verdict.passed(); });
  }
  double quantile(double share) const { return times[static_cast<std::size_t>(share * double(times.size() - 1) + .5)]; }
};

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

std::string brief(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2e", value);
  return text;
}

Result compare_all(const Package& package, Backend& backend, const Goldens& goldens, int timed) {
  Result result;
  result.facts = backend.facts();
  for (const TensorInfo& info : package.outputs) {
    Verdict& verdict = result.outputs.emplace_back();
    verdict.name = info.name;
    verdict.element = info.element;
    verdict.kind = kind_of(info.name, info.element);
    verdict.shape = info.shape;
  }
  for (std::size_t window = 0; window < goldens.windows(); ++window, ++result.windows) {
    const std::vector<Tensor> inputs = goldens.inputs(window), expected = goldens.outputs(window);
    const std::vector<TensorView> actual = backend.run(inputs);
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const auto found = std::find_if(actual.begin(), actual.end(),
                                      [&](const TensorView& tensor) { return tensor.name == expected[i].name; });
      if (found == actual.end()) {
        result.outputs[i].problem = "expected and missing";
      } else {
        judge(result.outputs[i], expected[i], *found, package.outputs[i].judged);
      }
    }
  }
  if (timed > 0) {
    result.times = backend.time(goldens.inputs(0), timed);
    std::sort(result.times.begin(), result.times.end());
  }
  return result;
}

std::string line_of(const Verdict& verdict) {
  std::ostringstream line;
  line << verdict.name << ": " << facts(verdict.element).name << " " << text_of(verdict.shape) << ", "
       << (verdict.passed() ? "passed" : "FAILED") << ": ";
  if (!verdict.problem.empty()) {
    line << verdict.problem;
  } else if (verdict.kind == Kind::integer) {
    line << verdict.unequal << " elements differ";
  } else {
    line << "max|d| " << brief(verdict.max_abs) << ", allowed " << brief(verdict.allowed);
  }
  if (verdict.positions > 0) {
    line << "; top-1 " << verdict.positions - verdict.flips << " of " << verdict.positions;
    if (verdict.flips > 0) line << ", largest gap of a flip " << brief(verdict.largest_gap);
  }
  return line.str();
}

void print_lines(const Result& result) {
  std::string facts;
  for (const auto& [name, value] : result.facts) facts += (facts.empty() ? "" : ", ") + name + " " + value;
  std::printf("%s\n", facts.c_str());
  for (const Verdict& verdict : result.outputs) std::printf("%s\n", line_of(verdict).c_str());
  std::printf("%zu window%s, %s\n", result.windows, result.windows == 1 ? "" : "s",
              result.passed() ? "passed" : "FAILED");
  if (!result.times.empty())
    std::printf("latency %.3f ms, median of %zu (%.3f to %.3f, 10th to 90th percentile)\n", result.quantile(.5),
                result.times.size(), result.quantile(.1), result.quantile(.9));
}

std::string json_of(const Verdict& verdict) {
  std::ostringstream json;
  json << "{\"name\": " << json_text(verdict.name) << ", \"passed\": " << (verdict.passed() ? "true" : "false")
       << ", \"kind\": " << json_text(name_of(verdict.kind))
       << ", \"dtype\": " << json_text(facts(verdict.element).name) << ", \"shape\": " << text_of(verdict.shape)
       << ", \"problem\": " << (verdict.problem.empty() ? "null" : json_text(verdict.problem));
  if (verdict.problem.empty()) {
    json << ", \"max_abs\": " << number(verdict.max_abs) << ", \"allowed\": " << number(verdict.allowed)
         << ", \"unequal\": " << verdict.unequal;
  }
  if (verdict.positions > 0) {
    json << ", \"top1\": {\"positions\": " << verdict.positions << ", \"flips\": " << verdict.flips
         << ", \"beyond\": " << verdict.beyond << ", \"largest_gap\": " << number(verdict.largest_gap) << "}";
  }
  return json.str() + "}";
}

void print_json(const Result& result) {
  std::ostringstream json;
  json << "{\"passed\": " << (result.passed() ? "true" : "false") << ", \"windows\": " << result.windows;
  for (const auto& [name, value] : result.facts) json << ", " << json_text(name) << ": " << json_text(value);
  json << ", \"outputs\": [";
  for (std::size_t i = 0; i < result.outputs.size(); ++i) json << (i == 0 ? "" : ", ") << json_of(result.outputs[i]);
  json << "]";
  if (!result.times.empty()) {
    json << ", \"latency_ms\": {\"runs\": " << result.times.size() << ", \"median\": " << number(result.quantile(.5))
         << ", \"p10\": " << number(result.quantile(.1)) << ", \"p90\": " << number(result.quantile(.9)) << "}";
  }
  std::printf("%s}\n", json.str().c_str());
}

void print_error(const Error& error, bool as_json) {
  const std::pair<const char*, const std::string*> parts[] = {
      {"at", &error.at}, {"wanted", &error.want}, {"found", &error.got}, {"do", &error.todo}};
  if (as_json) {
    std::printf("{\"error\": %s, \"what\": %s", json_text(error.code).c_str(), json_text(error.what()).c_str());
    for (const auto& [name, text] : parts) std::printf(", \"%s\": %s", name, json_text(*text).c_str());
    std::printf(", \"exit_code\": %d}\n", static_cast<int>(error.exit));
    return;
  }
  std::fprintf(stderr, "error: %s [%s]\n", error.what(), error.code.c_str());
  for (const auto& [name, text] : parts) std::fprintf(stderr, "  %s: %s\n", name, text->c_str());
}

void print_help(const Program& program, const std::vector<OptionSpec>& known) {
  std::printf("usage: %s DIRECTORY [OPTIONS]\n%s\n\n", std::string(program.name).c_str(),
              std::string(program.summary).c_str());
  for (const OptionSpec& option : known) {
    const std::string name = std::string(option.name) + (option.value.empty() ? "" : " ") + std::string(option.value);
    std::printf("  %-18s %s\n", name.c_str(), std::string(option.help).c_str());
  }
  std::printf(
      "\nexit status: 0 reproduced, 2 usage, 5 a damaged directory, 6 the runtime fails, 7 the outputs differ\n");
}

Exit run(const Program& program, const std::vector<OptionSpec>& known, const Options& options) {
  if (options.has("--help")) {
    print_help(program, known);
    return Exit::ok;
  }
  if (options.directory().empty()) throw usage("DIRECTORY", "a directory that depthwire wrote", "none");
  const int timed = options.integer("--time", 0, 1, 1'000'000);
  const Package package = program.load(options.directory(), !options.has("--no-hashes"));
  const Goldens goldens(package);
  const std::unique_ptr<Backend> backend = program.open(package, options);
  const Result result = compare_all(package, *backend, goldens, timed);
  options.has("--json") ? print_json(result) : print_lines(result);
  return result.passed() ? Exit::ok : Exit::differs;
}

}  // namespace

int run_program(const Program& program, int count, char** arguments) {
  const bool as_json =
      std::any_of(arguments, arguments + count, [](const char* a) { return std::string_view(a) == "--json"; });
  const auto fail = [&](const Error& error) {
    print_error(error, as_json);
    return static_cast<int>(error.exit);
  };
  std::vector<OptionSpec> known = program.options;
  known.insert(known.end(), kCommon.begin(), kCommon.end());
  try {
    return static_cast<int>(run(program, known, Options(count, arguments, known)));
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return fail(Error(Exit::runtime, "runtime.run", "There is not enough memory", "the inputs and outputs of a window",
                      "room for them", "none", "Free some memory, or convert with a shorter length."));
  } catch (const std::exception& error) {
    return fail(Error(Exit::bug, "internal.unexpected", "A bug of the runner", std::string(program.name),
                      "no exception of this kind", error.what(), "Report it with the command line."));
  }
}

}  // namespace depthwire
