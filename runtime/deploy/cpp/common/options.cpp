#include <charconv>

#include "error.h"
#include "runner.h"

namespace depthwire {

Error usage(std::string at, std::string want, std::string got) {
  return Error(Exit::usage, "cli.usage", "The command line cannot be understood", std::move(at), std::move(want),
               std::move(got), "See --help.");
}

Options::Options(int count, char** arguments, const std::vector<OptionSpec>& known) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (!argument.starts_with("-")) {
      if (!directory_.empty()) throw usage(argument, "one directory", "another one");
      directory_ = argument;
      continue;
    }
    const OptionSpec* spec = nullptr;
    for (const OptionSpec& option : known)
      if (option.name == argument) spec = &option;
    if (spec == nullptr) throw usage(argument, "an option of --help", "none of that name");
    if (!spec->value.empty() && ++i == count) throw usage(argument, std::string(spec->value), "nothing");
    if (!values_.emplace(argument, spec->value.empty() ? "" : arguments[i]).second)
      throw usage(argument, "it once", "it twice");
  }
}

std::string Options::text(std::string_view name, std::string missing) const {
  const auto found = values_.find(name);
  return found == values_.end() ? missing : found->second;
}

int Options::integer(std::string_view name, int missing, int least, int most) const {
  const auto found = values_.find(name);
  if (found == values_.end()) return missing;
  int value = 0;
  const std::string& text = found->second;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
    throw usage(std::string(name), "an integer from " + std::to_string(least) + " to " + std::to_string(most), text);
  return value;
}

}  // namespace depthwire
