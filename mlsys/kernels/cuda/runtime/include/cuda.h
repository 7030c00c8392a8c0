// CUtensorMap, the one type of the driver API that a kernel takes: see mlsys_ptx.h.
#pragma once
#include "mlsys_ptx.h"
