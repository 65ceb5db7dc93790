// The CPU provider's kernels: rows in tasks over ONNX Runtime's own thread pool.
#include <atomic>
#include <new>
#include <vector>

#include "operands.h"
#include "routing_op.h"
#include "status.h"

namespace depthwire {

namespace {

// Values fetched below which a second thread costs more than it brings, and those of one task.
constexpr std::int64_t kAlone = 96 * 1024;
constexpr std::int64_t kTask = 48 * 1024;

template <class Call>
struct Job {
  const Call& call;
  void (*run)(const Call& call, std::int64_t first, std::int64_t last, float* scratch);
  std::size_t scratch_floats;
  std::int64_t rows, step;
  std::atomic<bool> starved{false};

  void task(std::size_t number) noexcept {
    static thread_local std::vector<float> scratch;
    try {
      if (scratch.size() < scratch_floats) scratch.resize(scratch_floats);
    } catch (const std::bad_alloc&) {
      starved = true;
      return;
    }
    const std::int64_t first = static_cast<std::int64_t>(number) * step;
    run(call, first, first + step < rows ? first + step : rows, scratch.data());
  }
};

template <class Call>
OrtStatus* run_rows(const OrtApi& api, OrtKernelContext* context, Job<Call>& job, std::int64_t values_a_row,
                    int block) {
  job.step = job.rows;
  if (job.rows * values_a_row > kAlone) {
    job.step = (kTask / (values_a_row * block) + 1) * block;
  }
  const auto tasks = static_cast<std::size_t>((job.rows + job.step - 1) / job.step);
  if (tasks == 1) {
    job.task(0);
  } else {
    auto each = [](void* data, std::size_t number) { static_cast<Job<Call>*>(data)->task(number); };
    DEPTHWIRE_TRY(api.KernelContext_ParallelFor(context, each, tasks, 0, &job));
  }
  return job.starved ? api.CreateStatus(ORT_FAIL, "depthwire: out of memory") : nullptr;
}

// A parameter as fp32; `copy` holds it if it had to be converted.
const float* widened(const Operands& operands, const Tensor& tensor, std::int64_t count, std::vector<float>& copy) {
  if (tensor.data == nullptr || tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    return static_cast<const float*>(tensor.data);
  }
  copy.resize(static_cast<std::size_t>(count));
  kernels(operands.element).widen(tensor.data, count, copy.data());
  return copy.data();
}

OrtStatus* compute_inter(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context,
                         const Operands& operands) {
  std::vector<float> copy;
  InterCall call{};
  call.sources = operands.sources;
  call.count = spec.sources;
  call.width = operands.width;
  call.rows = operands.rows;
  call.query_count = static_cast<int>(operands.query_count);
  call.queries = widened(operands, operands.query, operands.query_count * operands.width, copy);
  call.eps = attributes.eps;
  call.scale = attributes.scale;
  void* lse = nullptr;
  const Tensor& row = operands.row;
  DEPTHWIRE_TRY(make_output(api, context, 0, operands.query_count, row.shape, row.rank, &call.out));
  DEPTHWIRE_TRY(make_output(api, context, 1, operands.query_count, row.shape, row.rank - 1, &lse));
  call.lse = static_cast<float*>(lse);
  if (operands.rows == 0) return nullptr;
  Job<InterCall> job{call, kernels(operands.element).inter, inter_scratch(call), operands.rows, 0};
  return run_rows(api, context, job, operands.width * spec.sources * (1 + operands.query_count),
                  packed_rows(operands.width, spec.sources));
}

OrtStatus* compute_read(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context,
                        const Operands& operands) {
  std::vector<float> query, norm_weight;
  ReadCall call{};
  call.sources = operands.sources;
  call.count = spec.sources;
  call.width = operands.width;
  call.query = widened(operands, operands.query, operands.width, query);
  call.norm_weight = widened(operands, operands.norm_weight, operands.width, norm_weight);
  call.delta = operands.delta.data;
  call.mixed = operands.mixed.data;
  call.mixed_logit = static_cast<const float*>(operands.mixed_logit.data);
  call.eps = attributes.eps;
  call.scale = attributes.scale;
  call.last_bias = attributes.last_bias;
  call.norm_eps = attributes.norm_eps;
  call.unit = spec.unit;
  const Tensor& row = operands.row;
  DEPTHWIRE_TRY(make_output(api, context, 0, -1, row.shape, row.rank, &call.out));
  if (spec.add) DEPTHWIRE_TRY(make_output(api, context, 1, -1, row.shape, row.rank, &call.sum));
  if (operands.rows == 0) return nullptr;
  Job<ReadCall> job{call, kernels(operands.element).read, read_scratch(call), operands.rows, 0};
  return run_rows(api, context, job, operands.width * (spec.sources + 1), block_rows(operands.width));
}

OrtStatus* compute(const OrtApi& api, const OpSpec& spec, const Attributes& attributes, OrtKernelContext* context) try {
  Operands operands;
  DEPTHWIRE_TRY(fetch_operands(api, spec, attributes, context, operands));
  return spec.family == Family::inter ? compute_inter(api, spec, attributes, context, operands)
                                      : compute_read(api, spec, attributes, context, operands);
} catch (const std::bad_alloc&) {
  return api.CreateStatus(ORT_FAIL, "depthwire: out of memory");
}

}  // namespace

const Backend& cpu_backend() {
  static const Backend backend{nullptr, compute, compute_routing};
  return backend;
}

}  // namespace depthwire
