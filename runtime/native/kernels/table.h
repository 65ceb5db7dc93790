// The table of one instruction set's kernels. Compiled by kernels/isa_*.cpp, each with its own flags and DEPTHWIRE_ISA.
#include "inter_rows.h"

namespace depthwire::DEPTHWIRE_ISA {

extern const Kernels kTable[3];
const Kernels kTable[3] = {
    {read_rows<float>, inter_rows<float>, widen_all<float>},
    {read_rows<f16>, inter_rows<f16>, widen_all<f16>},
    {read_rows<bf16>, inter_rows<bf16>, widen_all<bf16>},
};

}  // namespace depthwire::DEPTHWIRE_ISA
