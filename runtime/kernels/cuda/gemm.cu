// Persistent bf16 GEMM for Hopper, out = a w^T: a [M, K] rows, w [N, K] weights, fp32 accumulators.
//
// One CTA per SM of the share. A producer warpgroup keeps a ring of TMA loads going; two consumer
// warpgroups multiply with wgmma and store through shared memory by TMA, so that the next tile's
// loads go on under the epilogue. With CLUSTER = 2 the CTAs of a pair take two row tiles of the
// same columns, and each loads half of the weights for both (multicast): a third less traffic from
// L2.
//
// STREAM_K: whole waves of tiles are dealt out one by one; the last one to two waves are flattened
// into k-steps and dealt out in equal contiguous ranges. A range that starts inside a tile leaves
// its sum in `partials`; the CTA that began the tile adds the sums of the CTAs after it, in their
// order: the same bits in every run. It waits for nobody before it, so there is no cycle; waiting
// CTAs need the later ones to be running or to start later, which they always do.
//
// PINGPONG: the consumers take whole tiles in turn instead of half of the rows each, so that one
// multiplies while the other stores. They follow each other through the same ring: one starts a
// tile when the other has seen all stages of the tile before arrive, since the parity of a
// barrier tells only neighbouring rounds of the ring apart.
//
// Macros: BLOCK_M, BLOCK_N (tile; for SILU counts up and gate columns), STAGES, CLUSTER (1, 2),
// SILU, STREAM_K, PINGPONG (0, 1; not both of the last two).
//
// SILU: w holds the up rows, then as many gate rows (`gate_row` further on); out = silu(gate) up,
// where a tile takes BLOCK_N / 2 columns of each, so that a thread owns both of a pair.
#include "hopper.cuh"
#include "wgmma.cuh"
#include "wgmma_width.cuh"  // generated: wgmma_width() for N = BLOCK_N

