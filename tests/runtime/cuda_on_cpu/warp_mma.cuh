// Stands in for runtime/kernels/cuda/warp_mma.cuh: fragments as the PTX manual lays them out.
#pragma once

#include "hopper.cuh"

namespace cpu {

// A map of a pool of [blocks][16 rows][HEAD_DIM] bf16, copied as halves of 64 columns.
struct Pool {
  const uint16* cells;
  long blocks;
};

inline void land(size_t index) {
  const Copy copy = copies[index];
  copies.erase(copies.begin() + index);
  const Pool& pool = *reinterpret_cast<const Pool*>(copy.map);
  if (copy.block < 0 || copy.block >= pool.blocks) fail("a copy from outside of the pool");
  for (int chunk = 0; chunk < 16 * HEAD_DIM / 8; ++chunk) {
    const int half = chunk / 128, row = chunk / 8 % 16, column = chunk % 8;
    uint32 address = copy.destination + chunk * 16;
    address ^= (address >> 7 & 7) << 4;  // the 128-byte swizzle
    memcpy(pointer(address),
           pool.cells + (copy.block * 16l + row) * HEAD_DIM + half * 64 + column * 8, 16);
  }
  Barrier& full = barrier(copy.barrier);
  full.bytes_left -= 16 * HEAD_DIM * 2;
  settle(full);
}

}  // namespace cpu

inline uint64 evict_first_policy() { return 0; }
inline uint64 evict_normal_policy() { return 0; }

inline void tma_load_block(uint32 destination, const TensorMap* map, uint32 barrier, int block,
                           uint64) {
  if (destination % 1024 != 0) cpu::fail("a swizzled tile must lie at a multiple of 1024 bytes");
  cpu::copies.push_back({destination, map, barrier, block});
  if (cpu::draw() % 4 == 0) cpu::land(cpu::copies.size() - 1);
}

inline void copy_word(int* destination, const int* source) {
  *destination = -1;  // nobody may read it before this thread's `wait_words`
  cpu::words[threadIdx.x].push_back({destination, source});
}
inline void wait_words() {
  for (const auto& [destination, source] : cpu::words[threadIdx.x]) *destination = *source;
  cpu::words[threadIdx.x].clear();
}

inline void cpu_load_matrices(const char* name, uint32 (&a)[4], uint32 address,
                              bool is_transposed) {
  cpu::together(name, {address, is_transposed}, a, 4, [](cpu::Warp& warp) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16 x[8][8];
      uint32 banks = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32 at = warp.in[8 * matrix + row][0];
        memcpy(x[row], cpu::pointer(at), 16);
        banks |= 1u << (at >> 4 & 7);
      }
      if (banks != 0xff) cpu::fail("bank conflict");
      for (int lane = 0; lane < 32; ++lane) {
        const int row = lane / 4, column = 2 * (lane % 4);
        const bool is_transposed = warp.in[lane][1];
        const uint32 low = is_transposed ? x[column][row] : x[row][column];
        const uint32 high = is_transposed ? x[column + 1][row] : x[row][column + 1];
        warp.out[lane][matrix] = low | high << 16;
      }
    }
  });
}
inline void load_matrices(uint32 (&a)[4], uint32 address) {
  cpu_load_matrices("ldmatrix", a, address, false);
}
inline void load_transposed(uint32 (&a)[4], uint32 address) {
  cpu_load_matrices("ldmatrix.trans", a, address, true);
}

inline void multiply(float (&c)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
  uint32 result[4];
  cpu::together("mma",
                {a[0], a[1], a[2], a[3], b[0], b[1], cpu::bits(c[0]), cpu::bits(c[1]),
                 cpu::bits(c[2]), cpu::bits(c[3])},
                result, 4, [](cpu::Warp& warp) {
                  float left[16][16], right[16][8];
                  for (int lane = 0; lane < 32; ++lane) {
                    const int group = lane / 4, pair = 2 * (lane % 4);
                    for (int i = 0; i < 8; ++i)
                      left[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] =
                          cpu::from_bf16(warp.in[lane][i / 2] >> 16 * (i % 2) & 0xffff);
                    for (int i = 0; i < 4; ++i)
                      right[pair + i % 2 + i / 2 * 8][group] =
                          cpu::from_bf16(warp.in[lane][4 + i / 2] >> 16 * (i % 2) & 0xffff);
                  }
                  for (int lane = 0; lane < 32; ++lane)
                    for (int i = 0; i < 4; ++i) {
                      float sum = cpu::number(warp.in[lane][6 + i]);
                      for (int k = 0; k < 16; ++k)
                        sum += left[lane / 4 + i / 2 * 8][k] * right[k][2 * (lane % 4) + i % 2];
                      warp.out[lane][i] = cpu::bits(sum);
                    }
                });
  for (int i = 0; i < 4; ++i) c[i] = cpu::number(result[i]);
}

inline uint32 transpose(uint32 rows) {
  uint32 result;
  cpu::together("movmatrix", {rows}, &result, 1, [](cpu::Warp& warp) {
    uint16 x[8][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i)
        x[lane / 4][2 * (lane % 4) + i] = warp.in[lane][0] >> 16 * i & 0xffff;
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      warp.out[lane][0] = x[column][row] | static_cast<uint32>(x[column + 1][row]) << 16;
    }
  });
  return result;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float4 load_l2(const float4* address) { return *address; }
