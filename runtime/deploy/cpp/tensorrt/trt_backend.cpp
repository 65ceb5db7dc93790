#include "trt_backend.h"

#include <NvInferRuntime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "cuda.h"
#include "engine_file.h"
#include "error.h"

namespace depthwire {

const std::vector<OptionSpec> kTrtOptions = {
    {"--engine", "FILE", "the engine (the only one of the manifest, or that of --target)"},
    {"--target", "NAME", "which of the artefact's engines"},
    {"--work", "DIR", "where build_and_verify.py left a bundle's engine (work/ in the bundle)"},
    {"--cuda-graph", "", "launch each run as a CUDA graph"},
};

namespace {

using nvinfer1::DataType;

struct Type {
  Element element;
  DataType type;
};

constexpr Type kTypes[] = {
    {Element::f32, DataType::kFLOAT}, {Element::f16, DataType::kHALF},     {Element::bf16, DataType::kBF16},
    {Element::i64, DataType::kINT64}, {Element::i32, DataType::kINT32},    {Element::i8, DataType::kINT8},
    {Element::u8, DataType::kUINT8},  {Element::boolean, DataType::kBOOL},
};

constexpr int kWarmUps = 10;
constexpr std::chrono::milliseconds kWarmUp{200};

// TensorRT says why it refuses in its log, and returns null.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR) return;
    std::snprintf(last_, sizeof last_, "%s", text);
  }
  std::string last() const { return last_[0] != '\0' ? last_ : "no reason given"; }

 private:
  char last_[1024] = {};
};

struct Binding {
  std::string name;
  Element element;
  Shape shape;
  bool input, on_host;  // a shape tensor lies on the host
  std::size_t bytes;
  std::vector<std::byte> host;
  DeviceBuffer device;
};

std::string version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

