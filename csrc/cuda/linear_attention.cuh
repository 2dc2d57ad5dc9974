// What the kernels of linear_attention.cu are made of: stages of two factors in shared memory, and their product.
//
// A block of 256 threads sums a tile of 64 x 64 over stages of 32 steps. Either factor of a stage lies in shared memory
// as 32 rows of 64 columns, and a thread has 4 x 4 numbers of the tile in registers. What is dense in memory along the
// columns is carried over in vectors of four; what is dense along the steps is turned on the way. So that neither meets
// a bank conflict, nor reading, the 16 vectors of a row change places with the row (`slot`). fp64 takes twice the
// banks.
#pragma once

#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kSide = 64;  // of a tile
constexpr int32_t kRows = 32;  // steps of a stage

__host__ __device__ constexpr int64_t tiles(int64_t size) { return (size + kSide - 1) / kSide; }

// How [B, C, N] lies in memory.
struct Layout {
  int64_t batch, step;
  bool last;    // channels are dense
  bool vector;  // every fourth element along the dense axis is aligned
};

// A matrix in memory, dense along one axis.
template <class T>
struct View {
  const T* data;
  int64_t step;          // from one to the next along the other axis
  int64_t dense, other;  // sizes
  bool vector;           // every fourth element along the dense axis is aligned

  __device__ __forceinline__ Four<T> four(int64_t i, int64_t j) const {  // i along the dense axis; zeros outside
    return j < other ? load4(data + j * step, i, dense, vector) : Four<T>{};
  }
};

template <class T>
__device__ __forceinline__ View<T> view(const void* data, const Layout& layout, int64_t image, int64_t channels,
                                        int64_t places) {
  return {static_cast<const T*>(data) + image * layout.batch, layout.step, layout.last ? channels : places,
          layout.last ? places : channels, layout.vector};
}

// Where the vector of four columns lies in a stage.
__device__ __forceinline__ int32_t slot(int32_t row, int32_t vector) {
  return row * kSide + 4 * (vector ^ ((row / 4 + 2 * (row % 4)) % 8));
}

// Which elements of a stage a thread carries: two vectors of four, number 0 and 1.
enum Way {
  kTurned,  // dense along the rows of the stage: four rows of one column; eight threads have a column
  kAcross,  // dense along its columns
  kOwn,     // so too, with a warp's own eight columns, of which a thread has four
};

template <Way kWay>
__device__ __forceinline__ int32_t row_of(int32_t number) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return kWay == kTurned ? lane % 8 * 4 : kWay == kAcross ? number * 16 + warp * 2 + lane / 16 : number * 16 + lane / 2;
}

template <Way kWay>
__device__ __forceinline__ int32_t column_of(int32_t number) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  return kWay == kTurned   ? number * 32 + warp * 4 + lane / 8
         : kWay == kAcross ? lane % 16 * 4
                           : warp * 8 + lane % 2 * 4;
}

// A thread's part of the stage that begins at (row, column) of a matrix.
template <Way kWay, class T>
__device__ __forceinline__ void fetch(const View<T>& from, int64_t row, int64_t column, Four<T> (&to)[2]) {
#pragma unroll
  for (int32_t e = 0; e < 2; ++e) {
    const int64_t r = row + row_of<kWay>(e), c = column + column_of<kWay>(e);
    to[e] = kWay == kTurned ? from.four(r, c) : from.four(c, r);
  }
}

template <class T>
__device__ __forceinline__ void fetch(bool turned, const View<T>& from, int64_t row, int64_t column, Four<T> (&to)[2]) {
  turned ? fetch<kTurned>(from, row, column, to) : fetch<kAcross>(from, row, column, to);
}

template <Way kWay, class Acc>
__device__ __forceinline__ void put(Acc* stage, const Acc (&values)[2][4]) {
#pragma unroll
  for (int32_t e = 0; e < 2; ++e) {
    const int32_t row = row_of<kWay>(e), column = column_of<kWay>(e);
    if constexpr (kWay == kTurned) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) stage[slot(row + j, column / 4) + column % 4] = values[e][j];
    } else {
      *reinterpret_cast<Four<Acc>*>(stage +
                                    slot(row, column / 4)) = {{values[e][0], values[e][1], values[e][2], values[e][3]}};
    }
  }
}

template <class Acc, class T>
__device__ __forceinline__ void widen(const Four<T> (&from)[2], Acc (&to)[2][4]) {
#pragma unroll
  for (int32_t e = 0; e < 2; ++e) {
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) to[e][j] = convert<Acc>(from[e].at[j]);
  }
}

template <class Acc, class T>
__device__ __forceinline__ void put(bool turned, Acc* stage, const Four<T> (&from)[2]) {
  Acc values[2][4];
  widen(from, values);
  turned ? put<kTurned>(stage, values) : put<kAcross>(stage, values);
}

// part[i][j]: the sum over the stage of its left factor's column 4 y + i times its right factor's column 4 x + j, where
// the thread is number (x, y) of 16 x 16. The sums of stages are added outside, so that none is longer than it must be.
template <class Acc>
__device__ __forceinline__ void multiply_stage(const Acc* left, const Acc* right, Acc (&part)[4][4]) {
  const int32_t x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) part[i][j] = Acc(0);
  }
