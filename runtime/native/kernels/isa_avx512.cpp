#define DEPTHWIRE_ISA avx512
#include "table.h"
