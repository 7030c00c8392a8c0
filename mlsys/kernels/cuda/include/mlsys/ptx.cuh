// PTX instructions that CUDA C++ has no words for, each as a function: `#include <mlsys/ptx.cuh>`.
//
// On a GPU a function is its one instruction. On a processor (MLSYS_CPU) the same names come from mlsys_ptx.h, so that
// one kernel file runs on both. Names are those of the PTX manual; chapters are given where an instruction has rules
// that its name does not tell.
//
//   sm_80   ldmatrix (sm_75), mma, cp.async
//   sm_90   mbarrier with transaction counts, bulk copies, the tensor memory accelerator, elect
//   sm_90a  wgmma, setmaxnreg: compile with -gencode=arch=compute_90a,code=sm_90a
//
// All pointers to shared memory are ordinary ones. `int x, y` of a tensor copy count elements, x along a row.
#pragma once
#ifdef MLSYS_CPU
#include "mlsys_ptx.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef __CUDACC_RTC__
#include <cuda.h>
#elif !defined(CUDA_VERSION)
struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };   // NVRTC cannot read cuda.h
#endif

namespace mlsys::ptx {
#define MLSYS_PTX __device__ __forceinline__
template <class T> inline constexpr bool is_half = false;
template <> inline constexpr bool is_half<__half> = true;
template <class T> inline constexpr bool is_bfloat16 = false;
template <> inline constexpr bool is_bfloat16<__nv_bfloat16> = true;

MLSYS_PTX unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// --- warp: matrices of 8 x 8, products -------------------------------------------------------------------------------

// Loads Count matrices of 8 x 8 16-bit elements from shared memory. Lane 8·m + i gives the address of row i of matrix m
// (16 bytes, aligned); lane 4·i + j gets elements 2j and 2j + 1 of row i of each matrix. ldmatrix_trans: of column i.
template <int Count> MLSYS_PTX void ldmatrix(unsigned (&r)[Count], const void *row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  unsigned p = shared_address(row);
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
        "=r"(r[1]) : "r"(p) : "memory");
  if constexpr (Count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}
template <int Count> MLSYS_PTX void ldmatrix_trans(unsigned (&r)[Count], const void *row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  unsigned p = shared_address(row);
  if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(p) : "memory");
  if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(p) : "memory");
  if constexpr (Count == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}

// d += a · b for a 16 x 16, b 16 x 8 of __half or __nv_bfloat16, d 16 x 8 of float. With lane = 4·g + j:
//   a[0], a[1]: columns 2j, 2j + 1 of rows g and g + 8; a[2], a[3]: columns 2j + 8, 2j + 9 of these rows
//   b[0], b[1]: rows 2j, 2j + 1 and rows 2j + 8, 2j + 9 of column g
//   d[0], d[1]: columns 2j, 2j + 1 of row g; d[2], d[3]: of row g + 8
template <class T> MLSYS_PTX void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  static_assert(is_half<T> || is_bfloat16<T>, "mma_m16n8k16 multiplies __half or __nv_bfloat16");
  if constexpr (is_half<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for tf32, a 16 x 8, b 8 x 8:
//   a[0], a[1]: column j of rows g and g + 8; a[2], a[3]: column j + 4; b[0], b[1]: rows j and j + 4 of column g
MLSYS_PTX void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A float as tf32: rounded to nearest, ties away from zero.
MLSYS_PTX unsigned to_tf32(float x) {
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// True for one lane of the warp; all 32 call it.
MLSYS_PTX bool elect_one() {
  unsigned elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected) :: "memory");
  return elected;
}

// --- barriers of some warps ------------------------------------------------------------------------------------------

// Barrier `id` of 1 to 15 for `threads` threads, whole warps. Who arrives does not wait, and counts.
MLSYS_PTX void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
MLSYS_PTX void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id),
    "r"(threads) : "memory"); }

// --- asynchronous copies of a thread ---------------------------------------------------------------------------------

// From global to shared memory, both aligned to Bytes; of 4, 8 or 16. The first from_bytes are copied, the rest is
// zero. A thread sees its own copies after cp_async_wait; others after a barrier that follows it.
// cp_async takes 16 bytes past the first-level cache (.cg), cp_async_ca through it, as all smaller copies go.
template <int Bytes> MLSYS_PTX void cp_async_ca(void *to, const void *from, int from_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "n"(Bytes), "r"(from_bytes) : "memory");
}
template <int Bytes> MLSYS_PTX void cp_async(void *to, const void *from, int from_bytes = Bytes) {
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(from_bytes) : "memory");
  else
    cp_async_ca<Bytes>(to, from, from_bytes);
}
// Copies so far, since the last commit, are a group; wait until at most Left of the thread's groups are under way.
MLSYS_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left> MLSYS_PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(Left) : "memory"); }
MLSYS_PTX void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- mbarriers -------------------------------------------------------------------------------------------------------

