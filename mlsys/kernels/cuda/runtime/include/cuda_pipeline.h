// Asynchronous copies, __pipeline_memcpy_async and its kind: see mlsys_ptx.h.
#pragma once
#include "mlsys_ptx.h"
