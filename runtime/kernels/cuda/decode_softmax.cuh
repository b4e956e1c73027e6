// What decode_attention.cu does with one page: tensor-core products and a running softmax.
// Included by it after its constants.
#pragma once

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

  // Fold a page in. Keys from `num_keys` on are absent, whatever their cells hold. `release` is
  // called once the page's stage may be overwritten.
  template <bool IS_FULL, typename Release>
  __device__ __forceinline__ void add_page(uint32 stage, int num_keys, float scale, int lane,
                                           Release release) {
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
    // The page is in registers. The fence puts the reads before the copy into its place, which
    // comes through another proxy, and the copy has the whole softmax's time more to arrive.
    fence_async_shared();
    __syncwarp();
    release();

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
          const uint32 by_head =
              transpose(pack_bf16(out[n][m][2 * i] * inverse_0, out[n][m][2 * i + 1] * inverse_1));
          if (n * 8 + g < GROUP) target[(n * 8 + g) * (HEAD_DIM / 2) + m * 8 + i * 4 + t] = by_head;
        }
    }
  }
};