class TrtBackend : public Backend {
 public:
  TrtBackend(const Package& package, const Options& options)
      : path_(choose_engine(package, options)), with_graph_(options.has("--cuda-graph")), device_(device_name()) {
    const MappedFile file(path_);
    runtime_.reset(nvinfer1::createInferRuntime(log_));
    if (runtime_ == nullptr) throw refused("the runtime cannot be made");
    engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.bytes()));
    if (engine_ == nullptr) throw refused("the engine cannot be read");
    context_.reset(engine_->createExecutionContext());
    if (context_ == nullptr) throw refused("there is no room for the engine to run");
    bind(package);
  }

  std::vector<TensorView> run(const std::vector<Tensor>& inputs) override {
    feed(inputs);
    enqueue();
    std::vector<TensorView> outputs;
    for (Binding& binding : bindings_) {
      if (binding.input) continue;
      if (!binding.on_host)
        require_cuda(cudaMemcpyAsync(binding.host.data(), binding.device.data(), binding.bytes, cudaMemcpyDeviceToHost,
                                     stream_.get()),
                     "cudaMemcpyAsync");
      outputs.push_back({binding.name, binding.element, binding.shape, binding.host.data()});
    }
    stream_.wait();
    return outputs;
  }

  // On the GPU's own clock, from the first kernel to the last: transfers are not in it.
  std::vector<double> time(const std::vector<Tensor>& inputs, int count) override {
    feed(inputs);
    const auto until = std::chrono::steady_clock::now() + kWarmUp;
    for (int i = 0; i < kWarmUps || std::chrono::steady_clock::now() < until; ++i) {
      enqueue();
      stream_.wait();
    }
    std::vector<double> times;
    const Event begin, end;
    for (int i = 0; i < count; ++i) {
      begin.record(stream_);
      enqueue();
      end.record(stream_);
      times.push_back(end.milliseconds_since(begin));
    }
    return times;
  }

  std::vector<std::pair<std::string, std::string>> facts() const override {
    return {{"runtime", "tensorrt " + version_text(getInferLibVersion())},
            {"engine", path_.string()},
            {"device", device_},
            {"cuda graph", with_graph_ ? "yes" : "no"},
            {"transfers in latency", "no"}};
  }

 private:
  Error refused(const std::string& what) const {
    return Error(Exit::runtime, "runtime.session", "TensorRT refuses the engine", path_.string(),
                 "an engine of this GPU, built by this version", what + ": " + log_.last(),
                 "Build it again on this machine; engines are neither portable to other GPUs nor to other versions.");
  }

  Error unfit(const std::string& at, std::string want, std::string got) const {
    return Error(Exit::runtime, "runtime.session", "The engine does not fit the goldens", at, std::move(want),
                 std::move(got), "Name the engine of this model with --engine, or build it again.");
  }

  // Inputs first: the shapes of outputs follow from theirs.
  void bind(const Package& package) {
    std::vector<std::string> inputs, outputs;
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      (engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? inputs : outputs).emplace_back(name);
    }
    if (inputs.size() != package.inputs.size())
      throw unfit(path_.string(), std::to_string(package.inputs.size()) + " inputs", std::to_string(inputs.size()));
    for (const TensorInfo& info : package.inputs) {
      if (std::find(inputs.begin(), inputs.end(), info.name) == inputs.end())
        throw unfit("input " + info.name, "an input of the engine", "none of that name");
      nvinfer1::Dims dims{};
      if (info.shape.size() > nvinfer1::Dims::MAX_DIMS) throw unfit("input " + info.name, "8 axes at most", "more");
      dims.nbDims = static_cast<std::int32_t>(info.shape.size());
      std::copy(info.shape.begin(), info.shape.end(), dims.d);
      if (!context_->setInputShape(info.name.c_str(), dims))
        throw unfit("input " + info.name, "a shape that the engine takes", text_of(info.shape) + ": " + log_.last());
      add(info.name, true);
      if (bindings_.back().element != info.element)
        throw unfit("input " + info.name, std::string(depthwire::facts(info.element).name), "another dtype");
    }
    for (const std::string& name : outputs) add(name, false);
  }

  void add(const std::string& name, bool input) {
    const nvinfer1::Dims dims = context_->getTensorShape(name.c_str());
    const DataType type = engine_->getTensorDataType(name.c_str());
    const auto found =
        std::find_if(std::begin(kTypes), std::end(kTypes), [&](const Type& t) { return t.type == type; });
    if (found == std::end(kTypes))
      throw unfit(name, "a dtype of a graph's interface",
                  "TensorRT's number " + std::to_string(static_cast<int>(type)));
    const Shape shape(dims.d, dims.d + std::max(dims.nbDims, 0));
    std::size_t count = 0;
    if (dims.nbDims < 0 || !count_of(shape, found->element, count))
      throw unfit(name, "a shape that follows from those of the inputs", text_of(shape));
    const std::size_t bytes = count * depthwire::facts(found->element).bytes;
    const bool on_host = engine_->getTensorLocation(name.c_str()) == nvinfer1::TensorLocation::kHOST;
    Binding& binding =
        bindings_.emplace_back(Binding{name, found->element, shape, input, on_host, bytes,
                                       std::vector<std::byte>(bytes + 1), DeviceBuffer(on_host ? 0 : bytes)});
    void* address = on_host ? binding.host.data() : binding.device.data();
    if (!context_->setTensorAddress(name.c_str(), address)) throw unfit(name, "an address", log_.last());
  }

  void feed(const std::vector<Tensor>& inputs) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      Binding& binding = bindings_[i];
      std::copy(inputs[i].data.begin(), inputs[i].data.end(), binding.host.begin());
      if (!binding.on_host)
        require_cuda(cudaMemcpyAsync(binding.device.data(), binding.host.data(), binding.bytes, cudaMemcpyHostToDevice,
                                     stream_.get()),
                     "cudaMemcpyAsync");
    }
    stream_.wait();
  }

  void enqueue() {
    if (graph_.recorded()) return graph_.launch(stream_);
    // The first run of a context may set up what a graph cannot record.
    if (!context_->enqueueV3(stream_.get())) throw failed();
    if (!with_graph_) return;
    stream_.wait();
    graph_.record(stream_, [this] { return context_->enqueueV3(stream_.get()); });
    graph_.launch(stream_);
  }

  Error failed() const {
    return Error(Exit::runtime, "runtime.run", "TensorRT failed while it ran the engine", path_.string(),
                 "an inference with the goldens' inputs", log_.last(), "Build the engine again on this machine.");
  }

  std::filesystem::path path_;
  bool with_graph_;
  std::string device_;
  Log log_;
  // In the order in which they may not be released: the last goes first.
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Stream stream_;
  std::vector<Binding> bindings_;
  Graph graph_;
};

}  // namespace

std::unique_ptr<Backend> open_trt(const Package& package, const Options& options) {
  return std::make_unique<TrtBackend>(package, options);
}

}  // namespace depthwire
