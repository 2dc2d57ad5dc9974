// What the kernels of channel_norm.cu are made of: a thread's part of a place, and the sums over places.
#pragma once

#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int64_t kEnoughBlocks = 1024;
constexpr int64_t kLongest = 512;  // places of a stretch whose sums one block makes

struct Norm {
  const void* x;
  const void* grad;    // null forward
  const void* weight;  // of the arithmetic's dtype, like all that follow
  const void* bias;
  const void* shift;                   // [B, C], or null
  void* out;                           // y, or d_x
  void* sums;                          // backward: [B * stretches, 3, C], of each stretch d_weight, d_bias and d_shift
  int64_t places, stretch, stretches;  // of an image; a stretch's; an image's
  int32_t channels;
  double eps;
  bool relu;
};

__device__ __forceinline__ int64_t first_place(const Norm& p) {
  return int64_t{blockIdx.x % static_cast<uint32_t>(p.stretches)} * p.stretch;
}

// The sum over all warps of what each has for its lane.
template <class Acc>
__device__ __forceinline__ Acc warps_sum(Acc value, Acc (&room)[kWarps][32]) {
  const int32_t lane = threadIdx.x % 32;
  room[threadIdx.x / 32][lane] = value;
  __syncthreads();
  Acc sum = room[0][lane];
#pragma unroll
  for (int32_t w = 1; w < kWarps; ++w) sum += room[w][lane];
  __syncthreads();  // before room is written again
  return sum;
}

template <class Acc>
__device__ __forceinline__ Acc lanes_sum(Acc value) {
#pragma unroll
  for (int32_t step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

// The sum over the threads that share a place; all of them get it.
template <bool kLast, class Acc>
__device__ __forceinline__ Acc place_sum(Acc value, Acc (&room)[kWarps][32]) {
  if constexpr (kLast) {
    return lanes_sum(value);
  } else {
    return warps_sum(value, room);
  }
}

// Lane l gets the warp's sum of v[l % N]: halves are exchanged, N - 1 shuffles in place of 5 N.
template <int32_t N, class Acc>
__device__ __forceinline__ Acc transposed_sum(Acc (&v)[N]) {
#pragma unroll
  for (int32_t half = N / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int32_t i = 0; i < half; ++i) {
      const Acc sent = upper ? v[i] : v[i + half], own = upper ? v[i + half] : v[i];
      v[i] = own + __shfl_xor_sync(0xFFFFFFFFu, sent, half);
    }
  }
#pragma unroll
  for (int32_t step = N; step < 32; step *= 2) v[0] += __shfl_xor_sync(0xFFFFFFFFu, v[0], step);
  return v[0];
}

// A thread's channels of one place: phase, phase + kStep, ... kKept of them at the most, in registers; 0: any number,
// read from memory whenever they are needed.
template <class T, class Acc, bool kLast, int32_t kKept>
struct Tile {
  static constexpr int32_t kPlaces = kLast ? kWarps : 32, kStep = kLast ? 32 : kWarps;
  static constexpr int32_t kHeld = kKept > 0 ? kKept : 1;

  Acc held[kHeld], held_grad[kHeld];
  Acc mean, inverse;
  int64_t base;
  int32_t phase;
  bool inside;

  __device__ __forceinline__ Tile(const Norm& p, int64_t image, int64_t first) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t place = first + (kLast ? warp : lane);
    phase = kLast ? lane : warp;
    inside = place < p.places;
    base = image * p.channels * p.places + (kLast ? place * p.channels : place);
  }

  __device__ __forceinline__ int64_t place_of(const Norm& p, int32_t c) const {
    return base + (kLast ? int64_t{c} : c * p.places);
  }

  // body(k, c) for all channels c of this thread; k: their number among them.
  template <class Body>
  __device__ __forceinline__ void each(const Norm& p, const Body& body) const {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int32_t k = 0; k < kKept; ++k) {
        const int32_t c = phase + k * kStep;
        if (c < p.channels) body(k, c);
      }
    } else {
      for (int32_t c = phase; c < p.channels; c += kStep) body(0, c);
    }
  }

  __device__ __forceinline__ Acc read(const Norm& p, const void* from, int32_t c) const {
    return inside ? convert<Acc>(static_cast<const T*>(from)[place_of(p, c)]) : Acc(0);
  }

  // Mean and deviation of the place; what is held becomes normalized.
  __device__ __forceinline__ void normalize(const Norm& p, Acc (&room)[kWarps][32]) {
    const Acc count = static_cast<Acc>(p.channels);
    Acc sum = Acc(0), square = Acc(0);
    if constexpr (kKept > 0) {  // all loads before the first sum
      each(p, [&](int32_t k, int32_t c) { held[k] = read(p, p.x, c); });
      each(p, [&](int32_t k, int32_t) { sum += held[k]; });
    } else {
      each(p, [&](int32_t, int32_t c) { sum += read(p, p.x, c); });
    }
    mean = place_sum<kLast>(sum, room) / count;
    each(p, [&](int32_t k, int32_t c) {
      Acc centred;
      if constexpr (kKept > 0) {
        centred = held[k] -= mean;
      } else {
        centred = read(p, p.x, c) - mean;
      }
      square += centred * centred;
    });
    inverse = Acc(1) / sqrt(place_sum<kLast>(square, room) / count + static_cast<Acc>(p.eps));
    if constexpr (kKept > 0) each(p, [&](int32_t k, int32_t) { held[k] *= inverse; });
  }

  // A channel's normalized value.
  __device__ __forceinline__ Acc value(const Norm& p, int32_t k, int32_t c) const {
    if constexpr (kKept > 0) {
      return held[k];
    } else {
      return (read(p, p.x, c) - mean) * inverse;
    }
  }

  __device__ __forceinline__ void read_gradient(const Norm& p) {
    if constexpr (kKept > 0) each(p, [&](int32_t k, int32_t c) { held_grad[k] = read(p, p.grad, c); });
  }

  __device__ __forceinline__ Acc gradient(const Norm& p, int32_t k, int32_t c) const {
    if constexpr (kKept > 0) {
      return held_grad[k];
    } else {
      return read(p, p.grad, c);
    }
  }

  // The gradient that the ReLU lets pass.
  __device__ __forceinline__ Acc kept(const Norm& p, int32_t k, int32_t c) const {
    const Acc g = gradient(p, k, c);
    if (!p.relu) return g;
    const Acc w = static_cast<const Acc*>(p.weight)[c], b = static_cast<const Acc*>(p.bias)[c];
    return add(multiply(value(p, k, c), w), b) > Acc(0) ? g : Acc(0);
  }

  // What a place adds to d_weight, d_bias and d_shift of channel c.
  __device__ __forceinline__ void terms(const Norm& p, int32_t k, int32_t c, Acc (&term)[3]) const {
    const Acc g = kept(p, k, c);
    term[0] = inside ? g * value(p, k, c) : Acc(0);  // no value outside, where eps may be 0
    term[1] = g;
    term[2] = gradient(p, k, c);
  }
};

