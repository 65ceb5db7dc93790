// Files of a package: read whole, checked against its list.
#pragma once

#include "error.h"
#include "json.h"
#include "package.h"

namespace depthwire {

Error damaged(const char* code, const char* what, const std::filesystem::path& at, std::string want, std::string got,
              const char* todo);

// Runs `fill` over a JSON file. What it throws as JsonError becomes artifact.bad-manifest.
void read_manifest(const std::filesystem::path& path, void (*fill)(Package&, const Json&), Package& package);

void require_schema(const Json& manifest, const std::filesystem::path& at);

// Refuses names that leave the directory, by their spelling or through a link (artifact.path-outside).
void require_inside(const std::filesystem::path& root, const std::string& name);

// {"name": {"bytes": 1, "sha256": "..."}}
void read_files(Package& package, const Json& files);

// Every listed file: it lies inside, is there, has its size and, where `check_hashes`, its hash.
void check_files(const Package& package, bool check_hashes);

// {"name": "x", "shape": [1], "dtype": "float32"}
TensorInfo read_tensor(const Json& entry);

}  // namespace depthwire
