// All-reduce over the GPUs of one host by pushing through symmetric memory, with a chosen number of
// blocks; and the sum of what copy engines have delivered.
//
//   one_shot      every rank pushes all of x to every peer; each sums everything
//   two_shot      every rank pushes to each peer that peer's shard, sums its own, pushes the result
//   add_received  x += what the peers sent before (local; no signals)
//
// Sums are in fp32 and in rank order, so all ranks get the same bits. x may lie anywhere; what ranks
// share is one buffer each: FLAG_BYTES of signals, then slots for what others push. Block b works on
// the same elements on all ranks and meets only block b of the peers, so the grid may be of any
// size, and need not be resident at once.
//
// Macros: WORLD (ranks), ELEMENT_BYTES (2: bf16, 4: fp32), MAX_BLOCKS, FLAG_BYTES.

#include "peers.cuh"

#define LANES (16 / ELEMENT_BYTES)

struct Sum {
  float lanes[LANES];

  __device__ __forceinline__ void take(const Pack& pack, bool is_first) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
#if ELEMENT_BYTES == 2
      const uint32 word = pack.words[lane / 2];
      const float value = __uint_as_float(lane % 2 ? word & 0xffff0000u : word << 16);
#else
      const float value = __uint_as_float(pack.words[lane]);
#endif
      lanes[lane] = is_first ? value : lanes[lane] + value;
    }
  }

  __device__ __forceinline__ Pack rounded() const {
    Pack pack;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#if ELEMENT_BYTES == 2
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
          : "=r"(pack.words[word])
          : "f"(lanes[2 * word + 1]), "f"(lanes[2 * word]));
#else
      pack.words[word] = __float_as_uint(lanes[word]);
#endif
    }
    return pack;
  }
};

__device__ __forceinline__ void copy(Pack* to, const Pack* from, int count) {
  const int step = pack_step();
  for (int place = first_pack(); place < count; place += UNROLL * step) {
    Pack packs[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (place + u * step < count) packs[u] = load(from + place + u * step);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (place + u * step < count) store(to + place + u * step, packs[u]);
  }
}

// Sums x and the peers' slots in rank order into x, and into `copies` of the peers where given.
__device__ __forceinline__ void reduce(Pack* x, const Pack* slots, uint64 slot_packs, int count,
                                       int rank, Pack* const* copies) {
  const int step = pack_step();
  for (int place = first_pack(); place < count; place += UNROLL * step) {
    Sum sums[UNROLL];
#pragma unroll
    for (int peer = 0; peer < WORLD; ++peer) {
      const Pack* part = peer == rank ? x : slots + peer * slot_packs;
      Pack packs[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (place + u * step < count) packs[u] = load(part + place + u * step);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (place + u * step < count) sums[u].take(packs[u], peer == 0);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (place + u * step >= count) continue;
      const Pack total = sums[u].rounded();
      store(x + place + u * step, total);
      if (copies != nullptr)
        for (int peer = 0; peer < WORLD; ++peer)
          if (peer != rank) store(copies[peer] + place + u * step, total);
    }
  }
}

__device__ __forceinline__ Pack* slots_of(const Peers& peers, int rank) {
  return reinterpret_cast<Pack*>(peers.base[rank] + FLAG_BYTES);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    one_shot(Pack* x, const __grid_constant__ Peers peers, int rank, int count) {
  meet(peers, rank, 0);  // the peers' former calls are over: their slots may be written
  for (int turn = 1; turn < WORLD; ++turn) {
    const int peer = (rank + turn) % WORLD;
    copy(slots_of(peers, peer) + static_cast<uint64>(rank) * count, x, count);
  }
  meet(peers, rank, 1);
  reduce(x, slots_of(peers, rank), count, count, rank, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    two_shot(Pack* x, const __grid_constant__ Peers peers, int rank, int count) {
  const int shard = (count + WORLD - 1) / WORLD;
  const uint64 all = static_cast<uint64>(WORLD) * shard;
  meet(peers, rank, 0);
  for (int turn = 1; turn < WORLD; ++turn) {
    const int peer = (rank + turn) % WORLD;
    const int first = peer * shard;
    copy(slots_of(peers, peer) + static_cast<uint64>(rank) * shard, x + first,
         min(shard, count - first));
  }
  meet(peers, rank, 1);
  Pack* results[WORLD];
#pragma unroll
  for (int peer = 0; peer < WORLD; ++peer)
    results[peer] = slots_of(peers, peer) + all + static_cast<uint64>(rank) * shard;
  reduce(x + rank * shard, slots_of(peers, rank), shard, min(shard, count - rank * shard), rank,
         results);
  meet(peers, rank, 2);
  for (int turn = 1; turn < WORLD; ++turn) {
    const int peer = (rank + turn) % WORLD;
    const int first = peer * shard;
    copy(x + first, slots_of(peers, rank) + all + static_cast<uint64>(peer) * shard,
         min(shard, count - first));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    add_received(Pack* x, const Pack* received, uint64 slot_packs, int rank, int count) {
  reduce(x, received, slot_packs, count, rank, nullptr);
}
