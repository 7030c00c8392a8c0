// What <mlsys/ptx.cuh> means on a processor. There each wrapper is explained; here are its doors to async.cpp.
//
// Copies, and wgmma's products, take effect as late as the program allows: when it waits for them, or when no thread
// can go on without. A forgotten wait thus gives wrong numbers at every run, not at one in a thousand.
#pragma once
#include "mlsys_half.h"

// A tensor in global memory and the box of it that one copy moves. Made by Python: mlsys.kernels.cuda.tensor_map. The
// driver's has 128 bytes, too.
struct CUtensorMap {
  uint64_t magic, base;
  uint64_t size[3];    // elements, the innermost first
  uint64_t stride[2];  // bytes from row to row, from matrix to matrix
  uint32_t box[3];
  uint32_t dimensions, element, swizzle;  // bytes of an element; 0 or 128
  uint64_t unused[6];
};
static_assert(sizeof(CUtensorMap) == 128, "as the driver's");

namespace mlsys {
struct MatrixAt {
  const void *start;
  int leading, stride;
};  // of wgmma: where it lies in shared memory

void warp_mma(int k, Format factors, const void *a, const void *b, float *d, const char *file, int line);
void load_matrices(int count, bool transposed, unsigned *r, const void *row, const char *file, int line);
bool elect(const char *file, int line);
void arrive_block(int id, int expected, const char *file, int line);
void sync_block(int id, int expected, const char *file, int line);
void copy_async(void *to, const void *from, int bytes, int from_bytes, const char *file, int line);
void copy_commit();
void copy_wait(int left);
void copy_wait_all();
void mbarrier_init(void *b, unsigned count, const char *file, int line);
void mbarrier_arrive(void *b, unsigned bytes, const char *file, int line);
void mbarrier_expect(void *b, unsigned bytes, const char *file, int line);
bool mbarrier_wait(void *b, unsigned parity, bool may_fail, const char *file, int line);
void mbarrier_invalidate(void *b, const char *file, int line);
void bulk_load(void *to, const void *from, unsigned bytes, void *barrier, const char *file, int line);
void tensor_load(void *to, const void *map, void *barrier, int x, int y, int z, int dimensions, const char *file,
                 int line);
void tensor_store(const void *map, const void *from, int x, int y, int z, int dimensions, const char *file, int line);
void bulk_commit();
void bulk_wait(int left);
void wgmma(int n, Format factors, bool a_by_columns, bool b_by_rows, float *d, MatrixAt a, MatrixAt b, bool add,
           const char *file, int line);
void wgmma_commit();
void wgmma_wait(int left, const char *file, int line);
}  // namespace mlsys

namespace mlsys::ptx {
#define MLSYS_PTX __forceinline__

using matrix_desc = MatrixAt;
struct mbarrier {
  unsigned long long state;
};
template <class T>
inline constexpr Format format_of = Format::float32;
template <>
inline constexpr Format format_of<__half> = Format::half;
template <>
inline constexpr Format format_of<__nv_bfloat16> = Format::bfloat16;

// --- warp: matrices of 8 x 8, products -------------------------------------------------------------------------------
template <int Count>
MLSYS_PTX void ldmatrix(unsigned (&r)[Count], const void *row, MLSYS_AT) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  load_matrices(Count, false, r, row, file, line);
}
template <int Count>
MLSYS_PTX void ldmatrix_trans(unsigned (&r)[Count], const void *row, MLSYS_AT) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  load_matrices(Count, true, r, row, file, line);
}
template <class T>
MLSYS_PTX void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], MLSYS_AT) {
  static_assert(format_of<T> != Format::float32, "mma_m16n8k16 multiplies __half or __nv_bfloat16");
  warp_mma(16, format_of<T>, a, b, d, file, line);
}
MLSYS_PTX void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], MLSYS_AT) {
  warp_mma(8, Format::tf32, a, b, d, file, line);
}
MLSYS_PTX unsigned to_tf32(float x) { return as_bits<unsigned>(float_to_tf32(x)); }
MLSYS_PTX bool elect_one(MLSYS_AT) { return elect(file, line); }

// --- barriers of some warps ------------------------------------------------------------------------------------------
MLSYS_PTX void bar_sync(int id, int threads, MLSYS_AT) { sync_block(id, threads, file, line); }
MLSYS_PTX void bar_arrive(int id, int threads, MLSYS_AT) { arrive_block(id, threads, file, line); }

// --- asynchronous copies of a thread ---------------------------------------------------------------------------------
template <int Bytes>
MLSYS_PTX void cp_async(void *to, const void *from, int from_bytes = Bytes, MLSYS_AT) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  copy_async(to, from, Bytes, from_bytes, file, line);
}
template <int Bytes>
MLSYS_PTX void cp_async_ca(void *to, const void *from, int from_bytes = Bytes, MLSYS_AT) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  copy_async(to, from, Bytes, from_bytes, file, line);
}
MLSYS_PTX void cp_async_commit() { copy_commit(); }
template <int Left>
MLSYS_PTX void cp_async_wait() {
  copy_wait(Left);
}
MLSYS_PTX void cp_async_wait_all() { copy_wait_all(); }