namespace {

constexpr int BLOCK_K = 64;  // 128 bytes: one swizzled row
constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;
constexpr int OWNERS = PINGPONG ? 1 : CONSUMERS;        // consumers of one tile
constexpr int TURNS = CONSUMERS / OWNERS;               // tiles until a consumer has its next one
constexpr int TILES_M = BLOCK_M / (64 * OWNERS);        // wgmma tiles of a consumer, along the rows
constexpr int NUM_BOXES = SILU || CLUSTER > 1 ? 2 : 1;  // of weights: up and gate, or one a CTA
constexpr int BOX_ROWS = BLOCK_N / NUM_BOXES;
constexpr int ACCUMULATORS = BLOCK_N / 2;  // per thread and wgmma tile
constexpr int OUT_WIDTH = SILU ? BLOCK_N / 2 : BLOCK_N;
constexpr int CHUNK = 64;  // columns of one TMA store: 128 bytes, swizzled
constexpr int CHUNKS = OUT_WIDTH / CHUNK;
constexpr int TAIL = OUT_WIDTH % CHUNK;  // the rest is stored from registers
constexpr int CHUNK_BYTES = 64 * 128;
constexpr int CHUNK_BUFFERS = 2;

constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2;
constexpr int W_BYTES = BLOCK_N * BLOCK_K * 2;
constexpr int STAGE_BYTES = A_BYTES + W_BYTES;
constexpr int STORE_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = STORE_OFFSET + CONSUMERS * CHUNK_BUFFERS * CHUNK_BYTES;

static_assert(TILES_M * 64 * OWNERS == BLOCK_M, "BLOCK_M must divide into wgmma tiles");
static_assert(!(STREAM_K && PINGPONG), "pieces of tiles take no turns");
static_assert(BOX_ROWS % 8 == 0, "a box of weights must be whole blocks of eight rows");

// How the work is divided; the same in producer and consumers.
struct Division {
  int tiles;        // cluster tiles in all
  int tiles_m;      // cluster tiles along M
  int steps;        // k-steps of a tile
  int whole_tiles;  // dealt out one by one
  int split_units;  // k-steps of the rest
};

struct Output {
  uint16* data;
  long long stride;  // elements between rows
  int rows, columns;
};

struct Segment {
  int tile, first_step, end_step;
};

constexpr int ROW_GROUP = 16 / CLUSTER;  // cluster tiles along M that share weights in L2
constexpr int MIN_STEPS = 4;             // a shorter piece of a tile is left to the neighbour

// First unit of cluster `index`'s range, snapped to a tile when a piece would be too short.
__device__ __forceinline__ int range_start(const Division& division, int index, int clusters) {
  int unit = static_cast<int>(static_cast<long long>(division.split_units) * index / clusters);
  int into = unit % division.steps;
  if (into < MIN_STEPS) return unit - into;
  if (division.steps - into < MIN_STEPS) return unit + division.steps - into;
  return unit;
}

// The n-th piece of work of a cluster; false when there is none.
__device__ __forceinline__ bool segment_of(const Division& division, int n, int cluster,
                                           int clusters, Segment& segment) {
  int tile = cluster + n * clusters;
  if (tile < division.whole_tiles) {
    segment = {tile, 0, division.steps};
    return true;
  }
  if (!STREAM_K) return false;
  n -= division.whole_tiles / clusters;
  int first = range_start(division, cluster, clusters);
  int end = range_start(division, cluster + 1, clusters);
  int split_tile = first / division.steps + n;
  int base = split_tile * division.steps;
  int low = max(first, base), high = min(end, base + division.steps);
  if (low >= high) return false;
  segment = {division.whole_tiles + split_tile, low - base, high - base};
  return true;
}

struct Place {
  int m, n;  // cluster tile along M, tile along N
};

// Rows first within a group, so that the CTAs at work share weights.
__device__ __forceinline__ Place place_of(const Division& division, int tile) {
  int tiles_n = division.tiles / division.tiles_m;
  int group_size = ROW_GROUP * tiles_n;
  int first_m = tile / group_size * ROW_GROUP;
  int rows = min(division.tiles_m - first_m, ROW_GROUP);
  int in_group = tile % group_size;
  return {first_m + in_group % rows, in_group / rows};
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ void produce(const TensorMap* a_map, const TensorMap* w_map, const Division& division,
                        uint32 ring, uint32 full, uint32 empty, int gate_row, int cluster,
                        int clusters, uint32 rank) {
  int stage = 0;
  uint32 parity = 0;
  Segment segment;
  for (int n = 0; segment_of(division, n, cluster, clusters, segment); ++n) {
    Place place = place_of(division, segment.tile);
    int row = (place.m * CLUSTER + static_cast<int>(rank)) * BLOCK_M;
    int weight = place.n * OUT_WIDTH;
    for (int step = segment.first_step; step < segment.end_step; ++step) {
      uint32 filled = full + 8 * stage;
      mbarrier_wait(empty + 8 * stage, parity ^ 1);
      mbarrier_arrive_expect_bytes(filled, STAGE_BYTES);
      uint32 a = ring + stage * STAGE_BYTES, w = a + A_BYTES;
      tma_load_2d(a, a_map, filled, step * BLOCK_K, row);
#pragma unroll
      for (int box = 0; box < NUM_BOXES; ++box) {
        int first = weight + box * (SILU ? gate_row : BOX_ROWS);
        uint32 target = w + box * BOX_ROWS * BLOCK_K * 2;
        if (CLUSTER == 1) {
          tma_load_2d(target, w_map, filled, step * BLOCK_K, first);
        } else if (box == static_cast<int>(rank)) {
          tma_load_2d_multicast(target, w_map, filled, step * BLOCK_K, first, 3);
        }
      }
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  }
}

// Sums of the same tile by later clusters, added in their order; their flags are cleared.
__device__ __forceinline__ void add_partials(float (&d)[TILES_M][ACCUMULATORS],
                                             const Division& division, const Segment& segment,
                                             const float* partials, int* flags, int cluster,
                                             int clusters, uint32 rank, int consumer, int thread) {
  int end = (segment.tile - division.whole_tiles + 1) * division.steps;
  for (int other = cluster + 1; other < clusters; ++other) {
    int start = range_start(division, other, clusters);
    if (start >= end) break;
    if (start == range_start(division, other + 1, clusters)) continue;
    int slot = (other * CLUSTER + static_cast<int>(rank)) * CONSUMERS + consumer;
    if (thread == 0) {
      while (load_acquire(flags + slot) == 0) __nanosleep(64);
    }
    named_barrier(1 + consumer, WARPGROUP);
    const float4* source = reinterpret_cast<const float4*>(partials) +
                           static_cast<long long>(slot) * TILES_M * (ACCUMULATORS / 4) * WARPGROUP +
                           thread;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int i = 0; i < ACCUMULATORS / 4; ++i) {
        float4 part = __ldcg(source + (m * (ACCUMULATORS / 4) + i) * WARPGROUP);
        d[m][4 * i] += part.x;
        d[m][4 * i + 1] += part.y;
        d[m][4 * i + 2] += part.z;
        d[m][4 * i + 3] += part.w;
      }
    }
    named_barrier(1 + consumer, WARPGROUP);
    if (thread == 0) flags[slot] = 0;
  }
}

__device__ __forceinline__ void leave_partial(const float (&d)[TILES_M][ACCUMULATORS],
                                              float* partials, int* flags, int cluster, uint32 rank,
                                              int consumer, int thread) {
  int slot = (cluster * CLUSTER + static_cast<int>(rank)) * CONSUMERS + consumer;
  float4* target = reinterpret_cast<float4*>(partials) +
                   static_cast<long long>(slot) * TILES_M * (ACCUMULATORS / 4) * WARPGROUP + thread;
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS / 4; ++i) {
      __stcg(target + (m * (ACCUMULATORS / 4) + i) * WARPGROUP,
             make_float4(d[m][4 * i], d[m][4 * i + 1], d[m][4 * i + 2], d[m][4 * i + 3]));
    }
  }
  __threadfence();
  named_barrier(1 + consumer, WARPGROUP);
  if (thread == 0) store_release(flags + slot, 1);
}

