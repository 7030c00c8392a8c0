// What the checker and the profiler tell each other.
#pragma once
namespace mlsys {
void profile_launch();
void profile_access(char *p, unsigned bytes, int kind, const void *pc, bool shared);
void profile_slice_end(int warp);  // the lanes of a warp have run as far as they could
void profile_finish();
}  // namespace mlsys
