// Asynchronous copies, mbarriers, tensor copies and wgmma; test_async.py compares with torch.
#include <cuda_pipeline.h>
#include <mlsys/ptx.cuh>

using namespace mlsys;

// --- cp.async --------------------------------------------------------------------------------------------------------

// y = x reversed in each block of 4 · 128 floats, copied asynchronously; n may end inside a block.
__global__ void reversed(int n, int waits, const float *x, float *y) {
  __shared__ __align__(16) float s[512];
  int first = blockIdx.x * 512 + threadIdx.x * 4, left = min(max(n - first, 0), 4);
  ptx::cp_async<16>(&s[threadIdx.x * 4], left ? x + first : x, left * 4);
  ptx::cp_async_commit();
  if (waits) ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) {
    int at = blockIdx.x * 512 + 511 - (threadIdx.x * 4 + i);
    if (at < n) y[at] = s[threadIdx.x * 4 + i];
  }
}
// Three stages; every wait leaves the two youngest groups under way.
__global__ void stages(int n, int enough, const float *x, float *y) {
  __shared__ float s[4][32];
  for (int k = 0; k < 3; k++) {
    if (k < n) ptx::cp_async<4>(&s[k][threadIdx.x], &x[k * 32 + threadIdx.x]);
    ptx::cp_async_commit();
  }
  for (int k = 0; k < n; k++) {
    if (enough) ptx::cp_async_wait<2>();
    else ptx::cp_async_wait<3>();
    __syncthreads();
    y[k * 32 + threadIdx.x] = s[k % 4][31 - threadIdx.x];
    if (k + 3 < n) ptx::cp_async<4>(&s[(k + 3) % 4][threadIdx.x], &x[(k + 3) * 32 + threadIdx.x]);
    ptx::cp_async_commit();
  }
}
__global__ void pipeline(const float2 *x, float2 *y) {
  __shared__ float2 s[32];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 8, threadIdx.x % 2 ? 4 : 0);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void copy_crooked(const float *x, float *y) {
  __shared__ __align__(16) float s[132];
  ptx::cp_async<16>(&s[threadIdx.x * 4 + 1], x + threadIdx.x * 4);
  ptx::cp_async_wait_all();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void copy_past_the_end(const float *x, float *y) {
  __shared__ __align__(16) float s[128];
  ptx::cp_async<16>(&s[threadIdx.x * 4], x + threadIdx.x * 4);
  ptx::cp_async_wait_all();
  y[threadIdx.x] = s[threadIdx.x * 4];
}

// --- barriers of some warps ------------------------------------------------------------------------------------------

// Warp 0 hands 32 numbers a round to warp 1, which hands back that it has read them.
__global__ void two_warps(int rounds, int hands_back, int *y) {
  __shared__ int s[32];
  int lane = threadIdx.x % 32;
  for (int r = 0; r < rounds; r++) {
    if (threadIdx.x < 32) {
      if (hands_back && r) ptx::bar_sync(2, 64);
      s[lane] = r * 100 + lane;
      ptx::bar_arrive(1, 64);
    } else {
      ptx::bar_sync(1, 64);
      y[r * 32 + lane] = s[31 - lane];
      if (hands_back && r < rounds - 1) ptx::bar_arrive(2, 64);
    }
  }
}
__global__ void elected(int *y) {
  if (ptx::elect_one()) y[threadIdx.x / 32] += 1;
}
__global__ void barrier_counts(int *y) {
  ptx::bar_sync(1, threadIdx.x < 32 ? 64 : 96);
  y[threadIdx.x] = 1;
}

// --- mbarriers -------------------------------------------------------------------------------------------------------

// A ring of two buffers between warp 0, which writes, and warp 1, which reads.
__global__ void ring(int rounds, int consumers, int *y) {
  __shared__ int s[2][32];
  __shared__ ptx::mbarrier full[2], empty[2];
  int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(&full[i], 32);
      ptx::mbarrier_init(&empty[i], consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int r = 0; r < rounds; r++) {
    int at = r % 2, parity = r / 2 % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(&empty[at], parity ^ 1);
      s[at][lane] = r * 100 + lane;
      ptx::mbarrier_arrive(&full[at]);
    } else {
      while (!ptx::mbarrier_try_wait(&full[at], parity)) {}
      y[r * 32 + lane] = s[at][31 - lane];
      ptx::mbarrier_arrive(&empty[at]);
    }
  }
}
// The consumer reads without waiting for the phase.
__global__ void ring_without_wait(int *y) {
  __shared__ int s[32];
  __shared__ ptx::mbarrier full;
  if (threadIdx.x == 0) ptx::mbarrier_init(&full, 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    s[threadIdx.x] = threadIdx.x;
    ptx::mbarrier_arrive(&full);
  } else {
    y[threadIdx.x - 32] = s[threadIdx.x - 32];
  }
}
__global__ void too_many_arrivals(int *y) {
  __shared__ ptx::mbarrier b;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&b, 1);
    ptx::mbarrier_arrive_expect_tx(&b, 16);
    ptx::mbarrier_arrive(&b);
  }
  y[0] = 1;
}
__global__ void never_initialised(int *y) {
  __shared__ ptx::mbarrier b;
  ptx::mbarrier_wait(&b, 0);
  y[0] = 1;
}
// Initialised by thread 0, used by thread 32, nothing between.
__global__ void used_too_early(int *y) {
  __shared__ ptx::mbarrier b;
  if (threadIdx.x == 0) ptx::mbarrier_init(&b, 1);
  if (threadIdx.x == 32) ptx::mbarrier_arrive(&b);
  y[threadIdx.x] = 1;
}
__global__ void never_ends(int tries, int *y) {
  __shared__ ptx::mbarrier b;
  if (threadIdx.x == 0) ptx::mbarrier_init(&b, 33);
  __syncthreads();
  ptx::mbarrier_arrive(&b);
  if (tries) while (!ptx::mbarrier_try_wait(&b, 0)) {}
  else ptx::mbarrier_wait(&b, 0);
  y[threadIdx.x] = 1;
}