// Column block `j` (8 columns) of the output: rows r and r + 8 of this thread, packed.
__device__ __forceinline__ void packed_block(const float (&d)[ACCUMULATORS], int j, uint32& upper,
                                             uint32& lower) {
  if (SILU) {
    const int gate = ACCUMULATORS / 2;
    upper = pack_bf16(silu(d[gate + 4 * j]) * d[4 * j], silu(d[gate + 4 * j + 1]) * d[4 * j + 1]);
    lower = pack_bf16(silu(d[gate + 4 * j + 2]) * d[4 * j + 2],
                      silu(d[gate + 4 * j + 3]) * d[4 * j + 3]);
  } else {
    upper = pack_bf16(d[4 * j], d[4 * j + 1]);
    lower = pack_bf16(d[4 * j + 2], d[4 * j + 3]);
  }
}

// Converts and stores this consumer's part of a tile, chunk by chunk through two buffers.
__device__ __forceinline__ void store_tile(const float (&d)[TILES_M][ACCUMULATORS],
                                           const TensorMap* out_map, uint32 buffers, uint32& turn,
                                           int row, int column, int consumer, int thread) {
  int lane = thread % 32;
  int in_tile = thread / 32 * 16 + (lane / 8 % 2) * 8 + lane % 8;  // row whose address I give
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      uint32 buffer = buffers + turn * CHUNK_BYTES;
      turn = (turn + 1) % CHUNK_BUFFERS;
      if (thread == 0) bulk_wait_read<CHUNK_BUFFERS - 1>();
      named_barrier(1 + consumer, WARPGROUP);
#pragma unroll
      for (int j = 0; j < CHUNK / 8; j += 2) {
        uint32 a, b, c, e;
        packed_block(d[m], chunk * (CHUNK / 8) + j, a, b);
        packed_block(d[m], chunk * (CHUNK / 8) + j + 1, c, e);
        int piece = (j + lane / 16) ^ (in_tile & 7);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         buffer + in_tile * 128 + piece * 16),
                     "r"(a), "r"(b), "r"(c), "r"(e)
                     : "memory");
      }
      fence_async_shared();
      named_barrier(1 + consumer, WARPGROUP);
      if (thread == 0) {
        tma_store_2d(out_map, buffer, column + chunk * CHUNK, row + m * 64);
        bulk_commit();
      }
    }
  }
}

