// Paged GQA decode attention for Hopper: every warp is a pipeline of its own.
//
// The pages of all (request, kv head) items form one flat list, kv heads fastest. It is cut into
// equal ranges, one a worker; a worker is one warp, which copies its pages by TMA into a private
// ring of stages in shared memory, computes on the oldest and reuses its stage. No warp waits for
// another: one that ends an item delays nobody, and nothing spins (a waiting warp is suspended).
//
// A page is computed with keys as rows and the query heads of the kv head as columns, so that a
// group of 8 heads fills a tensor-core tile: S^T = K Q^T, then O^T = V^T P^T. The softmax is in
// base 2 with a lazy reference: sums and outputs are rescaled only when a score exceeds the
// reference by LAZY_LOG2, which costs one vote a page and no reduction over lanes.
//
// An item that several workers share is left in fp32 partials; the last of them to arrive merges
// all in the order of the workers. Nobody waits, so that any number of blocks may be resident.
//
// Macros: HEAD_DIM (64, 128), GROUP (query heads of a kv head, 1 to 16), WARPS, STAGES (of a warp),
// MIN_PAGES (least pages of a worker), MIN_FRAGMENT (least pages of a part of an item, at most
// MIN_PAGES), EVICT_FIRST (0, 1: L2 policy of keys and values).

#include "hopper.cuh"

constexpr int PAGE = 16;
constexpr int THREADS = 32 * WARPS;
constexpr int HALF_BYTES = PAGE * 128;  // 64 columns of a page, one swizzled row of 128 bytes a key
constexpr int TILE_BYTES = HEAD_DIM / 64 * HALF_BYTES;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;  // keys, then values
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int TILES = (GROUP + 7) / 8;        // tiles of 8 query heads
constexpr int PART_CELLS = STEPS * 32 + 4;    // float4 of a partial and tile: outputs, statistics
constexpr int WORK_CELLS = TILES * PART_CELLS;
constexpr uint32 ALL = 0xffffffffu;
constexpr float NO_REFERENCE = -1e30f;
constexpr float LAZY_LOG2 = 8.0f;

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head dimension");
static_assert(GROUP >= 1 && GROUP <= 16, "query heads of a kv head");
static_assert(STAGES >= 2 && STAGES <= 32 && WARPS >= 1 && WARPS <= 32, "ring");
static_assert(MIN_FRAGMENT >= 1 && MIN_FRAGMENT <= MIN_PAGES, "a range may not skip a fragment");

// ---- instructions -------------------------------------------------------------------------------

__device__ __forceinline__ uint64 stream_policy() {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copy block `block` of the pool (16 keys of one kv head) to shared memory.
__device__ __forceinline__ void copy_tile(uint32 target, const TensorMap& map, uint32 barrier, int block,
                                          uint64 policy) {
#if EVICT_FIRST
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %3, %3, %4}], [%2], %5;" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(0), "r"(block), "l"(policy)
      : "memory");
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %3, %3, %4}], [%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(0), "r"(block)
      : "memory");
#endif
}

__device__ __forceinline__ void load_matrices(uint32 (&a)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(uint32 (&a)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Transpose an 8 x 8 matrix of 16-bit elements held two a lane.
__device__ __forceinline__ uint32 transpose(uint32 rows) {
  uint32 columns;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// From L2, where other SMs' writes are.
__device__ __forceinline__ float4 load_l2(const float4* address) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

// ---- division of the work -----------------------------------------------------------------------

struct Requests {
  const int* kv_lens;
  const int* row_ids;
  const int* page_table;
  int table_stride;
  int num_rows;
  int num_kv_heads;
};

__device__ __forceinline__ int num_pages(int kv_len) { return (kv_len + PAGE - 1) / PAGE; }

// starts[r] = pages of the requests before r, for one kv head; returns those of all. Block-wide.
__device__ __forceinline__ int sum_pages(int* starts, int* warp_sums, const Requests& requests) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  for (int r = thread; r < requests.num_rows; r += THREADS)
    starts[r] = num_pages(requests.kv_lens[r]);
  __syncthreads();
  // An odd number of requests a thread spreads the threads over the banks.
  const int chunk = ((requests.num_rows + THREADS - 1) / THREADS) | 1;
  const int first = min(thread * chunk, requests.num_rows);
  const int end = min(first + chunk, requests.num_rows);
  int sum = 0;
  for (int r = first; r < end; ++r) sum += starts[r];
  int inclusive = sum;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(ALL, inclusive, offset);
    if (lane >= offset) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int start = inclusive - sum, total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) start += warp_sums[w];
    total += warp_sums[w];
  }
  for (int r = first; r < end; ++r) {
    const int pages = starts[r];
    starts[r] = start;
    start += pages;
  }
  if (thread == 0) starts[requests.num_rows] = total;
  __syncthreads();
  return total;
}