// In shared memory. Phases have parity 0, 1, 0, …; one ends when `count` arrivals are made and all announced bytes have
// landed. Waiting for parity 1 of a fresh one returns at once, as if a phase before the first were over.
struct mbarrier { unsigned long long state; };

// By one thread; then it calls fence_mbarrier_init, and all threads __syncthreads().
MLSYS_PTX void mbarrier_init(mbarrier *b, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
}
MLSYS_PTX void mbarrier_inval(mbarrier *b) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" :: "r"(shared_address(b)) : "memory");
}
MLSYS_PTX void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Between ordinary writes to shared memory and a bulk copy or wgmma that reads them.
MLSYS_PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
MLSYS_PTX void mbarrier_arrive(mbarrier *b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}
// Arrives, and announces bytes that copies will bring in this phase.
MLSYS_PTX void mbarrier_arrive_expect_tx(mbarrier *b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(b)),
      "r"(bytes) : "memory");
}
MLSYS_PTX void mbarrier_expect_tx(mbarrier *b, unsigned bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" :: "r"(shared_address(b)),
      "r"(bytes) : "memory");
}
// Waits some time for the end of the phase of this parity; whether it is over.
MLSYS_PTX bool mbarrier_try_wait(mbarrier *b, unsigned parity) {
  unsigned over;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(over) : "r"(shared_address(b)), "r"(parity) : "memory");
  return over;
}
MLSYS_PTX void mbarrier_wait(mbarrier *b, unsigned parity) { while (!mbarrier_try_wait(b, parity)) {} }

// --- bulk copies and the tensor memory accelerator -------------------------------------------------------------------

// One thread issues a copy for all. `map` is a parameter of the kernel, `const __grid_constant__ CUtensorMap map`, made
// in Python by mlsys.kernels.cuda.tensor_map; it says how large a box is. Outside the tensor a load brings zeros and a
// store writes nothing. A load counts the whole box's bytes on the mbarrier. With the 128-byte swizzle a tile lies at a
// multiple of 1,024 bytes, and bits 4 to 6 of an address are turned by its bits 7 to 9.
MLSYS_PTX void prefetch_tensor_map(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}
// Plain bytes: aligned to 16, a multiple of 16.
MLSYS_PTX void bulk_load(void *to, const void *from, unsigned bytes, mbarrier *b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
                   "r"(shared_address(b)) : "memory");
}
MLSYS_PTX void tma_load_2d(void *to, const CUtensorMap *map, mbarrier *b, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               :: "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y) : "memory");
}
MLSYS_PTX void tma_load_3d(void *to, const CUtensorMap *map, mbarrier *b, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2];"
               :: "r"(shared_address(to)), "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z) : "memory");
}
// Ordinary writes that a store takes need a fence_proxy_async() by their threads and a barrier before it.
MLSYS_PTX void tma_store_2d(const CUtensorMap *map, const void *from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               :: "l"(map), "r"(shared_address(from)), "r"(x), "r"(y) : "memory");
}
MLSYS_PTX void tma_store_3d(const CUtensorMap *map, const void *from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               :: "l"(map), "r"(shared_address(from)), "r"(x), "r"(y), "r"(z) : "memory");
}
// Stores so far, since the last commit, are a group of this thread. bulk_wait_read: shared memory may be written again.
MLSYS_PTX void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int Left> MLSYS_PTX void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(Left) : "memory"); }
template <int Left> MLSYS_PTX void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(Left) : "memory");
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

// Where a factor lies in shared memory, 128-byte swizzle, as tensor copies of rows of 64 16-bit elements leave it.
//   rows along k (the default): eight rows make 1,024 bytes; `stride` from eight rows to the next eight. The next 16 of
//   k are 32 bytes further on, up to 64.
//   rows along m or n (TransA, TransB = 1): eight k make 1,024 bytes, `stride` from eight k to the next eight;
// `leading`
//   from 64 columns to the next 64.
struct matrix_desc { unsigned long long bits; };
MLSYS_PTX matrix_desc wgmma_desc(const void *start, int leading = 16, int stride = 1024) {
  return {(unsigned long long)((shared_address(start) & 0x3ffff) >> 4) | (unsigned long long)(leading >> 4) << 16 |
          (unsigned long long)(stride >> 4) << 32 | 1ull << 62};
}

