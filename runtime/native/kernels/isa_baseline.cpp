#define DEPTHWIRE_ISA baseline
#include "table.h"
