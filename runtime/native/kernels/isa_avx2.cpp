#define DEPTHWIRE_ISA avx2
#include "table.h"
