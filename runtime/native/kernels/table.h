// The tables of one instruction set's kernels. Compiled by kernels/isa_*.cpp, each with its own flags and
// DEPTHWIRE_ISA.
#include "inter_rows.h"
#include "select_rows.h"
#include "surprise_rows.h"

namespace depthwire::DEPTHWIRE_ISA {

extern const Kernels kTable[3];
const Kernels kTable[3] = {
    {read_rows<float>, inter_rows<float>, widen_all<float>},
    {read_rows<f16>, inter_rows<f16>, widen_all<f16>},
    {read_rows<bf16>, inter_rows<bf16>, widen_all<bf16>},
};

extern const RoutingKernels kRouting;
const RoutingKernels kRouting = {
    {select_row<float, uint32_t>, select_row<double, uint64_t>},
    {select_budget_row<float>, select_budget_row<double>},
    {surprise_sums<float, float>, surprise_sums<f16, float>, surprise_sums<bf16, float>, surprise_sums<double, double>},
    {surprise_rank<float>, surprise_rank<double>},
};

}  // namespace depthwire::DEPTHWIRE_ISA
