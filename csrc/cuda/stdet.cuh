// A step of a partly embedded model over a list of tensors (lic_fast/reference/stdet.py), one main launch a list:
//     free elements   m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2
//                     p <- p - step_size m / (scale sqrt(v) + eps);  slow <- slow + alpha (p - slow);  p <- slow
//     tied elements   k r + d, r the new value of their mode's reference
// Before it a block of a thread a mode computes the references' new values from the old state, with the same function,
// into 128 floats that every block keeps in shared memory. No launch waits for the host: both fit into a CUDA graph,
// which then repeats the hyperparameters it was captured with, since they travel, as the list does, in the kernels'
// parameters (csrc/common/list.h), rounded to fp32.
//
// Bytes an element, fp32: free 29 (code 1, g 4, p, m, v 8 each), with slow 37 (33 where alpha is 1, which does not read
// it); tied 13 (code 1, k, d 4 each, p 4), with slow 17; neither, 1; and 16 a block for its row of `base`. What an
// element does not need is not read: no gradient or state of tied ones, no k or d of others.
//
// A block takes kBlock places, a warp 128 of them in four rows of 32 neighbours, a lane one of each row. Elements that
// have a state lie compactly in exp_avg; an element's slot is its block's `base` plus how many precede it in the block:
// those of earlier warps (packed counts in shared memory), of earlier rows and of lower lanes (a ballot each). So every
// access of a warp, to compact and to flat tensors alike, covers neighbouring words and fills its sectors whatever the
// alignment. With four neighbours a lane, p and g could go by vectors of four, but m, v, k, d could not (their slots
// have no alignment): every access of theirs would touch four times as many sectors, and stores take them all to L2.
// 59 to 62 registers, so four blocks a multiprocessor, 20 loads of 4 bytes in flight a thread; the two waits before the
// first load of m (code, the barrier) are left to the other blocks. 80 to 85 % of copy bandwidth expected, not
// measured.
//
// Takes parameters and gradients of one dtype, fp32, bf16 or fp16, all else fp32; dense, laid out alike. A reference
// outside its list, and a mode outside [0, M), gives NaN and reads nothing. Arithmetic is unfused.
#pragma once

#include "common/list.h"
#include "cuda/device.cuh"

