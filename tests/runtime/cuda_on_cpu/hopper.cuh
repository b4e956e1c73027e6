// Stands in for runtime/kernels/cuda/hopper.cuh and for CUDA itself, so that a kernel's source runs
// on a CPU: threads of a block are fibers, warp-wide instructions meet in `together`, TMA copies
// land late and in random order. A barrier used wrongly, a warp that diverges or a hang ends it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (cpu::thread_index())

using std::max;
using std::min;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
struct float4 { float x, y, z, w; };
struct int4 { int x, y, z, w; };
struct Index { unsigned x; };
struct alignas(64) TensorMap { uint64 opaque[16]; };

inline Index blockIdx, gridDim;
alignas(1024) inline unsigned char shared[227 << 10];

namespace cpu {

[[noreturn]] inline void fail(const char* what) {
  printf("%s\n", what);
  exit(1);
}

inline std::mt19937 draw(1);
inline uint32 shared_base = 0;  // where `shared` begins in the block's address space

inline unsigned char* pointer(uint32 address) { return shared + (address - shared_base); }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool is_done;
  unsigned thread;
};
inline ucontext_t scheduler;
inline Fiber* running;
inline Index thread_index() { return {running->thread}; }

// What a warp's lanes hand in and get back from an instruction that all execute.
struct Warp {
  const char* instruction;
  int arrived;
  unsigned generation;
  uint32 in[32][10], out[32][4];
};
inline std::vector<Warp> warps;
inline unsigned num_threads, block_arrived, block_generation;

struct Copy {
  uint32 destination;
  const TensorMap* map;
  uint32 barrier;
  int block;
};
inline std::vector<Copy> copies;
inline std::map<unsigned, std::vector<std::pair<int*, const int*>>> words;  // of a thread
void land(size_t index);  // of `copies`

inline void yield() {
  if (!copies.empty() && draw() % 8 == 0) land(draw() % copies.size());
  swapcontext(&running->context, &scheduler);
}

inline void together(const char* instruction, std::initializer_list<uint32> in, uint32* out,
                     int outputs, const std::function<void(Warp&)>& execute) {
  Warp& warp = warps[running->thread / 32];
  const int lane = running->thread % 32;
  if (warp.arrived == 0) warp.instruction = instruction;
  if (strcmp(warp.instruction, instruction) != 0) fail("lanes of a warp diverged");
  std::copy(in.begin(), in.end(), warp.in[lane]);
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    execute(warp);
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) yield();
  std::copy(warp.out[lane], warp.out[lane] + outputs, out);
}

inline uint32 bits(float x) {
  uint32 word;
  memcpy(&word, &x, 4);
  return word;
}
inline float number(uint32 word) {
  float x;
  memcpy(&x, &word, 4);
  return x;
}
inline float from_bf16(uint32 half) { return number(half << 16); }
inline uint16 to_bf16(float x) {
  const uint32 word = bits(x);
  return x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fff;
}

struct Barrier {
  uint32 expected, arrivals_left, parity;
  long bytes_left;
};
inline std::map<uint32, Barrier> barriers;
inline Barrier& barrier(uint32 address) {
  if (address % 8 != 0 || barriers.count(address) == 0) fail("no barrier at this address");
  return barriers[address];
}
inline void settle(Barrier& barrier) {
  if (barrier.arrivals_left > 0 || barrier.bytes_left > 0) return;
  barrier.parity ^= 1;
  barrier.arrivals_left = barrier.expected;
}

// Runs one block; `kernel` is called by each of its threads.
inline void run_block(unsigned block, unsigned blocks, unsigned threads,
                      const std::function<void()>& kernel) {
  static std::function<void()> body;
  body = kernel;
  blockIdx = {block};
  gridDim = {blocks};
  num_threads = threads;
  block_arrived = 0;
  barriers.clear();
  warps.assign(threads / 32, Warp{});
  memset(shared, 0xff, sizeof shared);  // NaN
  static std::vector<Fiber> fibers;
  fibers.resize(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    fiber.thread = thread;
    fiber.is_done = false;
    fiber.stack.resize(64 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(
        &fiber.context,
        +[] {
          body();
          running->is_done = true;
          swapcontext(&running->context, &scheduler);
        },
        0);
  }
  long rounds = 0;
  for (unsigned left = threads; left > 0;) {
    left = 0;
    for (Fiber& fiber : fibers) {
      if (fiber.is_done) continue;
      running = &fiber;
      swapcontext(&scheduler, &fiber.context);
      left += !fiber.is_done;
    }
    if (++rounds > 10'000'000) fail("the block hangs");
  }
  if (!copies.empty()) fail("copies in flight at the end");
  words.clear();
}

}  // namespace cpu

// ---- CUDA's built-in functions ------------------------------------------------------------------

inline void __syncthreads() {
  const unsigned generation = cpu::block_generation;
  if (++cpu::block_arrived == cpu::num_threads) {
    cpu::block_arrived = 0;
    ++cpu::block_generation;
  }
  while (cpu::block_generation == generation) cpu::yield();
}

inline void __syncwarp() { cpu::together("syncwarp", {}, nullptr, 0, [](cpu::Warp&) {}); }

inline uint32 cpu_shuffle(const char* name, uint32 x, int source) {
  uint32 result;
  cpu::together(name, {x, static_cast<uint32>(source)}, &result, 1, [](cpu::Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = warp.in[warp.in[lane][1]][0];
  });
  return result;
}
inline int __shfl_sync(uint32, int x, int source) { return cpu_shuffle("shfl", x, source); }
inline int __shfl_up_sync(uint32, int x, int offset) {
  const int lane = threadIdx.x % 32;
  return cpu_shuffle("shfl.up", x, lane < offset ? lane : lane - offset);
}
inline float __shfl_xor_sync(uint32, float x, int mask) {
  return cpu::number(cpu_shuffle("shfl.bfly", cpu::bits(x), threadIdx.x % 32 ^ mask));
}
inline uint32 __ballot_sync(uint32, bool vote) {
  uint32 result;
  cpu::together("ballot", {vote}, &result, 1, [](cpu::Warp& warp) {
    uint32 votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= warp.in[lane][0] << lane;
    for (int lane = 0; lane < 32; ++lane) warp.out[lane][0] = votes;
  });
  return result;
}
inline bool __any_sync(uint32 mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __popc(uint32 x) { return __builtin_popcount(x); }
inline float __int_as_float(int x) { return cpu::number(x); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int x) {
  const int old = *address;
  *address += x;
  return old;
}

// ---- hopper.cuh ---------------------------------------------------------------------------------

inline uint32 shared_address(const void* address) {
  return static_cast<const unsigned char*>(address) - shared + cpu::shared_base;
}
inline void mbarrier_init(uint32 barrier, uint32 arrivals) {
  cpu::barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void mbarrier_arrive_expect_bytes(uint32 address, uint32 bytes) {
  cpu::Barrier& barrier = cpu::barrier(address);
  if (barrier.bytes_left != 0) cpu::fail("a stage is filled again before it was read");
  barrier.bytes_left += bytes;
  --barrier.arrivals_left;
  cpu::settle(barrier);
}
inline void mbarrier_wait(uint32 address, uint32 parity) {
  while (cpu::barrier(address).parity == parity) cpu::yield();
}
inline void fence_mbarrier_init() {}
inline void fence_async_shared() {}
inline void prefetch_tensor_map(const TensorMap*) {}
inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}
inline uint32 pack_bf16(float low, float high) {
  return cpu::to_bf16(low) | static_cast<uint32>(cpu::to_bf16(high)) << 16;
}
