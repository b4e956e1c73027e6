// wgmma of Hopper, bf16 x bf16 -> fp32, both operands K-major in shared memory with a 128-byte
// swizzle.
//
// The instruction multiplies a 64 x 16 slice of A by the transpose of an N x 16 slice of B; a
// function for one N is generated (`sm90_gemm.wgmma_source`). Thread t of the warpgroup holds, for
// column block j of 8: d[4j] and d[4j + 1] in row 16 (t / 32) + (t % 32) / 4, columns 8j + 2 (t %
// 4) and the next; d[4j + 2] and d[4j + 3] eight rows below.
#pragma once

#include "hopper.cuh"

// Descriptor of rows of 128 bytes, swizzled, eight rows (1024 bytes) a block; 1024-byte aligned.
// Adding 2 moves 16 elements along K, adding 64 moves eight rows down.
__device__ __forceinline__ uint64 wgmma_descriptor(uint32 address) {
  return static_cast<uint64>((address & 0x3ffff) >> 4) | (uint64(1) << 16) | (uint64(64) << 32) |
         (uint64(1) << 62);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
