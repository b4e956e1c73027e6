// Paged GQA decode attention for Hopper: every warp is a pipeline of its own.
//
// The heads of a page lie side by side in memory, so they are read side by side: each kv head has a
// list of its own, the pages of all requests in a row. All lists are cut alike into equal ranges,
// and the workers of one range, a head each, start together at neighbouring addresses. A worker is
// one warp, which copies its pages by TMA into a private ring of stages in shared memory, computes
// on the oldest and reuses its stage. No warp waits for another: one that ends an item (the keys of
// a request and head) delays nobody, and nothing spins (a waiting warp is suspended).
//
// A page is computed with keys as rows and the query heads of the kv head as columns, so that a
// group of 8 heads fills a tensor-core tile: S^T = K Q^T, then O^T = V^T P^T. The softmax is in
// base 2 with a lazy reference: sums and outputs are rescaled only when a score exceeds the
// reference by LAZY_LOG2, which costs one vote a page and no reduction over lanes.
//
// An item that several workers share is left in fp32 partials; the last of them to arrive merges
// all in the order of the ranges. Nobody waits, so that any number of blocks may be resident.
//
// Macros: HEAD_DIM (64, 128), GROUP (query heads of a kv head, 1 to 16), WARPS, STAGES (of a warp),
// MIN_PAGES (least pages of a range), MIN_FRAGMENT (least pages of a part of an item, at most
// MIN_PAGES), EVICT_FIRST (0, 1: L2 policy of keys and values).

#include "warp_mma.cuh"

constexpr int PAGE = 16;
constexpr int THREADS = 32 * WARPS;
constexpr int HALF_BYTES = PAGE * 128;  // 64 columns of a page, one swizzled row of 128 bytes a key
constexpr int TILE_BYTES = HEAD_DIM / 64 * HALF_BYTES;
constexpr int STAGE_BYTES = 2 * TILE_BYTES;  // keys, then values
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int TILES = (GROUP + 7) / 8;      // tiles of 8 query heads
constexpr int PART_CELLS = STEPS * 32 + 4;  // float4 of a partial and tile: outputs, statistics
constexpr int WORK_CELLS = TILES * PART_CELLS;
constexpr uint32 ALL = 0xffffffffu;
constexpr float NO_REFERENCE = -1e30f;
constexpr float LAZY_LOG2 = 8.0f;

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head dimension");
static_assert(GROUP >= 1 && GROUP <= 16, "query heads of a kv head");
static_assert(STAGES >= 2 && STAGES <= 32 && WARPS >= 1 && WARPS <= 32, "ring");
static_assert(MIN_FRAGMENT >= 1 && MIN_FRAGMENT <= MIN_PAGES, "a range may not skip a fragment");

#include "decode_softmax.cuh"
#include "decode_work.cuh"

