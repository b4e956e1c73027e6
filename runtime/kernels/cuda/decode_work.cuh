// How decode_attention.cu divides its work: the lists of pages, their cuts, a worker's walk.
// Included by it after its constants.
#pragma once

struct Requests {
  const int* kv_lens;
  const int* row_ids;
  const int* page_table;
  int table_stride;
  int num_rows;
  int list_heads;  // kv heads of a list
};

// Lists of pages, one a worker of a range. With fewer workers than heads a list holds several, the
// heads of a request after each other: head h of list l is kv head h x abreast + l.
__device__ __forceinline__ int heads_abreast(int num_kv_heads, int max_workers) {
  int abreast = min(num_kv_heads, max_workers);
  while (num_kv_heads % abreast != 0) --abreast;
  return abreast;
}

// The worker that this warp is, or -1. The workers of a range are neighbouring warps, and few
// workers still spread over all blocks.
__device__ __forceinline__ int worker_of(int warp, int num_workers) {
  const int block = blockIdx.x, blocks = gridDim.x;
  const int first = block * num_workers / blocks, end = (block + 1) * num_workers / blocks;
  return first + warp < end ? first + warp : -1;
}

__device__ __forceinline__ int num_pages(int kv_len) { return (kv_len + PAGE - 1) / PAGE; }

// starts[r] = pages of the requests before r, for one kv head; returns those of all. Block-wide.
__device__ __forceinline__ int sum_pages(int* starts, int* warp_sums, const Requests& requests) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
#pragma unroll 4
  for (int r = thread; r < requests.num_rows; r += THREADS)
    starts[r] = num_pages(requests.kv_lens[r]);
  __syncthreads();
  // An odd number of requests a thread spreads the threads over the banks.
  const int chunk = ((requests.num_rows + THREADS - 1) / THREADS) | 1;
  const int first = min(thread * chunk, requests.num_rows);
  const int end = min(first + chunk, requests.num_rows);
  int sum = 0;
#pragma unroll 4
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
#pragma unroll 1
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

// Where page `flat` of a list is; warp-wide, 32 probes a round.
__device__ __forceinline__ Position locate(const int* starts, const Requests& requests, int flat,
                                           int lane) {
  int low = 0, span = requests.num_rows;
  while (span > 1) {
    const int step = (span + 31) / 32, probe = lane * step;
    const bool is_at_or_before = probe < span && starts[low + probe] * requests.list_heads <= flat;
    const int last = __popc(__ballot_sync(ALL, is_at_or_before)) - 1;
    low += last * step;
    span = min(step, span - last * step);
  }
  const int pages = starts[low + 1] - starts[low];
  const int within = flat - starts[low] * requests.list_heads;
  return {low, within / pages, within % pages, pages};
}

// First page of range `range`: an equal share of a list, but no cut leaves a part of an item of
// fewer than MIN_FRAGMENT pages.
__device__ __forceinline__ int range_start(const int* starts, const Requests& requests, int range,
                                           int num_ranges, int total, int lane) {
  const int flat = static_cast<int>(static_cast<uint64>(total) * range / num_ranges);
  if (flat >= total) return total;
  const Position at = locate(starts, requests, flat, lane);
  if (at.page < MIN_FRAGMENT) return flat - at.page;
  if (at.pages - at.page < MIN_FRAGMENT) return flat + at.pages - at.page;
  return flat;
}

// How many ranges' cuts, before they move, are below page `flat`: cut v is total v / num_ranges.
__device__ __forceinline__ int cuts_below(int flat, int num_ranges, int total) {
  return static_cast<int>((static_cast<uint64>(flat) * num_ranges + total - 1) / total);
}

// Up to 32 consecutive pages of one item.
struct Pages {
  int row, head, kv_len, page, count;
};

// What is fetched ahead for a warp, so that no chain of loads from global memory stalls it: page
// numbers of the pages in hand and of those after them; length and row of the next request.
struct Ahead {
  int numbers[2][32];
  int next[2][2];
};

// Hands out a worker's range; `head` counts within the list.
struct Walk {
  int request, head, page;
  int kv_len, row;
  int left;

  __device__ __forceinline__ void look_ahead(const Requests& requests, Ahead* ahead, int lane) {
    const int next = min(request + 1, requests.num_rows - 1);
    const int* source = lane == 0 ? requests.kv_lens : requests.row_ids;
    if (lane < 2) copy_word(&ahead->next[(request + 1) % 2][lane], source + next);
  }

  // The page numbers are in `ahead->numbers[half]` after `wait_words`, which must also come before
  // the next call.
  __device__ __forceinline__ Pages take(const Requests& requests, Ahead* ahead, int half,
                                        int lane) {
    const int pages = num_pages(kv_len);
    const Pages taken = {row, head, kv_len, page, min(32, min(pages - page, left))};
    if (lane < taken.count)
      copy_word(&ahead->numbers[half][lane],
                requests.page_table + static_cast<long long>(request) * requests.table_stride +
                    page + lane);
    page += taken.count;
    left -= taken.count;
    if (page == pages && left > 0) {
      page = 0;
      if (++head == requests.list_heads) {
        head = 0;
        ++request;
        kv_len = ahead->next[request % 2][0];
        row = ahead->next[request % 2][1];
        while (kv_len <= 0) {
          ++request;
          kv_len = requests.kv_lens[request];
          row = requests.row_ids[request];
        }
        __syncwarp();
        look_ahead(requests, ahead, lane);
      }
    }
    return taken;
  }
};
