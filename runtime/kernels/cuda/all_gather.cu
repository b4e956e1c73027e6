// All-gather over the GPUs of one host: each rank pushes its columns into everybody's output.
//
// Outputs lie in symmetric memory, row-major; rank r owns columns [r W, (r + 1) W) of every row. A
// pack is loaded once and stored on all ranks. Signals are those of the lane (`peers.cuh`): block b
// tells the peers that their rows may be written here, and after its stores that they are there.
// The grid may be of any size, and need not be resident at once.
//
// Macros: WORLD (ranks), MAX_BLOCKS.

#include "peers.cuh"

// A place in the columns of one rank; packs run along rows, then down.
struct Place {
  int row, column;

  __device__ __forceinline__ Place(int pack, int row_packs)
      : row(pack / row_packs), column(pack % row_packs) {}

  __device__ __forceinline__ Place after(const Place& step, int row_packs) const {
    Place next = *this;
    next.row += step.row;
    next.column += step.column;
    if (next.column >= row_packs) {
      next.column -= row_packs;
      ++next.row;
    }
    return next;
  }
};

// x: this rank's columns, rows x_stride packs apart. outputs: the first pack of this rank's columns
// in the first row, on each rank; rows out_stride packs apart. Equal x and output: nothing to copy
// on this rank.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    all_gather(const Pack* x, const __grid_constant__ Peers signals,
               const __grid_constant__ Peers outputs, int x_stride, int out_stride, int row_packs,
               int rows, int rank) {
  const bool is_in_place = reinterpret_cast<uint64>(x) == outputs.base[rank];
  const Place step(pack_step(), row_packs);
  meet(signals, rank, 0);  // the peers have read what their outputs held before
  Place place(first_pack(), row_packs);
  while (place.row < rows) {
    Place places[UNROLL] = {place, place, place, place};
#pragma unroll
    for (int u = 1; u < UNROLL; ++u) places[u] = places[u - 1].after(step, row_packs);
    Pack packs[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (places[u].row < rows)
        packs[u] = load(x + static_cast<uint64>(places[u].row) * x_stride + places[u].column);
#pragma unroll
    for (int turn = 0; turn < WORLD; ++turn) {
      const int peer = (rank + turn) % WORLD;  // ranks start with different links
      if (peer == rank && is_in_place) continue;
      Pack* output = reinterpret_cast<Pack*>(outputs.base[peer]);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (places[u].row < rows)
          store(output + static_cast<uint64>(places[u].row) * out_stride + places[u].column,
                packs[u]);
    }
    place = places[UNROLL - 1].after(step, row_packs);
  }
  meet(signals, rank, 1);
}
