// The loops of a step of a partly embedded model, over one block of kBlock places; cpu/stdet.cpp says what they are
// for.
#pragma once

#include <cmath>

#include "cpu/embedded.h"

namespace lic_fast {

struct StepHyper {  // a row of the table hyper [n, 7]
  double step_size, beta1, beta2, scale, eps, l2, decay;
};

struct Part {  // one tensor
  void* p;
  const void* g;  // null where there is no gradient
  void* slow;     // null where the step does not average
  int64_t n;
  StepHyper hyper;
};

struct Flat {  // what all parts share; m and v are null where only k r + d is asked for
  const uint8_t* code;
  const int64_t* base;
  const void *k, *d;
  void *m, *v;
  int64_t states, coefficients;
  const void *values, *slow_values;  // of the references, kModes entries
  double alpha;
  bool reset;
  std::atomic<bool>* wrong;  // set where base does not fit code
};

template <class T>
struct Coefficients {
  explicit Coefficients(const StepHyper& h)
      : c1(static_cast<T>(1.0 - h.beta1)),
        b2(static_cast<T>(h.beta2)),
        c2(static_cast<T>(1.0 - h.beta2)),
        step(static_cast<T>(h.step_size)),
        scale(static_cast<T>(h.scale)),
        eps(static_cast<T>(h.eps)),
        l2(static_cast<T>(h.l2)),
        decay(static_cast<T>(h.decay)),
        has_l2(h.l2 != 0.0),
        has_decay(h.decay != 0.0) {}
  T c1, b2, c2, step, scale, eps, l2, decay;
  bool has_l2, has_decay;  // 0 * p would not be nothing where p is not finite
};

template <class T>
struct Moments {
  T p, m, v;
};

template <class T>
LIC_FAST_INLINE Moments<T> adam(T p, T g, T m, T v, const Coefficients<T>& h) {
  const T decayed = p - h.decay * p, pulled = g + h.l2 * p;
  g = select(h.has_l2, pulled, g);
  p = select(h.has_decay, decayed, p);
  m = m + h.c1 * (g - m);
  v = h.b2 * v + h.c2 * (g * g);
  return {p - h.step * (m / (std::sqrt(v) * h.scale + h.eps)), m, v};
}

template <class T>
LIC_FAST_INLINE T average(T slow, T p, double alpha) {
  const T moved = slow + static_cast<T>(alpha) * (p - slow);
  return select(alpha == 1.0, p, moved);  // not where alpha only rounds to 1
}

template <bool all, class P, class T>
LIC_FAST_INLINE void adam_loop(P* __restrict__ p, const P* __restrict__ g, T* __restrict__ m, T* __restrict__ v,
                               const uint8_t* __restrict__ code, int64_t n, const Coefficients<T>& h) {
  for (int64_t i = 0; i < n; ++i) {
    const bool free = all || (code[i] & (kTied | kStateless)) == 0;
    const P old = p[i];
    const Moments<T> now = adam(convert<T>(old), convert<T>(g[i]), m[i], v[i], h);
    p[i] = select(free, convert<P>(now.p), old);
    m[i] = select(free, now.m, m[i]);
    v[i] = select(free, now.v, v[i]);
  }
}

template <class P, class T>
LIC_FAST_INLINE void affine_loop(P* __restrict__ p, const T* __restrict__ k, const T* __restrict__ d,
                                 const T* __restrict__ r, const uint8_t* __restrict__ code, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const P value = convert<P>(k[i] * r[i] + d[i]), old = p[i];
    p[i] = select((code[i] & kTied) != 0, value, old);
  }
}

template <bool tied, class P, class T>
LIC_FAST_INLINE void average_loop(P* __restrict__ p, T* __restrict__ slow, const T* __restrict__ k,
                                  const T* __restrict__ d, const T* __restrict__ r, const uint8_t* __restrict__ code,
                                  int64_t n, double alpha, bool reset) {
  for (int64_t i = 0; i < n; ++i) {
    T value = average(slow[i], convert<T>(p[i]), alpha);
    if constexpr (tied) value = select((code[i] & kTied) != 0, k[i] * r[i] + d[i], value);
    slow[i] = value;
    if (reset) p[i] = convert<P>(value);
  }
}

template <class T>
struct Buffers {  // values of a piece, one for each element, or packed
  alignas(64) T m[kPiece], v[kPiece], k[kPiece], d[kPiece], r[kPiece], p[kPiece + 16], g[kPiece + 16];
};

