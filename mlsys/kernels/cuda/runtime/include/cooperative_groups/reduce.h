// Groups of threads: see mlsys_groups.h.
#pragma once
#include "../mlsys_groups.h"