// The sums over a block's places of d_weight, d_bias and d_shift. Rows: a thread adds its channels in registers, and at
// the end the warps' meet. Planes: a tile's places are added by exchanges in the warp, whose lanes keep a channel each.
// Without registers for all channels the block's row of sums is where they are added.
template <class Acc, bool kLast, int32_t kKept>
struct Sums {
  static constexpr int32_t kChunk = 8;  // channels whose places are added at once
  static constexpr int32_t kNumbers = kKept == 0 ? 1 : kLast ? kKept : kKept / kChunk;
  static constexpr int32_t kStep = kLast ? 32 : kWarps;

  Acc numbers[3][kNumbers];
  Acc* row;  // [3, C]

  __device__ __forceinline__ explicit Sums(const Norm& p)
      : row(static_cast<Acc*>(p.sums) + int64_t{blockIdx.x} * 3 * p.channels) {
#pragma unroll
    for (int32_t kind = 0; kind < 3; ++kind) {
#pragma unroll
      for (int32_t i = 0; i < kNumbers; ++i) numbers[kind][i] = Acc(0);
    }
  }

  template <class Here>
  __device__ __forceinline__ void add(const Norm& p, const Here& tile, Acc (&room)[kWarps][32], bool first) {
    if constexpr (kKept == 0) {
      add_in_memory(p, tile, room, first);
    } else if constexpr (kLast) {
      tile.each(p, [&](int32_t k, int32_t c) {
        Acc term[3];
        tile.terms(p, k, c, term);
#pragma unroll
        for (int32_t kind = 0; kind < 3; ++kind) numbers[kind][k] += term[kind];
      });
    } else {
#pragma unroll
      for (int32_t i = 0; i < kNumbers; ++i) {
        Acc terms[3][kChunk];
#pragma unroll
        for (int32_t j = 0; j < kChunk; ++j) {
          const int32_t k = i * kChunk + j, c = tile.phase + k * kStep;
          Acc term[3] = {};
          if (c < p.channels) tile.terms(p, k, c, term);
#pragma unroll
          for (int32_t kind = 0; kind < 3; ++kind) terms[kind][j] = term[kind];
        }
#pragma unroll
        for (int32_t kind = 0; kind < 3; ++kind) numbers[kind][i] += transposed_sum(terms[kind]);
      }
    }
  }

  template <class Here>
  __device__ __forceinline__ void add_in_memory(const Norm& p, const Here& tile, Acc (&room)[kWarps][32], bool first) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int32_t from = 0; from < p.channels; from += kStep) {  // the same for all threads: all add
      const int32_t c = from + tile.phase;
      Acc term[3] = {};
      if (c < p.channels) tile.terms(p, 0, c, term);
#pragma unroll
      for (int32_t kind = 0; kind < 3; ++kind) {
        Acc sum;
        if constexpr (kLast) {
          sum = warps_sum(term[kind], room);
        } else {
          sum = lanes_sum(term[kind]);
        }
        if ((kLast ? warp : lane) != 0 || c >= p.channels) continue;
        Acc* to = row + int64_t{kind} * p.channels + c;
        *to = first ? sum : *to + sum;
      }
    }
  }

  __device__ __forceinline__ void write(const Norm& p, Acc (&room)[kWarps][32]) {
    if constexpr (kKept == 0) return;
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int32_t kind = 0; kind < 3; ++kind) {
      Acc* to = row + int64_t{kind} * p.channels;
#pragma unroll
      for (int32_t i = 0; i < kNumbers; ++i) {
        const Acc sum = kLast ? warps_sum(numbers[kind][i], room) : numbers[kind][i];
        const int32_t c = kLast ? i * 32 + lane : warp + (i * kChunk + lane) * kWarps;
        if ((kLast ? warp == 0 : lane < kChunk) && c < p.channels) to[c] = sum;
      }
    }
  }
};

}  // namespace
}  // namespace lic_fast
