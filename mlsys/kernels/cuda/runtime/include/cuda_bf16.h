// bfloat16: see mlsys_half.h.
#pragma once
#include "mlsys_half.h"
