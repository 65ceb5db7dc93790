// What runs a model, and what every runner does with it.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "compare.h"
#include "error.h"
#include "package.h"

namespace depthwire {

struct OptionSpec {
  std::string_view name, value, help;  // "--time", "N", "..."; a flag where `value` is empty
};

class Options {
 public:
  // Throws Error (Exit::usage).
  Options(int count, char** arguments, const std::vector<OptionSpec>& known);

  const std::string& directory() const { return directory_; }
  bool has(std::string_view name) const { return values_.contains(name); }
  std::string text(std::string_view name, std::string missing = "") const;
  int integer(std::string_view name, int missing, int least, int most) const;

 private:
  std::string directory_;
  std::map<std::string, std::string, std::less<>> values_;
};

Error usage(std::string at, std::string want, std::string got);

// A session or an engine that is ready to run.
class Backend {
 public:
  virtual ~Backend() = default;

  // Every output, in the memory of the back end until the next call. Throws Error with Exit::runtime.
  virtual std::vector<TensorView> run(const std::vector<Tensor>& inputs) = 0;
  // Milliseconds of each of `count` runs, after some that are not counted.
  virtual std::vector<double> time(const std::vector<Tensor>& inputs, int count) = 0;

  virtual std::vector<std::pair<std::string, std::string>> facts() const = 0;  // runtime, operators, ...
};

// What a program supplies: its name, its own options, what it takes, its back end.
struct Program {
  std::string_view name, summary;
  std::vector<OptionSpec> options;
  Package (*load)(const std::filesystem::path& root, bool check_hashes);
  std::unique_ptr<Backend> (*open)(const Package& package, const Options& options);
};

// Everything but the back end: options, checks, every window, the verdict, the exit status.
int run_program(const Program& program, int count, char** arguments);

}  // namespace depthwire