// --- bulk and tensor copies ------------------------------------------------------------------------------------------

__global__ void bulk(int waits, const float *x, float *y) {
  __shared__ __align__(128) float s[256];
  __shared__ ptx::mbarrier b;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&b, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&b, 1024);
    ptx::bulk_load(s, x, 1024, &b);
  }
  if (waits) ptx::mbarrier_wait(&b, 0);
  y[threadIdx.x] = s[255 - threadIdx.x];
}

// One box of x to one box of y, as it lies in shared memory in `seen`; -1 where nothing came.
__global__ void boxes(int elements, int bytes, int waits, const __grid_constant__ CUtensorMap from,
                      const __grid_constant__ CUtensorMap to, int x, int y, int to_x, int to_y, float *seen,
                          const float *in, float *out) {
  extern __shared__ __align__(1024) float s[];
  __shared__ ptx::mbarrier b;
  for (int i = threadIdx.x; i < elements; i += blockDim.x) s[i] = -1;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&from);
    ptx::mbarrier_init(&b, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(&b, bytes);
    ptx::tma_load_2d(s, &from, &b, x, y);
  }
  if (waits) ptx::mbarrier_wait(&b, 0);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) seen[i] = s[i];
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&to, s, to_x, to_y);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}
__global__ void boxes_3d(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int x,
    int y, int z) {
  __shared__ __align__(128) float s[2 * 3 * 8];
  __shared__ ptx::mbarrier b;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&b, 1);
    ptx::mbarrier_arrive_expect_tx(&b, sizeof s);
    ptx::tma_load_3d(s, &from, &b, x, y, z);
    ptx::mbarrier_wait(&b, 0);
    ptx::tma_store_3d(&to, s, x, y, z);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}
__global__ void store_unwaited(const __grid_constant__ CUtensorMap to, float *out) {
  __shared__ __align__(1024) float s[8 * 32];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 1;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&to, s, 0, 0);
    ptx::bulk_commit();
  }
}
// The buffer is written again before the store has read it.
__global__ void store_overwritten(int waits, const __grid_constant__ CUtensorMap to, float *out) {
  __shared__ __align__(1024) float s[8 * 32];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 1;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&to, s, 0, 0);
    ptx::bulk_commit();
    if (waits) ptx::bulk_wait_read<0>();
    s[0] = 2;
    ptx::bulk_wait<0>();
  }
}

// --- wgmma -----------------------------------------------------------------------------------------------------------