// Columns beyond the last whole chunk: four bytes a thread, sixteen in a row for four threads.
__device__ __forceinline__ void store_tail(const float (&d)[TILES_M][ACCUMULATORS],
                                           const Output& out, int row, int column, int thread) {
  int lane = thread % 32;
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
    int upper_row = row + m * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = CHUNKS * (CHUNK / 8); j < OUT_WIDTH / 8; ++j) {
      int at = column + 8 * j + 2 * (lane % 4);
      uint32 upper, lower;
      packed_block(d[m], j, upper, lower);
      if (at >= out.columns) continue;
      uint32* target = reinterpret_cast<uint32*>(out.data + upper_row * out.stride + at);
      if (upper_row < out.rows) target[0] = upper;
      if (upper_row + 8 < out.rows) target[4 * out.stride] = lower;
    }
  }
}

__device__ __forceinline__ void add_bias(float (&d)[TILES_M][ACCUMULATORS],
                                         const uint16* __restrict__ bias, int column, int columns,
                                         int thread) {
#pragma unroll
  for (int j = 0; j < BLOCK_N / 8; ++j) {
    int at = column + 8 * j + 2 * (thread % 4);
    float even = at < columns ? __uint_as_float(static_cast<uint32>(bias[at]) << 16) : 0.0f;
    float odd = at + 1 < columns ? __uint_as_float(static_cast<uint32>(bias[at + 1]) << 16) : 0.0f;
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
      d[m][4 * j] += even;
      d[m][4 * j + 1] += odd;
      d[m][4 * j + 2] += even;
      d[m][4 * j + 3] += odd;
    }
  }
}

