#define DEPTHWIRE_ISA neon
#include "table.h"
