// One error for one failure, with the codes of docs/troubleshooting.md and the exit codes of depthwire.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace depthwire {

enum class Exit : int { ok = 0, usage = 2, artefact = 5, runtime = 6, differs = 7, bug = 70 };

// What failed, where, what was wanted there, what was found, and what to do.
struct Error : std::runtime_error {
  Error(Exit exit, std::string code, const std::string& what, std::string at, std::string want, std::string got,
        std::string todo)
      : std::runtime_error(what),
        exit(exit),
        code(std::move(code)),
        at(std::move(at)),
        want(std::move(want)),
        got(std::move(got)),
        todo(std::move(todo)) {}

  Exit exit;
  std::string code, at, want, got, todo;
};

}  // namespace depthwire
