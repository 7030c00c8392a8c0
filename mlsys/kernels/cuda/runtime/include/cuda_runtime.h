// All of it that a kernel needs is included before every kernel file: mlsys_cuda.h.
#pragma once
#include "mlsys_cuda.h"