template <class T>
struct Cursor {  // where a block's compact values go on, and where they end
  T *m = nullptr, *v = nullptr, *m_end = nullptr, *v_end = nullptr;
  const T *k = nullptr, *d = nullptr, *k_end = nullptr, *d_end = nullptr;
};

// Where every element with moments is free: p and g are packed like m and v, which the loop then walks where they lie,
// so that roots and quotients are taken of these elements only.
template <class Isa, class P, class T>
LIC_FAST_INLINE void adam_packed(P* p, const P* g, const uint8_t* code, const uint64_t* state, int64_t states,
                                 int64_t n, const Coefficients<T>& h, Cursor<T>& at, Buffers<T>& x) {
  using Form = Compact<Isa, T>;
  constexpr int64_t kTail = 16;  // a fixed count, which is vectorised whole
  for (int64_t i = 0; i < n; ++i) {
    x.k[i] = convert<T>(p[i]);
    x.d[i] = convert<T>(g[i]);
  }
  Form::compress(x.p, x.p + kPiece, state, x.k);
  Form::compress(x.g, x.g + kPiece, state, x.d);
  const int64_t whole = states / kTail * kTail, left = states - whole;
  adam_loop<true>(x.p, x.g, at.m, at.v, code, whole, h);
  if (left) {
    alignas(64) T m[kTail] = {}, v[kTail] = {};
    std::copy(at.m + whole, at.m + states, m);
    std::copy(at.v + whole, at.v + states, v);
    adam_loop<true>(x.p + whole, x.g + whole, m, v, code, kTail, h);
    std::copy(m, m + left, at.m + whole);
    std::copy(v, v + left, at.v + whole);
  }
  at.m += states;
  at.v += states;
  Form::expand(x.p, x.p + kPiece, state, x.k);
  for (int64_t i = 0; i < n; ++i) p[i] = select((code[i] & kStateless) == 0, convert<P>(x.k[i]), p[i]);
}

// Where some elements with moments are tied: m and v are spread out, all elements are computed, the free ones kept.
template <class Isa, class P, class T>
LIC_FAST_INLINE void adam_spread(P* p, const P* g, const uint8_t* code, const uint64_t* state, int64_t n,
                                 const Coefficients<T>& h, Cursor<T>& at, Buffers<T>& x) {
  using Form = Compact<Isa, T>;
  T* m_next = const_cast<T*>(Form::expand(at.m, at.m_end, state, x.m));
  T* v_next = const_cast<T*>(Form::expand(at.v, at.v_end, state, x.v));
  adam_loop<false>(p, g, x.m, x.v, code, n, h);
  Form::compress(at.m, m_next, state, x.m);
  Form::compress(at.v, v_next, state, x.v);
  at.m = m_next;
  at.v = v_next;
}

template <class Isa, class P, class T>
LIC_FAST_INLINE void adam_piece(P* p, const P* g, const uint8_t* code, const uint64_t* state, const uint64_t* tied,
                                int64_t n, const Coefficients<T>& h, Cursor<T>& at, Buffers<T>& x) {
  const int64_t states = count(state, kPieceWords);
  if (states == 0) return;
  if (states == n && !any(tied, kPieceWords)) {
    adam_loop<true>(p, g, at.m, at.v, code, n, h);
    at.m += n;
    at.v += n;
    return;
  }
  uint64_t frozen = 0;
  for (int64_t w = 0; w < kPieceWords; ++w) frozen |= state[w] & tied[w];
  if (frozen) {
    adam_spread<Isa>(p, g, code, state, n, h, at, x);
  } else {
    adam_packed<Isa>(p, g, code, state, states, n, h, at, x);
  }
}