// c[64][N] = a · b over K of a multiple of 64, one warpgroup; a is M x K. b is N x K, or K x N if by_rows: boxes of 64
// columns. a is K x M if a_by_columns.
template <int N, class T, bool a_by_columns, bool b_by_rows>
__device__ void product(const CUtensorMap &ma, const CUtensorMap &mb, int K, int waits, float *c) {
  __shared__ __align__(1024) T sa[64 * 64];
  __shared__ __align__(1024) T sb[N * 64];
  __shared__ ptx::mbarrier full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  float d[N / 2] = {};
  for (int k = 0; k < K; k += 64) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(&full, sizeof sa + sizeof sb);
      ptx::tma_load_2d(sa, &ma, &full, a_by_columns ? 0 : k, a_by_columns ? k : 0);
      if (b_by_rows) for (int n = 0; n < N; n += 64) ptx::tma_load_2d(sb + n * 64, &mb, &full, n, k);
      else ptx::tma_load_2d(sb, &mb, &full, k, 0);
    }
    if (waits) ptx::mbarrier_wait(&full, k / 64 % 2);
    ptx::wgmma_fence();
    for (int i = 0; i < 64; i += 16) {
      ptx::matrix_desc x = ptx::wgmma_desc(a_by_columns ? sa + i * 64 : sa + i, 8192);
      ptx::matrix_desc y = ptx::wgmma_desc(b_by_rows ? sb + i * 64 : sb + i, 8192);
      ptx::wgmma<N, T, a_by_columns, b_by_rows>(d, x, y);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncthreads();
  }
  int t = threadIdx.x;
  for (int i = 0; i < N / 2; i++)
    c[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
}
__global__ void product_64(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, int K,
    int waits,
                           float *c, const __half *a, const __half *b) {
  product<64, __half, false, false>(ma, mb, K, waits, c);
}
__global__ void product_128(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, int K,
    int waits,
                           float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
  product<128, __nv_bfloat16, false, false>(ma, mb, K, waits, c);
}
__global__ void product_256(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, int K,
    int waits,
                           float *c, const __half *a, const __half *b) {
  product<256, __half, false, false>(ma, mb, K, waits, c);
}
__global__ void product_64_columns_rows(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb,
    int K, int waits,
                           float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
  product<64, __nv_bfloat16, true, true>(ma, mb, K, waits, c);
}
__global__ void product_128_columns(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb,
    int K, int waits,
                           float *c, const __half *a, const __half *b) {
  product<128, __half, true, false>(ma, mb, K, waits, c);
}
__global__ void product_256_rows(const __grid_constant__ CUtensorMap ma, const __grid_constant__ CUtensorMap mb, int K,
    int waits,
                           float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b) {
  product<256, __nv_bfloat16, false, true>(ma, mb, K, waits, c);
}

// A producer warp and two consumer warpgroups, each with 64 rows of a, a ring of two stages. One thread of a warpgroup
// says that it has read.
__global__ void __launch_bounds__(384, 1) specialised(const __grid_constant__ CUtensorMap ma,
    const __grid_constant__ CUtensorMap mb,
                                                   int K, int waits_for_empty, float *c, const __half *a,
                                                       const __half *b) {
  extern __shared__ __align__(1024) char memory[];
  __half *sa = (__half *)memory, *sb = sa + 2 * 128 * 64;
  __shared__ ptx::mbarrier full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], 2);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  int group = threadIdx.x / 128;
  if (group == 0) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == 0)
      for (int k = 0; k < K / 64; k++) {
        int at = k % 2;
        if (waits_for_empty) ptx::mbarrier_wait(&empty[at], k / 2 % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(&full[at], (128 + 64) * 64 * 2);
        ptx::tma_load_2d(sa + at * 128 * 64, &ma, &full[at], k * 64, 0);
        ptx::tma_load_2d(sb + at * 64 * 64, &mb, &full[at], k * 64, 0);
      }
  } else {
    ptx::setmaxnreg_inc<240>();
    int t = threadIdx.x % 128;
    float d[32];
    for (int k = 0; k < K / 64; k++) {
      int at = k % 2;
      ptx::mbarrier_wait(&full[at], k / 2 % 2);
      ptx::wgmma_fence();
      for (int i = 0; i < 64; i += 16)
        ptx::wgmma<64, __half>(d, ptx::wgmma_desc(sa + at * 128 * 64 + (group - 1) * 64 * 64 + i),
                               ptx::wgmma_desc(sb + at * 64 * 64 + i), k + i > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (t == 0) ptx::mbarrier_arrive(&empty[at]);
    }
    for (int i = 0; i < 32; i++)
      c[((group - 1) * 64 + t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
  }
}
// The sum is read before the wait.
__global__ void read_too_early(float *c) {
  __shared__ __align__(1024) __half s[64 * 64];
  for (int i = threadIdx.x; i < 64 * 64; i += 128) s[i] = __float2half(1.0f);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[32] = {};
  ptx::wgmma_fence();
  ptx::wgmma<64, __half>(d, ptx::wgmma_desc(s), ptx::wgmma_desc(s));
  ptx::wgmma_commit();
  c[threadIdx.x] = d[0];
  ptx::wgmma_wait<0>();
  c[128 + threadIdx.x] = d[0];
}
__global__ void disagreeing(float *c) {
  __shared__ __align__(1024) __half s[64 * 128];
  float d[32] = {};
  ptx::wgmma<64, __half>(d, ptx::wgmma_desc(s + threadIdx.x / 64 * 64), ptx::wgmma_desc(s));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  c[threadIdx.x] = d[0];
}
