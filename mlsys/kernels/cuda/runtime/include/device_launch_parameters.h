// See mlsys_cuda.h.
#pragma once
#include "mlsys_cuda.h"