struct Position {
  int request, head, page;
  int pages;  // of the item
};

// Where page `flat` of the flat list is; warp-wide, 32 probes a round.
__device__ __forceinline__ Position locate(const int* starts, const Requests& requests, int flat,
                                           int lane) {
  int low = 0, span = requests.num_rows;
  while (span > 1) {
    const int step = (span + 31) / 32, probe = lane * step;
    const bool is_at_or_before =
        probe < span && starts[low + probe] * requests.num_kv_heads <= flat;
    const int last = __popc(__ballot_sync(ALL, is_at_or_before)) - 1;
    low += last * step;
    span = min(step, span - last * step);
  }
  const int pages = starts[low + 1] - starts[low];
  const int within = flat - starts[low] * requests.num_kv_heads;
  return {low, within / pages, within % pages, pages};
}

// First page of worker `worker`: an equal share of all, but no cut leaves a part of an item of
// fewer than MIN_FRAGMENT pages.
__device__ __forceinline__ int range_start(const int* starts, const Requests& requests, int worker,
                                           int num_workers, int total, int lane) {
  const int flat = static_cast<int>(static_cast<uint64>(total) * worker / num_workers);
  if (flat >= total) return total;
  const Position at = locate(starts, requests, flat, lane);
  if (at.page < MIN_FRAGMENT) return flat - at.page;
  if (at.pages - at.page < MIN_FRAGMENT) return flat + at.pages - at.page;
  return flat;
}

// How many workers' cuts, before they move, are below page `flat`: cut v is total v / num_workers.
__device__ __forceinline__ int cuts_below(int flat, int num_workers, int total) {
  return static_cast<int>((static_cast<uint64>(flat) * num_workers + total - 1) / total);
}

// Up to 32 consecutive pages of one item; lane i holds the number of page `page + i`.
struct Pages {
  int row, head, kv_len, page, count;
  int numbers;
};

// Hands out a worker's range. Lengths and rows are loaded a request ahead.
struct Walk {
  int request, head, page;
  int kv_len, row, next_kv_len, next_row;
  int left;

  __device__ __forceinline__ void look_ahead(const Requests& requests) {
    const int next = min(request + 1, requests.num_rows - 1);
    next_kv_len = requests.kv_lens[next];
    next_row = requests.row_ids[next];
  }

  __device__ __forceinline__ Pages take(const Requests& requests, int lane) {
    const int pages = num_pages(kv_len);
    Pages taken = {row, head, kv_len, page, min(32, min(pages - page, left)), 0};
    if (lane < taken.count)
      taken.numbers = requests.page_table[static_cast<long long>(request) * requests.table_stride +
                                          page + lane];
    page += taken.count;
    left -= taken.count;
    if (page == pages && left > 0) {
      page = 0;
      if (++head == requests.num_kv_heads) {
        head = 0;
        do {
          ++request;
          kv_len = next_kv_len;
          row = next_row;
          look_ahead(requests);
        } while (kv_len <= 0);
      }
    }
    return taken;
  }
};

// ---- attention of one page ----------------------------------------------------------------------

