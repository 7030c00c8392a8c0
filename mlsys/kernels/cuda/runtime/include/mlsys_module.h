// The doors of a kernel's library for the runtime; included after the kernel file.
#pragma once
// clang-format off: a definition a line
#define MLSYS_BUILTIN __attribute__((section("mlsys_builtin")))
MLSYS_BUILTIN uint3 threadIdx, blockIdx;
MLSYS_BUILTIN dim3 blockDim, gridDim;
alignas(1024) char mlsys_dynamic_shared[228 * 1024];
#ifdef MLSYS_DEVICE_VARIABLES
MLSYS_HIDDEN __device_variable__ char mlsys_device_last[MLSYS_PAGE] __attribute__((aligned(MLSYS_PAGE))) = {1};
#define MLSYS_DEVICE mlsys_device_first + MLSYS_PAGE, mlsys_device_last
#else
#define MLSYS_DEVICE nullptr, nullptr
#endif
extern "C" MLSYS_HIDDEN char __bss_start[], _end[], __ehdr_start[], etext[];

namespace mlsys {
struct Launch;
struct Module {
  void *thread_index, *block_index, *block_dim, *grid_dim;
  char *shared_lo, *shared_hi, *dynamic, *text_lo, *text_hi, *device_lo, *device_hi;
};
extern "C" int mlsys_run(Launch *, const Module *, void (*)(void *), void *);

static const Module module = {&threadIdx, &blockIdx, &blockDim, &gridDim,
                              __bss_start, _end, mlsys_dynamic_shared, __ehdr_start, etext, MLSYS_DEVICE};
extern "C" __attribute__((visibility("default"))) const Module *mlsys_module() { return &module; }

// What a parameter takes: `f4` a float, `*f4` a pointer to it, `*cf4` to a constant one, `*v4f4` to a float4,
// `s24` another type of 24 bytes.
template <class T> inline void write_code(char *&out);
inline void put(char *&out, const char *s) { while (*s) *out++ = *s++; *out = 0; }
template <class T> inline void write_code(char *&out) {
  using U = std::remove_cv_t<std::remove_reference_t<T>>;
  char s[32];
  if constexpr (std::is_pointer_v<U>) {
    using P = std::remove_pointer_t<U>;
    put(out, std::is_const_v<P> ? "*c" : "*");
    if constexpr (std::is_void_v<std::remove_cv_t<P>>) put(out, "void"); else write_code<P>(out);
  } else if constexpr (Named<U>::value) {
    put(out, Named<U>::name);
  } else if constexpr (std::is_same_v<U, bool>) {
    put(out, "?1");
  } else if constexpr (std::is_enum_v<U>) {
    snprintf(s, sizeof s, "i%d", (int)sizeof(U)); put(out, s);
  } else if constexpr (std::is_arithmetic_v<U>) {
    snprintf(s, sizeof s, "%c%d", std::is_floating_point_v<U> ? 'f' : std::is_signed_v<U> ? 'i' : 'u', (int)sizeof(U)); put(out, s);
  } else {
    snprintf(s, sizeof s, "s%d", (int)sizeof(U)); put(out, s);
  }
}
template <class... A> inline void write_codes(void (*)(A...), char *out) {
  *out = 0;
  (void)std::initializer_list<int>{(write_code<A>(out), put(out, " "), 0)...};
}
template <class... A> inline int launch(void (*kernel)(A...), Launch *record, void **args) {
  Call<A...> call{kernel, args};
  return mlsys_run(record, &module, Call<A...>::body, &call);
}
}  // namespace mlsys

#define MLSYS_EXPORT(NUMBER, ...)                                                                                          \
  extern "C" __attribute__((visibility("default"))) int mlsys_kernel_##NUMBER(mlsys::Launch *record, void **args) {       \
    return mlsys::launch(&__VA_ARGS__, record, args);                                                                     \
  }                                                                                                                       \
  extern "C" __attribute__((visibility("default"))) void mlsys_signature_##NUMBER(char *out) {                            \
    mlsys::write_codes(&__VA_ARGS__, out);                                                                                \
  }
