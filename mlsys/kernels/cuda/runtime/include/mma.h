// Tensor cores through nvcuda::wmma: see mlsys_wmma.h.
#pragma once
#include "mlsys_wmma.h"