// Asks for `bytes` from `data` on: pages end where blocks do, and the processor's own prefetching stops at their ends.
LIC_FAST_INLINE void prefetch(const void* data, int64_t bytes) {
  const char* at = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// What one block reads and writes: nulls and zeros for what it does not need.
template <class P, class T>
struct Block {
  P* p;
  const P* g;
  T* slow;
  const uint8_t* code;
  int64_t n;
  Marks marks;
  int64_t states = 0, coefficients = 0;
  Cursor<T> at;

  // Asks for what lies a block ahead of the piece from element i on; beyond a tensor's end that does nothing.
  LIC_FAST_INLINE void ask_ahead(int64_t i) const {
    constexpr int64_t kPieces = kBlock / kPiece;
    prefetch(code + i + kBlock, kPiece);
    prefetch(p + i + kBlock, kPiece * sizeof(P));
    if (slow) prefetch(slow + i + kBlock, kPiece * sizeof(T));
    if (states) {
      prefetch(g + i + kBlock, kPiece * sizeof(P));
      prefetch(at.m + states, states * sizeof(T) / kPieces);
      prefetch(at.v + states, states * sizeof(T) / kPieces);
    }
    if (coefficients) {
      prefetch(at.k + coefficients, coefficients * sizeof(T) / kPieces);
      prefetch(at.d + coefficients, coefficients * sizeof(T) / kPieces);
    }
  }
};

// Block b of all, at element `first` of its part; false where base would lead outside the tensors.
template <class Isa, class P, class T>
LIC_FAST_INLINE bool open_block(const Part& part, const Flat& f, int64_t b, int64_t first, Block<P, T>& x) {
  x.p = static_cast<P*>(part.p) + first;
  x.g = part.g ? static_cast<const P*>(part.g) + first : nullptr;
  x.slow = part.slow ? static_cast<T*>(part.slow) + first : nullptr;
  x.code = f.code + b * kBlock;
  x.n = std::min(kBlock, part.n - first);
  Scan<Isa>::run(x.code, x.marks);
  if (x.g) {
    const int64_t begin = f.base[2 * b];
    x.states = count(x.marks.state, kWords);
    if (begin < 0 || begin > f.states - x.states) return false;
    x.at.m = static_cast<T*>(f.m) + begin;
    x.at.v = static_cast<T*>(f.v) + begin;
    x.at.m_end = x.at.m + x.states;
    x.at.v_end = x.at.v + x.states;
  }
  if (any(x.marks.tied, kWords)) {
    const int64_t begin = f.base[2 * b + 1];
    x.coefficients = count(x.marks.inside, kWords);
    if (begin < 0 || begin > f.coefficients - x.coefficients) return false;
    x.at.k = static_cast<const T*>(f.k) + begin;
    x.at.d = static_cast<const T*>(f.d) + begin;
    x.at.k_end = x.at.k + x.coefficients;
    x.at.d_end = x.at.d + x.coefficients;
  }
  return true;
}

// Everything for the piece of `block` from element i on.
template <class Isa, class P, class T>
LIC_FAST_INLINE void run_piece(Block<P, T>& block, const Flat& f, int64_t i, const Coefficients<T>& h, Buffers<T>& x) {
  using Form = Compact<Isa, T>;
  const int64_t n = std::min(kPiece, block.n - i), w = i / kWord;
  const uint8_t* code = block.code + i;
  const uint64_t* tied = block.marks.tied + w;
  P* p = block.p + i;
  T* slow = block.slow ? block.slow + i : nullptr;
  block.ask_ahead(i);
  if (block.states) adam_piece<Isa, P, T>(p, block.g + i, code, block.marks.state + w, tied, n, h, block.at, x);
  if (block.coefficients) {
    block.at.k = Form::expand(block.at.k, block.at.k_end, block.marks.inside + w, x.k);
    block.at.d = Form::expand(block.at.d, block.at.d_end, block.marks.inside + w, x.d);
  }
  if (!any(tied, kPieceWords)) {
    if (slow) average_loop<false>(p, slow, x.k, x.d, x.r, code, n, f.alpha, f.reset);
    return;
  }
  if (!slow || !f.reset) {
    ModeTable<Isa, T>::run(static_cast<const T*>(f.values), code, n, x.r);
    affine_loop(p, x.k, x.d, x.r, code, n);
  }
  if (slow) {
    ModeTable<Isa, T>::run(static_cast<const T*>(f.slow_values), code, n, x.r);
    average_loop<true>(p, slow, x.k, x.d, x.r, code, n, f.alpha, f.reset);
  }
}

template <class Isa, class P, class T>
LIC_FAST_INLINE void blocks_of(const Part& part, const Flat& f, int64_t first_block, int64_t begin, int64_t end) {
  const Coefficients<T> h(part.hyper);
  Buffers<T> x;
  for (int64_t b = begin; b < end; ++b) {
    Block<P, T> block;
    if (!open_block<Isa>(part, f, b, (b - first_block) * kBlock, block)) {
      *f.wrong = true;
      continue;
    }
    for (int64_t i = 0; i < block.n; i += kPiece) run_piece<Isa>(block, f, i, h, x);
  }
}

}  // namespace lic_fast