// partials: WORK_CELLS float4 for each of 2 x workers (an item begun before the worker's range, and
// one that goes on after it); arrivals: a zero for each worker, zero again when the kernel ends.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode_attention(const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const uint32* qkv, uint32* out,
                     const int* row_ids, const int* kv_lens, const int* page_table,
                     float4* partials, int* arrivals, int num_rows, int num_kv_heads,
                     int table_stride, int qkv_stride, int out_stride, float scale) {
  extern __shared__ unsigned char shared[];
  allow_next_kernel();
  // The ring needs 1024-byte alignment for the swizzle; the host adds the slack.
  unsigned char* ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
  // What is in a stage: row, kv head, page of the item, kv_len.
  int4* records = reinterpret_cast<int4*>(ring + RING_BYTES);
  Ahead* ahead = reinterpret_cast<Ahead*>(records + WARPS * STAGES);
  uint64* barriers = reinterpret_cast<uint64*>(ahead + WARPS);
  int* warp_sums = reinterpret_cast<int*>(barriers + WARPS * STAGES);
  int* starts = reinterpret_cast<int*>(ring);  // until the first copies

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int max_workers = gridDim.x * WARPS;
  const int abreast = heads_abreast(num_kv_heads, max_workers);
  const Requests requests = {kv_lens,      row_ids,  page_table,
                             table_stride, num_rows, num_kv_heads / abreast};
  records += warp * STAGES;
  ahead += warp;
  const uint32 barrier = shared_address(barriers + warp * STAGES);
  const uint32 stages = shared_address(ring) + warp * STAGES * STAGE_BYTES;
  if (lane < STAGES) mbarrier_init(barrier + lane * 8, 1);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&k_map);
    prefetch_tensor_map(&v_map);
  }

  wait_for_previous_kernel();
  const int total = sum_pages(starts, warp_sums, requests) * requests.list_heads;
  const int num_ranges = min(max_workers / abreast, max(1, total / MIN_PAGES));
  const int worker = worker_of(warp, num_ranges * abreast);
  const int range = worker / abreast, list = worker % abreast;
  int begin = 0, end = 0;
  Position at = {0, 0, 0, 0};
  if (worker >= 0 && total > 0) {
    begin = range_start(starts, requests, range, num_ranges, total, lane);
    end = range_start(starts, requests, range + 1, num_ranges, total, lane);
    if (begin < end) at = locate(starts, requests, begin, lane);
  }
  // The copies must see the barriers, and overwrite `starts` after its last reader.
  fence_mbarrier_init();
  fence_async_shared();
  __syncthreads();
  if (begin >= end) return;

  Walk walk = {at.request, at.head, at.page, kv_lens[at.request], row_ids[at.request], end - begin};
  walk.look_ahead(requests, ahead, lane);
  wait_words();
  __syncwarp();
  int half = 0, taken = 0;
  Pages current = walk.take(requests, ahead, 0, lane);
  wait_words();
  __syncwarp();
  Pages upcoming = walk.take(requests, ahead, 1, lane);
  const uint64 policy = EVICT_FIRST ? evict_first_policy() : evict_normal_policy();
  auto copy_next_page = [&](int stage) {
    if (taken == current.count) {
      wait_words();
      __syncwarp();
      current = upcoming;
      upcoming = walk.take(requests, ahead, half, lane);
      half ^= 1;
      taken = 0;
    }
    if (lane == 0) {
      const int head = current.head * abreast + list;
      records[stage] = {current.row, head, current.page + taken, current.kv_len};
      const uint32 target = stages + stage * STAGE_BYTES, full = barrier + stage * 8;
      const int block = ahead->numbers[half][taken] * num_kv_heads + head;
      mbarrier_arrive_expect_bytes(full, STAGE_BYTES);
      tma_load_block(target, &k_map, full, block, policy);
      tma_load_block(target + TILE_BYTES, &v_map, full, block, policy);
    }
    ++taken;
  };
  for (int i = 0; i < min(STAGES, end - begin); ++i) copy_next_page(i);
  __syncwarp();

  Attention attention;
  auto load_queries = [&](const int4& record) {
    const long long first =
        static_cast<long long>(record.x) * qkv_stride + record.y * GROUP * HEAD_DIM;
    attention.load_queries(qkv + first / 2, lane);
  };
  load_queries(records[0]);
  attention.clear();
  int stage = 0;
  uint32 parity = 0;
  for (int flat = begin; flat < end; ++flat) {
    const int4 record = records[stage];
    const int page = record.z, kv_len = record.w, num_keys = kv_len - page * PAGE;
    mbarrier_wait(barrier + stage * 8, parity);
    __syncwarp();
    auto release = [&] {
      if (flat + STAGES < end) copy_next_page(stage);
    };
    if (num_keys >= PAGE)
      attention.add_page<true>(stages + stage * STAGE_BYTES, PAGE, scale, lane, release);
    else
      attention.add_page<false>(stages + stage * STAGE_BYTES, num_keys, scale, lane, release);
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }

    const int item_begin = flat - page, item_end = item_begin + num_pages(kv_len);
    if (flat + 1 < end && flat + 1 < item_end) continue;
    if (flat + 1 < end) load_queries(records[stage]);  // of the next item, while this one ends
    attention.finish();
    bool is_whole = true;
    if (item_begin < begin || item_end > end) {
      // Cuts of the item that did not move to its ends lie MIN_FRAGMENT pages or more within.
      int first = range, last = range;
      if (item_begin < begin) first = cuts_below(item_begin + MIN_FRAGMENT, num_ranges, total) - 1;
      if (item_end > end) last = cuts_below(item_end - MIN_FRAGMENT + 1, num_ranges, total) - 1;
      // The item goes on after range `first`, and began before the others.
      auto partial_of = [&](int other) {
        return partials + (2ll * (other * abreast + list) + (other == first)) * WORK_CELLS;
      };
      int* arrived_count = arrivals + first * abreast + list;
      attention.store_partial(partial_of(range), lane);
      __threadfence();
      __syncwarp();
      int arrived = 0;
      if (lane == 0) arrived = atomicAdd(arrived_count, 1);
      is_whole = __shfl_sync(ALL, arrived, 0) == last - first;
      if (is_whole) {
        __threadfence();
        attention.clear();
        for (int other = first; other <= last; ++other)
          attention.add_partial(partial_of(other), lane);
        if (lane == 0) *arrived_count = 0;
      }
    }
    if (is_whole) {
      const long long target =
          static_cast<long long>(record.x) * out_stride + record.y * GROUP * HEAD_DIM;
      attention.store(out + target / 2, lane);
    }
    attention.clear();
  }
}