#pragma unroll 8
  for (int32_t row = 0; row < kRows; ++row) {
    const Four<Acc> a = *reinterpret_cast<const Four<Acc>*>(left + slot(row, y));
    const Four<Acc> b = *reinterpret_cast<const Four<Acc>*>(right + slot(row, x));
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) part[i][j] += a.at[i] * b.at[j];
    }
  }
}

// A thread's 4 x 4 numbers of a tile [channels, places] of a gradient.
template <class T, class Acc>
__device__ __forceinline__ void store_tile(void* to, const Layout& layout, int64_t image, int64_t channels,
                                           int64_t places, int64_t channel, int64_t place, const Acc (&tile)[4][4]) {
  T* data = static_cast<T*>(to) + image * layout.batch;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    Four<T> four;
#pragma unroll
    for (int32_t j = 0; j < 4; ++j) four.at[j] = convert<T>(layout.last ? tile[j][i] : tile[i][j]);
    if (layout.last && place + i < places) {
      store4(data + (place + i) * layout.step, channel, channels, layout.vector, four);
    } else if (!layout.last && channel + i < channels) {
      store4(data + (channel + i) * layout.step, place, places, layout.vector, four);
    }
  }
}

// The warps' numbers of each lane, put together in order.
template <bool kMost, class Acc>
__device__ __forceinline__ Acc of_warps(Acc value, Acc (&room)[kWarps][32]) {
  const int32_t lane = threadIdx.x % 32;
  room[threadIdx.x / 32][lane] = value;
  __syncthreads();
  Acc result = room[0][lane];
#pragma unroll
  for (int32_t w = 1; w < kWarps; ++w) result = kMost ? fmax(result, room[w][lane]) : result + room[w][lane];
  __syncthreads();  // before room is written again
  return result;
}

// What is taken from exponents: nothing where all are -inf, since the difference of infinities is NaN.
template <class Acc>
__device__ __forceinline__ Acc shift_of(Acc most) {
  return most == -static_cast<Acc>(INFINITY) ? Acc(0) : most;
}

// Maxima and sums of exp over the places so far, of the columns of which a thread carries keys: two of them (kTurned)
// or four (kOwn). The threads that share a column have its maximum, and of its sum a part each.
template <class T, class Acc, bool kLast>
struct Softmax {
  static constexpr Way kWay = kLast ? kOwn : kTurned;
  static constexpr int32_t kColumns = kLast ? 4 : 2;
  static constexpr int32_t kFirst = kLast ? 2 : 1, kEnd = kLast ? 32 : 8;  // lanes' distances that share a column

  Acc most[kColumns], total[kColumns];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int32_t c = 0; c < kColumns; ++c) most[c] = -static_cast<Acc>(INFINITY), total[c] = Acc(0);
  }

  static __device__ __forceinline__ int32_t column(int32_t c) {
    return kLast ? column_of<kWay>(0) + c : column_of<kWay>(c);
  }
  static __device__ __forceinline__ bool writes() { return threadIdx.x % 32 % kEnd < kFirst; }  // one of those threads

  // Keys of places before `end` into shares of the sum; shrink: what all before it is multiplied by.
  __device__ __forceinline__ void add(const Four<T> (&keys)[2], int64_t place, int64_t end, Acc (&shares)[2][4],
                                      Acc (&shrink)[kColumns]) {
    Acc high[kColumns];
#pragma unroll
    for (int32_t c = 0; c < kColumns; ++c) high[c] = most[c];
#pragma unroll
    for (int32_t e = 0; e < 2; ++e) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        const bool inside = place + row_of<kWay>(e) + (kLast ? 0 : j) < end;
        shares[e][j] = inside ? convert<Acc>(keys[e].at[j]) : -static_cast<Acc>(INFINITY);
        high[kLast ? j : e] = fmax(high[kLast ? j : e], shares[e][j]);  // without NaN, whose share is NaN in any case
      }
    }
#pragma unroll
    for (int32_t c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int32_t far = kFirst; far < kEnd; far *= 2) {
        high[c] = fmax(high[c], __shfl_xor_sync(0xFFFFFFFFu, high[c], far));
      }
      shrink[c] = exp(most[c] - shift_of(high[c]));
      most[c] = high[c];
      total[c] *= shrink[c];
    }
#pragma unroll
    for (int32_t e = 0; e < 2; ++e) {
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        const int32_t c = kLast ? j : e;
        shares[e][j] = exp(shares[e][j] - shift_of(most[c]));
        total[c] += shares[e][j];
      }
    }
  }

  __device__ __forceinline__ void finish() {  // after it all threads that share a column have its sum
#pragma unroll
    for (int32_t c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int32_t far = kFirst; far < kEnd; far *= 2) total[c] += __shfl_xor_sync(0xFFFFFFFFu, total[c], far);
    }
  }
};

}  // namespace
}  // namespace lic_fast
