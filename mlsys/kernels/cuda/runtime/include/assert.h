// A failed assertion ends the launch, not the process. Included again, it must mean this again: no guard.
#undef assert
#define assert(c) ((c) ? (void)0 : mlsys::fail(#c, __FILE__, __LINE__))
