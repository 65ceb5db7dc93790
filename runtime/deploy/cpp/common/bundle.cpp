#include "files.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

constexpr const char* kBundle = "bundle.json";

void fill(Package& package, const Json& bundle) {
  require_schema(bundle, package.root / kBundle);
  const std::vector<Json>& models = bundle.at("models").array();
  if (models.empty()) throw JsonError("no model");
  const Json& model = models.front();
  for (const Json& entry : model.at("inputs").array()) package.inputs.push_back(read_tensor(entry));
  for (const Json& entry : model.at("outputs").array()) {
    TensorInfo& output = package.outputs.emplace_back(read_tensor(entry));
    const std::string& computed = entry.at("computed").string();
    output.judged = element_by_name(computed);
    if (output.judged == Element::unknown) throw JsonError("no dtype " + json_text(computed));
  }
  package.goldens = model.at("goldens").string();
  require_inside(package.root, package.goldens);
  const std::string& engine = model.at("engine").string();
  if (engine.find('/') != std::string::npos) throw JsonError("an engine outside the work directory");
  package.engines[bundle.at("target").string()] = engine;
  read_files(package, bundle.at("files"));
}

}  // namespace

Package load_package(const fs::path& root, bool check_hashes) {
  std::error_code failed;
  if (!fs::is_regular_file(root / kBundle, failed)) return load_artifact(root, check_hashes);
  Package package;
  package.root = root;
  read_manifest(root / kBundle, fill, package);
  check_files(package, check_hashes);
  return package;
}

}  // namespace depthwire