// Running softmax of one item. Lane 4 g + t holds query heads 2 t and 2 t + 1 of each tile, and of
// step m the output dimensions 16 m + g and 16 m + 8 + g: (dim, head), (dim, head + 1),
// (dim + 8, head), (dim + 8, head + 1). `sum` covers the lane's keys only until `finish`.
struct Attention {
  uint32 q[TILES][STEPS][2];
  float out[TILES][STEPS][4];
  float reference[TILES][2];
  float sum[TILES][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      reference[n][0] = reference[n][1] = NO_REFERENCE;
      sum[n][0] = sum[n][1] = 0.0f;
#pragma unroll
      for (int m = 0; m < STEPS; ++m)
        out[n][m][0] = out[n][m][1] = out[n][m][2] = out[n][m][3] = 0.0f;
    }
  }

  // `queries`: the item's GROUP x HEAD_DIM bf16 values, two a word. Heads beyond the group are 0.
  __device__ __forceinline__ void load_queries(const uint32* queries, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int m = 0; m < STEPS; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          q[n][m][i] =
              n * 8 + g < GROUP ? queries[(n * 8 + g) * (HEAD_DIM / 2) + m * 8 + i * 4 + t] : 0u;
  }

  __device__ __forceinline__ void rescale(int n, int h, float new_reference) {
    const float factor = exp2_fast(reference[n][h] - new_reference);
    reference[n][h] = new_reference;
    sum[n][h] *= factor;
#pragma unroll
    for (int m = 0; m < STEPS; ++m) {
      out[n][m][h] *= factor;
      out[n][m][h + 2] *= factor;
    }
  }

  // Fold a page in. Keys from `num_keys` on are absent, whatever their cells hold.
  template <bool IS_FULL>
  __device__ __forceinline__ void add_page(uint32 stage, int num_keys, float scale, int lane) {
    const int g = lane / 4, t = lane % 4;
    // TMA's 128-byte swizzle: chunk c of 16 bytes in row r lies at c ^ (r % 8).
    const int k_row = lane % 16, v_row = lane % 8 + lane / 16 * 8;
    const uint32 k_lane = stage + k_row * 128 + ((lane / 16 ^ k_row % 8) << 4);
    const uint32 v_lane = stage + TILE_BYTES + v_row * 128 + ((lane / 8 % 2 ^ v_row % 8) << 4);
    float scores[TILES][2][4] = {};  // two chains: a product's latency is longer than its issue
#pragma unroll
    for (int m = 0; m < STEPS; ++m) {
      uint32 k[4];
      load_matrices(k, (k_lane ^ (m % 4 << 5)) + m / 4 * HALF_BYTES);
#pragma unroll
      for (int n = 0; n < TILES; ++n) multiply(scores[n][m % 2], k, q[n][m]);
    }
    uint32 v[STEPS][4];
#pragma unroll
    for (int m = 0; m < STEPS; ++m)
      load_transposed(v[m], (v_lane ^ (m % 4 << 5)) + m / 4 * HALF_BYTES);

    float x[TILES][4];
    bool exceeds = false;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[n][i] = scores[n][0][i] + scores[n][1][i];
        if (!IS_FULL && g + i / 2 * 8 >= num_keys) x[n][i] = -__int_as_float(0x7f800000);
        exceeds |= fmaf(x[n][i], scale, -reference[n][i % 2]) > LAZY_LOG2;
      }
    if (__any_sync(ALL, exceeds)) {
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float peak = fmaxf(x[n][h], x[n][h + 2]);
          peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, 4));
          peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, 8));
          peak = fmaxf(peak, __shfl_xor_sync(ALL, peak, 16));
          rescale(n, h, fmaxf(reference[n][h], peak * scale));
        }
    }
    uint32 weights[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[n][i] = exp2_fast(fmaf(x[n][i], scale, -reference[n][i % 2]));
        sum[n][i % 2] += x[n][i];
      }
      weights[n][0] = transpose(pack_bf16(x[n][0], x[n][1]));
      weights[n][1] = transpose(pack_bf16(x[n][2], x[n][3]));
    }
    if (!IS_FULL) {
      // A weight of 0 does not silence a NaN in an absent value. Lane: keys 2 t, 2 t + 1 and + 8.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 2 * t + 8 * i;
        const uint32 mask =
            (key < num_keys ? 0xffffu : 0u) | (key + 1 < num_keys ? 0xffff0000u : 0u);
#pragma unroll
        for (int m = 0; m < STEPS; ++m) {
          v[m][2 * i] &= mask;
          v[m][2 * i + 1] &= mask;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < STEPS; ++m)
#pragma unroll
      for (int n = 0; n < TILES; ++n) multiply(out[n][m], v[m], weights[n]);
  }

  // Sum over the lanes that share heads.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2)
          sum[n][h] += __shfl_xor_sync(ALL, sum[n][h], offset);
  }

  __device__ __forceinline__ void store_partial(float4* part, int lane) const {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      float4* cells = part + n * PART_CELLS;
      if (n * 8 + lane % 4 * 2 < GROUP)
#pragma unroll
        for (int m = 0; m < STEPS; ++m)
          cells[m * 32 + lane] = {out[n][m][0], out[n][m][1], out[n][m][2], out[n][m][3]};
      if (lane < 4)
        cells[STEPS * 32 + lane] = {reference[n][0], reference[n][1], sum[n][0], sum[n][1]};
    }
  }

  __device__ __forceinline__ void add_partial(const float4* part, int lane) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float4* cells = part + n * PART_CELLS;
      const float4 statistics = load_l2(cells + STEPS * 32 + lane % 4);
      float4 x[STEPS];
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        x[m] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (n * 8 + lane % 4 * 2 < GROUP) x[m] = load_l2(cells + m * 32 + lane);
      }
      rescale(n, 0, fmaxf(reference[n][0], statistics.x));
      rescale(n, 1, fmaxf(reference[n][1], statistics.y));
      const float weight_0 = exp2_fast(statistics.x - reference[n][0]);
      const float weight_1 = exp2_fast(statistics.y - reference[n][1]);
      sum[n][0] = fmaf(statistics.z, weight_0, sum[n][0]);
      sum[n][1] = fmaf(statistics.w, weight_1, sum[n][1]);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        out[n][m][0] = fmaf(x[m].x, weight_0, out[n][m][0]);
        out[n][m][1] = fmaf(x[m].y, weight_1, out[n][m][1]);
        out[n][m][2] = fmaf(x[m].z, weight_0, out[n][m][2]);
        out[n][m][3] = fmaf(x[m].w, weight_1, out[n][m][3]);
      }
    }
  }

  // `target`: the item's GROUP x HEAD_DIM outputs, two a word.
  __device__ __forceinline__ void store(uint32* target, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const float inverse_0 = 1.0f / sum[n][0], inverse_1 = 1.0f / sum[n][1];
#pragma unroll
      for (int m = 0; m < STEPS; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32 by_head = transpose(
              pack_bf16(out[n][m][2 * i] * inverse_0, out[n][m][2 * i + 1] * inverse_1));
          if (n * 8 + g < GROUP)
            target[(n * 8 + g) * (HEAD_DIM / 2) + m * 8 + i * 4 + t] = by_head;
        }
    }
  }
};