// Before the first wgmma, and whenever registers of d were written otherwise.
MLSYS_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MLSYS_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Left> MLSYS_PTX void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(Left) : "memory");
}

#define MLSYS_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MLSYS_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MLSYS_REGISTERS_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MLSYS_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MLSYS_OUT_8(i) MLSYS_OUT_4(i), MLSYS_OUT_4(i + 4)
#define MLSYS_OUT_32(i) MLSYS_OUT_8(i), MLSYS_OUT_8(i + 8), MLSYS_OUT_8(i + 16), MLSYS_OUT_8(i + 24)
#define MLSYS_OUT_64(i) MLSYS_OUT_32(i), MLSYS_OUT_32(i + 32)
#define MLSYS_OUT_128(i) MLSYS_OUT_64(i), MLSYS_OUT_64(i + 64)
// The operands after d: the two factors, whether d is added to, whether the factors are transposed.
#define MLSYS_WGMMA(N, TYPE, COUNT, A, B, SCALE, TRANS_A, TRANS_B)                                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SCALE ", 0;\n"                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MLSYS_REGISTERS_##COUNT "}, "       \
               A ", " B ", p, 1, 1, " TRANS_A ", " TRANS_B ";\n}"                                                      \
               : MLSYS_OUT_##COUNT(0) : "l"(a.bits), "l"(b.bits), "r"(scale_d), "n"(TransA), "n"(TransB))
#define MLSYS_WGMMA_64(TYPE) MLSYS_WGMMA(64, TYPE, 32, "%32", "%33", "%34", "%35", "%36")
#define MLSYS_WGMMA_128(TYPE) MLSYS_WGMMA(128, TYPE, 64, "%64", "%65", "%66", "%67", "%68")
#define MLSYS_WGMMA_256(TYPE) MLSYS_WGMMA(256, TYPE, 128, "%128", "%129", "%130", "%131", "%132")

// d = a · b (+ d if scale_d), a 64 x 16, b 16 x N of __half or __nv_bfloat16, by the 128 threads of four warps. Thread
// t's d[i] is row 16·(t / 32) + t % 32 / 4 + 8·(i / 2 % 2), column 8·(i / 4) + 2·(t % 4) + i % 2. d must stay in its
// place, untouched, until wgmma_wait.
template <int N, class T, int TransA = 0, int TransB = 0>
MLSYS_PTX void wgmma(float (&d)[N / 2], matrix_desc a, matrix_desc b, int scale_d = 1) {
  static_assert(N == 64 || N == 128 || N == 256, "wgmma is wrapped for N = 64, 128 and 256");
  static_assert(is_half<T> || is_bfloat16<T>, "wgmma multiplies __half or __nv_bfloat16");
  if constexpr (N == 64 && is_half<T>) MLSYS_WGMMA_64("f16");
  if constexpr (N == 64 && is_bfloat16<T>) MLSYS_WGMMA_64("bf16");
  if constexpr (N == 128 && is_half<T>) MLSYS_WGMMA_128("f16");
  if constexpr (N == 128 && is_bfloat16<T>) MLSYS_WGMMA_128("bf16");
  if constexpr (N == 256 && is_half<T>) MLSYS_WGMMA_256("f16");
  if constexpr (N == 256 && is_bfloat16<T>) MLSYS_WGMMA_256("bf16");
}

// Registers of each thread of the warpgroup: given back, or taken; a multiple of 8.
template <int Registers> MLSYS_PTX void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(Registers));
}
template <int Registers> MLSYS_PTX void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(Registers));
}
MLSYS_PTX unsigned cluster_rank() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

#undef MLSYS_REGISTERS_32
#undef MLSYS_REGISTERS_64
#undef MLSYS_REGISTERS_128
#undef MLSYS_OUT_4
#undef MLSYS_OUT_8
#undef MLSYS_OUT_32
#undef MLSYS_OUT_64
#undef MLSYS_OUT_128
#undef MLSYS_WGMMA
#undef MLSYS_WGMMA_64
#undef MLSYS_WGMMA_128
#undef MLSYS_WGMMA_256
#undef MLSYS_PTX
}  // namespace mlsys::ptx
#endif
