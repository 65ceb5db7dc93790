// Tasks over ONNX Runtime's own thread pool.
#pragma once

#include "status.h"

namespace depthwire {

// Bytes that are moved or fetched below which a second thread costs more than it brings, and those of one task.
constexpr std::int64_t kAloneBytes = 1536 * 1024;
constexpr std::int64_t kTaskBytes = 384 * 1024;

// Calls run(first, last) for parts of [0, count), items of so many bytes, side by side where that pays.
template <class Run>
OrtStatus* in_parts(const OrtApi& api, OrtKernelContext* context, std::int64_t count, std::int64_t bytes,
                    const Run& run) {
  if (count <= 1 || bytes < 1 || count <= kAloneBytes / bytes) {
    if (count > 0) run(0, count);
    return nullptr;
  }
  struct Job {
    const Run& run;
    std::int64_t count, step;
  } job{run, count, kTaskBytes / bytes + 1};
  const auto each = [](void* data, std::size_t number) {
    const Job& own = *static_cast<const Job*>(data);
    const std::int64_t first = static_cast<std::int64_t>(number) * own.step;
    own.run(first, first + own.step < own.count ? first + own.step : own.count);
  };
  const auto tasks = static_cast<std::size_t>((count + job.step - 1) / job.step);
  return api.KernelContext_ParallelFor(context, each, tasks, 0, &job);
}

}  // namespace depthwire