__device__ void consume(const TensorMap* out_map, const Output& out, const Division& division,
                        uint32 ring, uint32 full, uint32 empty, uint32 turns, uint32 store_buffers,
                        const uint16* bias, float* partials, int* flags, int cluster, int clusters,
                        uint32 rank, int consumer, int thread) {
  int first_row = PINGPONG ? 0 : consumer * TILES_M * 64;  // of the tile
  uint32 a_offset = first_row * 128;
  uint32 buffers = store_buffers + consumer * CHUNK_BUFFERS * CHUNK_BYTES;
  int stage = 0;
  uint32 parity = 0, turn = 0;
  uint32 turn_parity = consumer ^ 1;  // the first tile is the first consumer's, who does not wait
  auto skip = [&](int steps) {        // the ring's stages of the other consumer's tile
    stage += steps;
    parity ^= stage / STAGES & 1;
    stage %= STAGES;
  };
  int n = 0;
  if (PINGPONG && consumer == 1) {
    skip(division.steps);
    n = 1;
  }
  float d[TILES_M][ACCUMULATORS];
  Segment segment;
  for (; segment_of(division, n, cluster, clusters, segment); n += TURNS) {
    int released = -1;
    if (PINGPONG) {
      mbarrier_wait(turns + 8 * consumer, turn_parity);
      turn_parity ^= 1;
    }
    for (int step = segment.first_step; step < segment.end_step; ++step) {
      mbarrier_wait(full + 8 * stage, parity);
      uint64 a = wgmma_descriptor(ring + stage * STAGE_BYTES + a_offset);
      uint64 w = wgmma_descriptor(ring + stage * STAGE_BYTES + A_BYTES);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BLOCK_K / 16; ++k) {
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
          wgmma_width(d[m], a + m * 512 + 2 * k, w + 2 * k, step > segment.first_step || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // the step before this one has read its stage
      if (released >= 0 && thread < CLUSTER) {
        if (CLUSTER > 1) {
          mbarrier_arrive_cluster(empty + 8 * released, thread);
        } else {
          mbarrier_arrive(empty + 8 * released);
        }
      }
      released = stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    if (PINGPONG) {
      if (thread == 0) mbarrier_arrive(turns + 8 * (consumer ^ 1));
      skip(division.steps);
    }
    wgmma_wait<0>();
    if (thread < CLUSTER) {
      if (CLUSTER > 1) {
        mbarrier_arrive_cluster(empty + 8 * released, thread);
      } else {
        mbarrier_arrive(empty + 8 * released);
      }
    }
    if (STREAM_K && segment.first_step > 0) {
      leave_partial(d, partials, flags, cluster, rank, consumer, thread);
      continue;
    }
    if (STREAM_K && segment.end_step < division.steps) {
      add_partials(d, division, segment, partials, flags, cluster, clusters, rank, consumer,
                   thread);
    }
    Place place = place_of(division, segment.tile);
    int row = (place.m * CLUSTER + static_cast<int>(rank)) * BLOCK_M + first_row;
    int column = place.n * OUT_WIDTH;
    if (!SILU && bias != nullptr) add_bias(d, bias, column, out.columns, thread);
    store_tile(d, out_map, buffers, turn, row, column, consumer, thread);
    if (TAIL > 0) store_tail(d, out, row, column, thread);
  }
  if (thread == 0) bulk_wait_read<0>();
}

}  // namespace

// partials: fp32, BLOCK_M x BLOCK_N a CTA; flags: one int a consumer, zero before and after.
extern "C" __global__ void __launch_bounds__(WARPGROUP * (1 + CONSUMERS), 1)
    gemm(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap w_map,
         const __grid_constant__ TensorMap out_map, uint16* out, const uint16* bias,
         float* partials, int* flags, long long out_stride, int rows, int columns, int tiles_m,
         int tiles, int steps, int whole_tiles, int split_units) {
  extern __shared__ uint8 shared[];
  uint32 base = (shared_address(shared) + 1023) & ~1023u;
  uint32 full = base + BARRIER_OFFSET, empty = full + 8 * STAGES;
  uint32 turns = empty + 8 * STAGES;
  uint32 rank = CLUSTER > 1 ? cluster_rank() : 0;
  int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  Division division{tiles, tiles_m, steps, whole_tiles, split_units};
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&a_map);
    prefetch_tensor_map(&w_map);
    prefetch_tensor_map(&out_map);
    for (int stage = 0; stage < STAGES; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, OWNERS * CLUSTER);
    }
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) mbarrier_init(turns + 8 * consumer, 1);
    fence_mbarrier_init();
  }
  if (CLUSTER > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }
  allow_next_kernel();
  wait_for_previous_kernel();
  int warpgroup = threadIdx.x / WARPGROUP;
  if (warpgroup == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
      produce(&a_map, &w_map, division, base, full, empty, columns, cluster, clusters, rank);
    }
  } else {
    take_registers<232>();
    Output output{out, out_stride, rows, columns};
    consume(&out_map, output, division, base, full, empty, turns, base + STORE_OFFSET, bias,
            partials, flags, cluster, clusters, rank, warpgroup - 1, threadIdx.x % WARPGROUP);
  }
  // A CTA must not end while its pair still writes to its memory or arrives at its barriers.
  if (CLUSTER > 1) {
    __syncwarp();
    cluster_barrier();
  }
}
