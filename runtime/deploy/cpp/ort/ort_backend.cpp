#include "ort_backend.h"

#include <onnxruntime_cxx_api.h>
#include <onnxruntime_session_options_config_keys.h>
#include <sched.h>

#include <algorithm>
#include <chrono>

#include "error.h"
#include "kernels.h"

namespace depthwire {

const std::vector<OptionSpec> kOrtOptions = {
    {"--kernels", "FILE", "library of kernels (libdepthwire_ort.so beside the program, or of the build)"},
    {"--no-kernels", "", "run the function bodies of the file instead"},
    {"--provider", "NAME", "cpu (the default) or cuda"},
    {"--threads", "N", "threads within an operator (every CPU this process may use)"},
    {"--map-weights", "", "leave the weights in their memory-mapped file: less memory, a little slower"},
};

namespace {

constexpr std::uint32_t kApiVersion = 24;  // ONNX Runtime 1.24, as the library of kernels
constexpr int kModelErrorsOnly = 3;
constexpr int kWarmUps = 3;
constexpr const char* kModel = "model.onnx";

struct Type {
  Element element;
  ONNXTensorElementDataType onnx;
};

constexpr Type kTypes[] = {
    {Element::f64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},   {Element::f32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {Element::f16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},  {Element::bf16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
    {Element::i64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},    {Element::i32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {Element::i16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},    {Element::i8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
    {Element::u64, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64},   {Element::u32, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32},
    {Element::u16, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},   {Element::u8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
    {Element::boolean, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
};

int usable_cpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

Error runtime_error(const char* code, const char* what, const Package& package, const char* want, std::string got) {
  return Error(Exit::runtime, code, what, package.path(kModel).string(), want, std::move(got),
               "Try 'depthwire verify' on the artefact; if that passes, compare the versions of ONNX Runtime.");
}

// Loaded once; the header's own way would end the process where the library is too old.
void init_api(const Package& package) {
  const OrtApiBase* base = OrtGetApiBase();
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr)
    throw runtime_error("runtime.session", "ONNX Runtime is too old", package, "ONNX Runtime 1.24 or newer",
                        base->GetVersionString());
  Ort::InitApi(api);
}

class OrtBackend : public Backend {
 public:
  OrtBackend(const Package& package, const Options& options) : package_(package) {
    const std::string provider = options.text("--provider", "cpu");
    if (provider != "cpu" && provider != "cuda") throw usage("--provider", "cpu or cuda", provider);
    threads_ = options.integer("--threads", usable_cpus(), 1, 4096);
    kernels_ = choose_kernels(package, options, provider == "cuda");
    try {
      env_ = Ort::Env(static_cast<OrtLoggingLevel>(kModelErrorsOnly), "depthwire_run");
      open(provider == "cuda", options.has("--map-weights"));
    } catch (const Ort::Exception& error) {
      throw runtime_error("runtime.session", "ONNX Runtime refuses the model", package, "a session", error.what());
    }
  }

  std::vector<TensorView> run(const std::vector<Tensor>& inputs) override {
    try {
      outputs_ = call(inputs);
      std::vector<TensorView> views;
      for (std::size_t i = 0; i < outputs_.size(); ++i) views.push_back(view(output_names_[i], outputs_[i]));
      return views;
    } catch (const Ort::Exception& error) {
      throw failed(error);
    }
  }

  std::vector<double> time(const std::vector<Tensor>& inputs, int count) override {
    std::vector<double> times;
    try {
      for (int i = -kWarmUps; i < count; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        outputs_ = call(inputs);
        const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
        if (i >= 0) times.push_back(taken.count());
      }
    } catch (const Ort::Exception& error) {
      throw failed(error);
    }
    return times;
  }

  std::vector<std::pair<std::string, std::string>> facts() const override {
    std::vector<std::pair<std::string, std::string>> found = {
        {"runtime", "onnxruntime " + std::string(OrtGetApiBase()->GetVersionString())}, {"provider", provider_}};
    if (!kernels_.ops.empty()) found.emplace_back("operators by", operators());
    found.emplace_back("threads", std::to_string(threads_));
    return found;
  }

 private:
  std::string operators() const {
    if (kernels_.library.empty()) return "function bodies";
    return kernels_.cubins.empty() ? kernels_.instruction_set + " kernels" : "cubins";
  }

  void open(bool cuda, bool map_weights) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads_);
    options.SetInterOpNumThreads(1);
    if (map_weights) {
      options.AddConfigEntry(kOrtSessionOptionsConfigDisablePrepacking, "1");
      options.AddConfigEntry(kOrtSessionOptionsDisableSpecifiedOptimizers, "ConstantFolding");
    }
    if (!kernels_.library.empty()) add_kernels(options);
    if (cuda) {
      options.AppendExecutionProvider("CUDAExecutionProvider", {});
      provider_ = "cuda";
    }
    session_ = Ort::Session(env_, package_.path(kModel).c_str(), options);
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i)
      output_names_.emplace_back(session_.GetOutputNameAllocated(i, Ort::AllocatorWithDefaultOptions()).get());
  }

  void add_kernels(Ort::SessionOptions& options) {
    options.AddConfigEntry("depthwire.ops", kernels_.ops.c_str());
    if (!kernels_.cubins.empty()) options.AddConfigEntry("depthwire.kernels", kernels_.cubins.c_str());
    try {
      options.RegisterCustomOpsLibrary(kernels_.library.c_str());
    } catch (const Ort::Exception& error) {
      throw Error(Exit::runtime, "runtime.kernels-refused", "The library of kernels cannot be registered",
                  kernels_.library, "kernels for the operators of domain depthwire", error.what(),
                  "Build it again with 'make native', or give --no-kernels.");
    }
  }

  std::vector<Ort::Value> call(const std::vector<Tensor>& inputs) {
    const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> values;
    std::vector<const char*> in, out;
    for (const Tensor& tensor : inputs) {
      const auto type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                     [&](const Type& entry) { return entry.element == tensor.element; });
      // ONNX Runtime takes inputs as if it could write them, and does not.
      values.push_back(Ort::Value::CreateTensor(memory, const_cast<std::byte*>(tensor.data.data()), tensor.data.size(),
                                                tensor.shape.data(), tensor.shape.size(), type->onnx));
      in.push_back(tensor.name.c_str());
    }
    for (const std::string& name : output_names_) out.push_back(name.c_str());
    return session_.Run(Ort::RunOptions(), in.data(), values.data(), values.size(), out.data(), out.size());
  }

  static TensorView view(const std::string& name, const Ort::Value& value) {
    TensorView found{name, Element::unknown, {}, nullptr};
    if (!value.IsTensor()) return found;
    const auto info = value.GetTensorTypeAndShapeInfo();
    found.shape = info.GetShape();
    for (const Type& type : kTypes)
      if (type.onnx == info.GetElementType()) found.element = type.element;
    found.data = static_cast<const std::byte*>(value.GetTensorRawData());
    return found;
  }

  Error failed(const Ort::Exception& error) const {
    return runtime_error("runtime.run", "ONNX Runtime failed while it ran the model", package_,
                         "an inference with the goldens' inputs", error.what());
  }

  const Package& package_;
  Kernels kernels_;
  int threads_ = 1;
  std::string provider_ = "cpu";
  Ort::Env env_{nullptr};
  Ort::Session session_{nullptr};
  std::vector<std::string> output_names_;
  std::vector<Ort::Value> outputs_;
};

}  // namespace

std::unique_ptr<Backend> open_ort(const Package& package, const Options& options) {
  init_api(package);  // before there is a member that could be released
  return std::make_unique<OrtBackend>(package, options);
}

}  // namespace depthwire
