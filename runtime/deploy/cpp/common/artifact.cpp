#include "files.h"

namespace depthwire {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";

void fill(Package& package, const Json& manifest) {
  require_schema(manifest, package.root / kManifest);
  for (const Json& entry : manifest.at("inputs").array()) package.inputs.push_back(read_tensor(entry));
  for (const Json& entry : manifest.at("outputs").array()) package.outputs.push_back(read_tensor(entry));
  for (const auto& [name, op] : manifest.at("custom_ops").object())
    if (name.starts_with("depthwire::")) package.custom_ops.push_back(name.substr(name.rfind(':') + 1));
  read_files(package, manifest.at("files"));
  if (const Json* engines = manifest.find("engines"); engines != nullptr)
    for (const auto& [target, engine] : engines->object()) package.engines[target] = engine.at("file").string();
  const Json* kernels = manifest.find("kernels");
  package.has_cubins = kernels != nullptr && !kernels->is_null();
  // Goldens hold what a lower precision made of the values: its budgets are granted to fp32 outputs.
  const Json* precision = manifest.find("precision");
  if (precision == nullptr || precision->is_null()) return;
  const std::string& rest = precision->at("rest").string();
  const Element rounded = rest == "fp16" ? Element::f16 : rest == "bf16" ? Element::bf16 : Element::f32;
  if (rounded == Element::f32 && rest != "fp32") throw JsonError("no precision " + json_text(rest));
  for (TensorInfo& output : package.outputs)
    if (output.element == Element::f32) output.judged = rounded;
}

}  // namespace

Package load_artifact(const fs::path& root, bool check_hashes) {
  Package package;
  package.root = root;
  package.goldens = "goldens.safetensors";
  const fs::path manifest = root / kManifest;
  std::error_code failed;
  if (!fs::is_regular_file(manifest, failed))
    throw damaged("artifact.not-an-artifact", "This directory is not a Depthwire artefact", root,
                  std::string("a directory with ") + kManifest,
                  fs::exists(root, failed) ? std::string("no ") + kManifest + " in it" : "no such directory",
                  "Give the directory that 'depthwire convert -o' wrote.");
  read_manifest(manifest, fill, package);
  check_files(package, check_hashes);
  return package;
}

}  // namespace depthwire
