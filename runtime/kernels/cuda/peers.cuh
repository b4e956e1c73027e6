// What kernels over peers' memory share: packs of 16 bytes, addresses of all ranks, and the meeting
// of equal blocks on all ranks.
//
// Macros: WORLD (ranks), MAX_BLOCKS (signals of one phase and peer).
#pragma once

typedef unsigned int uint32;
typedef unsigned long long uint64;

#define THREADS 512
#define UNROLL 4

struct alignas(16) Pack {
  uint32 words[4];
};

struct Peers {
  uint64 base[WORLD];  // the shared buffer of each rank, as mapped on this one
};

__device__ __forceinline__ Pack load(const Pack* pointer) {
  Pack pack;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(pointer)
               : "memory");
  return pack;
}

__device__ __forceinline__ void store(Pack* pointer, const Pack& pack) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(pack.words[0]),
               "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

// Block b of every rank arrives; what its threads wrote before is visible to all of them after.
// Signals are 1 while on their way and set back to 0 by who waited. A signal of phase p cannot be
// raised again before that: every call begins with phase 0, which a peer answers only from its own
// next call, and within a call a peer raises p + 1 only after it has set p back.
__device__ __forceinline__ void meet(const Peers& peers, int rank, int phase) {
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer < WORLD && peer != rank) {
    const uint64 cell = (phase * MAX_BLOCKS + blockIdx.x) * WORLD;
    uint32* theirs = reinterpret_cast<uint32*>(peers.base[peer]) + cell + rank;
    uint32* mine = reinterpret_cast<uint32*>(peers.base[rank]) + cell + peer;
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(1u) : "memory");
    uint32 seen = 0;
    while (true) {
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
      if (seen != 0) break;
      __nanosleep(64);
    }
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(mine), "r"(0u) : "memory");
  }
  __syncthreads();
}

// The packs of this thread: the same on every rank for equal grids and counts.
__device__ __forceinline__ int first_pack() { return blockIdx.x * THREADS + threadIdx.x; }
__device__ __forceinline__ int pack_step() { return gridDim.x * THREADS; }