// ---- kernel -------------------------------------------------------------------------------------

// Worker w of block b is w x blocks + b: few workers still spread over all blocks.
// partials: WORK_CELLS float4 for each of 2 x workers (an item begun before the worker's range, and
// one that goes on after it); arrivals: a zero for each worker, zero again when the kernel ends.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode_attention(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                     const uint32* qkv, uint32* out, const int* row_ids, const int* kv_lens,
                     const int* page_table, float4* partials, int* arrivals, int num_rows,
                     int num_kv_heads, int table_stride, int qkv_stride, int out_stride,
                     float scale) {
  extern __shared__ unsigned char shared[];
  // The ring needs 1024-byte alignment for the swizzle; the host adds the slack.
  unsigned char* ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
  int4* records = reinterpret_cast<int4*>(ring + RING_BYTES);  // of a stage: row, head, page, kv_len
  uint64* barriers = reinterpret_cast<uint64*>(records + WARPS * STAGES);
  int* warp_sums = reinterpret_cast<int*>(barriers + WARPS * STAGES);
  int* starts = reinterpret_cast<int*>(ring);  // until the first copies

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Requests requests = {kv_lens, row_ids, page_table, table_stride, num_rows, num_kv_heads};
  records += warp * STAGES;
  const uint32 barrier = shared_address(barriers + warp * STAGES);
  const uint32 stages = shared_address(ring) + warp * STAGES * STAGE_BYTES;
  if (lane < STAGES) mbarrier_init(barrier + lane * 8, 1);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
  }

  const int total = sum_pages(starts, warp_sums, requests) * num_kv_heads;
  const int num_workers = min(static_cast<int>(gridDim.x) * WARPS, max(1, total / MIN_PAGES));
  const int worker = warp * gridDim.x + blockIdx.x;
  int begin = 0, end = 0;
  Position at = {0, 0, 0, 0};
  if (worker < num_workers && total > 0) {
    begin = range_start(starts, requests, worker, num_workers, total, lane);
    end = range_start(starts, requests, worker + 1, num_workers, total, lane);
    if (begin < end) at = locate(starts, requests, begin, lane);
  }
  // The copies must see the barriers, and overwrite `starts` after its last reader.
  fence_mbarrier_init();
  fence_async_shared();
  __syncthreads();
  if (begin >= end) return;

  Walk walk = {at.request, at.head, at.page, kv_lens[at.request], row_ids[at.request], 0, 0,
               end - begin};
  walk.look_ahead(requests);
  Pages current = walk.take(requests, lane), upcoming = walk.take(requests, lane);
  int taken = 0;
  const uint64 policy = stream_policy();
  auto copy_next_page = [&](int stage) {
    if (taken == current.count) {
      current = upcoming;
      upcoming = walk.take(requests, lane);
      taken = 0;
    }
    const int number = __shfl_sync(ALL, current.numbers, taken);
    if (lane == 0) {
      records[stage] = {current.row, current.head, current.page + taken, current.kv_len};
      const uint32 target = stages + stage * STAGE_BYTES, full = barrier + stage * 8;
      const int block = number * num_kv_heads + current.head;
      mbarrier_arrive_expect_bytes(full, STAGE_BYTES);
      copy_tile(target, k_map, full, block, policy);
      copy_tile(target + TILE_BYTES, v_map, full, block, policy);
    }
    ++taken;
  };
  for (int i = 0; i < min(STAGES, end - begin); ++i) copy_next_page(i);
  __syncwarp();

  Attention attention;
  int stage = 0;
  uint32 parity = 0;
  for (int flat = begin; flat < end; ++flat) {
    const int4 record = records[stage];
    const int row = record.x, head = record.y, page = record.z, kv_len = record.w;
    if (flat == begin || page == 0) {
      const long long queries = static_cast<long long>(row) * qkv_stride + head * GROUP * HEAD_DIM;
      attention.load_queries(qkv + queries / 2, lane);
      attention.clear();
    }
    mbarrier_wait(barrier + stage * 8, parity);
    __syncwarp();
    const int num_keys = kv_len - page * PAGE;
    if (num_keys >= PAGE)
      attention.add_page<true>(stages + stage * STAGE_BYTES, PAGE, scale, lane);
    else
      attention.add_page<false>(stages + stage * STAGE_BYTES, num_keys, scale, lane);
    __syncwarp();  // all lanes have read the stage
    if (flat + STAGES < end) copy_next_page(stage);
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }

    const int item_begin = flat - page, item_end = item_begin + num_pages(kv_len);
    if (flat + 1 < end && flat + 1 < item_end) continue;
    attention.finish();
    if (item_begin < begin || item_end > end) {
      // Cuts of the item that did not move to its ends lie MIN_FRAGMENT pages or more within.
      int first = worker, last = worker;
      if (item_begin < begin)
        first = cuts_below(item_begin + MIN_FRAGMENT, num_workers, total) - 1;
      if (item_end > end)
        last = cuts_below(item_end - MIN_FRAGMENT + 1, num_workers, total) - 1;
      // The item goes on after worker `first`, and began before the others.
      attention.store_partial(partials + (2ll * worker + (worker == first)) * WORK_CELLS, lane);
      __threadfence();
      __syncwarp();
      int arrived = 0;
      if (lane == 0) arrived = atomicAdd(arrivals + first, 1);
      if (__shfl_sync(ALL, arrived, 0) != last - first) continue;
      __threadfence();
      attention.clear();
      for (int other = first; other <= last; ++other)
        attention.add_partial(partials + (2ll * other + (other == first)) * WORK_CELLS, lane);
      if (lane == 0) arrivals[first] = 0;
    }
    const long long target = static_cast<long long>(row) * out_stride + head * GROUP * HEAD_DIM;
    attention.store(out + target / 2, lane);
  }
}