namespace lic_fast {
namespace {

constexpr int32_t kLanes = 32;
constexpr int32_t kRows = 4;
constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kLanes * kWarps;
constexpr int64_t kBlock = int64_t{kThreads} * kRows;  // places, as lic_fast/reference/_layout.py has it
constexpr uint32_t kTied = 0x80, kStateless = 0x40, kOutside = 0x3F, kPadding = kStateless | kOutside;
constexpr int32_t kModes = 64;  // with OUTSIDE, which has no value

struct Hyper {  // a row of the table, rounded to the arithmetic's fp32
  float step_size, rest1, beta2, rest2, scale, eps, l2, decay;
};

struct Entry {
  void* param;
  const void* grad;  // null where there is none
  float* slow;       // null where this step does not average
  int64_t n;
  Hyper hyper;
  int32_t block;  // the tensor's first, in flat order
  bool has_l2, has_decay;
};

struct Averaging {
  float alpha;
  bool moves;  // alpha is not 1
  bool reset;
};

__device__ __forceinline__ float adam(float p, float g, float& m, float& v, const Entry& e) {
  const Hyper& h = e.hyper;
  if (e.has_l2) g = add(g, multiply(h.l2, p));
  if (e.has_decay) p = add(p, -multiply(h.decay, p));
  m = add(m, multiply(h.rest1, add(g, -m)));
  v = add(multiply(h.beta2, v), multiply(h.rest2, multiply(g, g)));
  return add(p, -multiply(h.step_size, __fdiv_rn(m, add(multiply(__fsqrt_rn(v), h.scale), h.eps))));
}

// An element that is not tied: Adam's step where `steps`, then the moving average where `averages`.
template <class P>
__device__ __forceinline__ void advance(P& p, float& s, float g, float& m, float& v, const Entry& e, bool steps,
                                        bool averages, const Averaging& how) {
  if (steps) p = convert<P>(adam(convert<float>(p), g, m, v, e));
  if (!averages) return;
  const float value = convert<float>(p);
  s = how.moves ? add(s, multiply(how.alpha, add(value, -s))) : value;
  if (how.reset && how.moves) p = convert<P>(s);
}

__device__ __forceinline__ bool takes_step(const Entry& e, uint32_t code) {
  return e.grad != nullptr && (code & (kTied | kStateless)) == 0;
}

// values [2, kModes]: r for the parameters (slow's where they are reset to it), r for slow. A launch fills in the
// references among the table's tensors, which are those from `first` on; the first launch also all that are none.
template <class P>
__global__ void __launch_bounds__(kModes)
    stdet_references_kernel(const __grid_constant__ ListTable<Entry> table, const uint8_t* code, const float* exp_avg,
                            const float* exp_avg_sq, int64_t states, const int64_t* refs, float* values, int32_t modes,
                            int32_t first, Averaging how) {
  const int32_t mode = static_cast<int32_t>(threadIdx.x);
  float r = __int_as_float(0x7FC00000), r_slow = r;
  const int64_t* ref = refs + 3 * mode;
  const bool here = mode < modes && ref[0] >= first && ref[0] - first < table.count;
  if (here) {
    const Entry& e = table.entries[ref[0] - first];
    const int64_t i = ref[1], slot = ref[2];
    if (i >= 0 && i < e.n) {
      const uint32_t c = code[int64_t{e.block} * kBlock + i];
      const bool steps = takes_step(e, c);
      if (!steps || (slot >= 0 && slot < states)) {
        P p = static_cast<const P*>(e.param)[i];
        float s = e.slow ? e.slow[i] : 0.0f;
        float g = 0.0f, m = 0.0f, v = 0.0f;
        if (steps) {
          g = convert<float>(static_cast<const P*>(e.grad)[i]);
          m = exp_avg[slot];
          v = exp_avg_sq[slot];
        }
        advance(p, s, g, m, v, e, steps, e.slow && !(c & kTied), how);
        r_slow = s;
        r = e.slow && how.reset ? s : convert<float>(p);
      }
    }
  }
  if (here || first == 0) {
    values[mode] = r;
    values[kModes + mode] = r_slow;
  }
}

// For each row the slot of the lane's element: elements with a state in the lower half, embeddable ones in the upper,
// counted from the block's first. Takes all threads of the block.
__device__ __forceinline__ void count_slots(const uint32_t (&code)[kRows], uint32_t (&slot)[kRows]) {
  __shared__ uint32_t counts[kWarps];
  const uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const uint32_t lower = (1u << lane) - 1;
  uint32_t count = 0;
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const uint32_t states = __ballot_sync(~0u, (code[j] & kStateless) == 0);
    const uint32_t embeddable = __ballot_sync(~0u, (code[j] & kOutside) != kOutside);
    slot[j] = count + __popc(states & lower) + (__popc(embeddable & lower) << 16);
    count += __popc(states) + (__popc(embeddable) << 16);
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  uint32_t before = 0;
#pragma unroll
  for (uint32_t w = 0; w + 1 < kWarps; ++w) before += w < warp ? counts[w] : 0;
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) slot[j] += before;
}

template <class P>
__global__ void __launch_bounds__(kThreads)
    stdet_step_kernel(const __grid_constant__ ListTable<Entry> table, const uint8_t* code, const int64_t* base,
                      const float* k, const float* d, float* exp_avg, float* exp_avg_sq, const float* values,
                      Averaging how) {
  __shared__ float reference[2 * kModes];
  const int32_t index = table.entry_of(static_cast<int32_t>(blockIdx.x));
  const Entry& e = table.entries[index];
  const int64_t block = static_cast<int32_t>(blockIdx.x) - table.first_block[index];
  const int64_t row = e.block + block;  // of base
  const int32_t within = static_cast<int32_t>(threadIdx.x / kLanes * (kLanes * kRows) + threadIdx.x % kLanes);
  const int64_t first = block * kBlock + within;
  // loaded first, used last: a warp waits where a value is used
  const int64_t first_state = base[2 * row], first_coefficient = base[2 * row + 1];
  const float value = threadIdx.x < 2 * kModes ? values[threadIdx.x] : 0.0f;

  P* const param = static_cast<P*>(e.param);
  uint32_t c[kRows];
  bool steps[kRows], averages[kRows];
  P p[kRows];
  float g[kRows] = {}, s[kRows] = {};
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const bool inside = first + kLanes * j < e.n;
    c[j] = inside ? code[row * kBlock + within + kLanes * j] : kPadding;
    steps[j] = takes_step(e, c[j]);
    averages[j] = e.slow && inside && !(c[j] & kTied);
  }
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const int64_t i = first + kLanes * j;
    p[j] = steps[j] || averages[j] ? param[i] : P{};
    if (steps[j]) g[j] = convert<float>(static_cast<const P*>(e.grad)[i]);
    if (averages[j] && how.moves) s[j] = e.slow[i];
  }

  if (threadIdx.x < 2 * kModes) reference[threadIdx.x] = value;
  uint32_t slot[kRows];
  count_slots(c, slot);  // also the barrier behind `reference`

  int64_t at[kRows];                   // in exp_avg, or in k
  float a[kRows] = {}, b[kRows] = {};  // m and v, or k and d: no element has use for both
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const bool rebuilt = (c[j] & kTied) && (c[j] & kOutside) != kOutside;
    at[j] = rebuilt ? first_coefficient + (slot[j] >> 16) : first_state + (slot[j] & 0xFFFF);
    if (steps[j] || rebuilt) {
      a[j] = (rebuilt ? k : exp_avg)[at[j]];  // one load for either
      b[j] = (rebuilt ? d : exp_avg_sq)[at[j]];
    }
  }
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const int64_t i = first + kLanes * j;
    if (c[j] & kTied) {
      const int32_t mode = static_cast<int32_t>(c[j] & kOutside);
      param[i] = convert<P>(add(multiply(a[j], reference[mode]), b[j]));
      if (e.slow) e.slow[i] = add(multiply(a[j], reference[kModes + mode]), b[j]);
      continue;
    }
    advance(p[j], s[j], g[j], a[j], b[j], e, steps[j], averages[j], how);
    if (steps[j]) {
      exp_avg[at[j]] = a[j];
      exp_avg_sq[at[j]] = b[j];
    }
    if (averages[j]) e.slow[i] = s[j];
    if (steps[j] || (averages[j] && how.reset && how.moves)) param[i] = p[j];
  }
}

struct Gradient {
  void* grad;
  int64_t n;
  int64_t block;
};

// Bits: the type of a gradient's element, of which nothing but a zero is written. Reads a byte an element.
template <class Bits>
__global__ void __launch_bounds__(kThreads)
    stdet_mask_kernel(const __grid_constant__ ListTable<Gradient> table, const uint8_t* code) {
  const int32_t index = table.entry_of(static_cast<int32_t>(blockIdx.x));
  const Gradient& e = table.entries[index];
  const int64_t block = static_cast<int32_t>(blockIdx.x) - table.first_block[index];
#pragma unroll
  for (int32_t j = 0; j < kRows; ++j) {
    const int64_t within = threadIdx.x + kThreads * j;
    const int64_t i = block * kBlock + within;
    if (i < e.n && (code[(e.block + block) * kBlock + within] & kTied)) static_cast<Bits*>(e.grad)[i] = Bits{0};
  }
}

}  // namespace
}  // namespace lic_fast