// --- mbarriers -------------------------------------------------------------------------------------------------------
MLSYS_PTX void mbarrier_init(mbarrier *b, unsigned count, MLSYS_AT) { mlsys::mbarrier_init(b, count, file, line); }
MLSYS_PTX void mbarrier_inval(mbarrier *b, MLSYS_AT) { mbarrier_invalidate(b, file, line); }
MLSYS_PTX void fence_mbarrier_init() {}
MLSYS_PTX void fence_proxy_async() {}
MLSYS_PTX void mbarrier_arrive(mbarrier *b, MLSYS_AT) { mlsys::mbarrier_arrive(b, 0, file, line); }
MLSYS_PTX void mbarrier_arrive_expect_tx(mbarrier *b, unsigned bytes, MLSYS_AT) {
  mlsys::mbarrier_arrive(b, bytes, file, line);
}
MLSYS_PTX void mbarrier_expect_tx(mbarrier *b, unsigned bytes, MLSYS_AT) { mbarrier_expect(b, bytes, file, line); }
MLSYS_PTX bool mbarrier_try_wait(mbarrier *b, unsigned parity, MLSYS_AT) {
  return mlsys::mbarrier_wait(b, parity, true, file, line);
}
MLSYS_PTX void mbarrier_wait(mbarrier *b, unsigned parity, MLSYS_AT) {
  mlsys::mbarrier_wait(b, parity, false, file, line);
}

// --- bulk copies and the tensor memory accelerator -------------------------------------------------------------------
MLSYS_PTX void prefetch_tensor_map(const CUtensorMap *) {}
MLSYS_PTX void bulk_load(void *to, const void *from, unsigned bytes, mbarrier *b, MLSYS_AT) {
  mlsys::bulk_load(to, from, bytes, b, file, line);
}
MLSYS_PTX void tma_load_2d(void *to, const CUtensorMap *map, mbarrier *b, int x, int y, MLSYS_AT) {
  tensor_load(to, map, b, x, y, 0, 2, file, line);
}
MLSYS_PTX void tma_load_3d(void *to, const CUtensorMap *map, mbarrier *b, int x, int y, int z, MLSYS_AT) {
  tensor_load(to, map, b, x, y, z, 3, file, line);
}
MLSYS_PTX void tma_store_2d(const CUtensorMap *map, const void *from, int x, int y, MLSYS_AT) {
  tensor_store(map, from, x, y, 0, 2, file, line);
}
MLSYS_PTX void tma_store_3d(const CUtensorMap *map, const void *from, int x, int y, int z, MLSYS_AT) {
  tensor_store(map, from, x, y, z, 3, file, line);
}
MLSYS_PTX void bulk_commit() { mlsys::bulk_commit(); }
template <int Left>
MLSYS_PTX void bulk_wait() {
  mlsys::bulk_wait(Left);
}
template <int Left>
MLSYS_PTX void bulk_wait_read() {
  mlsys::bulk_wait(Left);
}

// --- wgmma -----------------------------------------------------------------------------------------------------------
MLSYS_PTX matrix_desc wgmma_desc(const void *start, int leading = 16, int stride = 1024) {
  return {start, leading, stride};
}
MLSYS_PTX void wgmma_fence() {}
template <int N, class T, int TransA = 0, int TransB = 0>
MLSYS_PTX void wgmma(float (&d)[N / 2], matrix_desc a, matrix_desc b, int scale_d = 1, MLSYS_AT) {
  static_assert(N == 64 || N == 128 || N == 256, "wgmma is wrapped for N = 64, 128 and 256");
  static_assert(format_of<T> != Format::float32, "wgmma multiplies __half or __nv_bfloat16");
  mlsys::wgmma(N, format_of<T>, TransA, TransB, d, a, b, scale_d != 0, file, line);
}
MLSYS_PTX void wgmma_commit() { mlsys::wgmma_commit(); }
template <int Left>
MLSYS_PTX void wgmma_wait(MLSYS_AT) {
  mlsys::wgmma_wait(Left, file, line);
}
template <int Registers>
MLSYS_PTX void setmaxnreg_inc() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256, a multiple of 8");
}
template <int Registers>
MLSYS_PTX void setmaxnreg_dec() {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0, "24 to 256, a multiple of 8");
}
template <bool Never = false>
inline unsigned cluster_rank() {
  static_assert(Never, "clusters of blocks do not run on a processor");
  return 0;
}
#undef MLSYS_PTX
}  // namespace mlsys::ptx

// --- the names of cuda_pipeline.h ------------------------------------------------------------------------------------
__forceinline__ void __pipeline_memcpy_async(void *to, const void *from, size_t bytes, size_t zeros = 0, MLSYS_AT) {
  mlsys::copy_async(to, from, (int)bytes, (int)(bytes - zeros), file, line);
}
__forceinline__ void __pipeline_commit() { mlsys::copy_commit(); }
__forceinline__ void __pipeline_wait_prior(size_t left) { mlsys::copy_wait((int)left); }
