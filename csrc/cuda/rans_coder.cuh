// The warp of common/rans_warp.h on a GPU, tables in shared memory, and the kernels around it.
//
// A block loads the tables once and decodes a stream a warp. It has kWarps warps, of which as many get a stream as are
// needed to give every multiprocessor work before any gets a second warp: alone on its scheduler a warp is fastest, and
// the others then only help with the tables. Tables that shared memory does not hold are read through the cache.
#pragma once

#include "common/crc32c_pieces.h"
#include "common/list.h"
#include "common/rans_source.h"
#include "common/rans_warp_encode.h"
#include "cuda/device.cuh"

namespace lic_fast::rans::device {

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = 32 * kWarps;
constexpr int64_t kQueueBytes = int64_t{kWarps} * warp::kQueue * sizeof(int64_t);

struct Warp {
  // A lane's own; a function for 32 lanes names the lane, which is always this thread's.
  template <class T>
  struct Each {
    T own;
    LIC_FAST_ANYWHERE T& operator[](int32_t) { return own; }
    LIC_FAST_ANYWHERE const T& operator[](int32_t) const { return own; }
  };

  template <class Body>
  LIC_FAST_ANYWHERE void each(const Body& body) const {
    body(lane);
  }
  template <class Test>
  LIC_FAST_ANYWHERE uint32_t ballot(const Test& test) const {
#ifdef __CUDA_ARCH__
    return __ballot_sync(~0u, test(lane));
#else
    return test(lane);
#endif
  }
  template <class T, class From>
  LIC_FAST_ANYWHERE Each<T> shuffle(const Each<T>& values, const From& from) const {
#ifdef __CUDA_ARCH__
    return {__shfl_sync(~0u, values.own, from(lane))};
#else
    return {values[from(lane)]};
#endif
  }
  LIC_FAST_ANYWHERE void sync() const {
#ifdef __CUDA_ARCH__
    __syncwarp();
#endif
  }

  int32_t lane;
  int64_t* queue;  // of kQueue
};

// What all kernels are told: packed tables on the device, `count` words of 64 bits, and how streams lie in blocks. It
// is small because a list takes the rest of a kernel's parameters.
struct Launch {
  const int64_t* words;
  int32_t count;
  int8_t each;  // streams of a block
  bool scales;  // indexes are scales
  bool last;    // step
};

// Tables whose sections lie elsewhere: so many bytes on.
__device__ __forceinline__ void move(Tables& tables, const int64_t* from, const int64_t* to) {
  const auto moved = [&](const void* section) {
    return reinterpret_cast<const char*>(to) +
           (reinterpret_cast<const char*>(section) - reinterpret_cast<const char*>(from));
  };
  tables.level = reinterpret_cast<const Level*>(moved(tables.level));
  tables.starts = reinterpret_cast<const uint16_t*>(moved(tables.starts));
  tables.bucket = reinterpret_cast<const uint8_t*>(moved(tables.bucket));
}
__device__ __forceinline__ void move(MixtureTables& tables, const int64_t* from, const int64_t* to) {
  const auto moved = [&](const void* section) {
    return reinterpret_cast<const char*>(to) +
           (reinterpret_cast<const char*>(section) - reinterpret_cast<const char*>(from));
  };
  tables.entries = reinterpret_cast<const uint32_t*>(moved(tables.entries));
  tables.reach = reinterpret_cast<const uint32_t*>(moved(tables.reach));
  tables.quantile = reinterpret_cast<const int32_t*>(moved(tables.quantile));
}

// Whether there are levels for scales and for what is skipped.
__device__ __forceinline__ bool has_ladder(const Tables& tables) { return tables.ladder >= 0; }
__device__ __forceinline__ bool has_ladder(const MixtureTables&) { return false; }

// Called by all threads of a block: afterwards the tables are there, in shared memory where kShared. False where they
// are none.
template <bool kShared, class TableSet>
__device__ __forceinline__ bool load_tables(const Launch& packed, TableSet* tables) {
  extern __shared__ int64_t dynamic[];
  if (!open(packed.words, packed.count, tables)) return false;
  if constexpr (kShared) {
    const int64_t* sections = packed.words + kTablesHeader;
    const int32_t count = packed.count - static_cast<int32_t>(kTablesHeader);
#pragma unroll 8
    for (int32_t i = threadIdx.x; i < count; i += kThreads) dynamic[i] = sections[i];
    move(*tables, sections, dynamic);
    __syncthreads();
  }
  return true;
}

// Of what goes wrong in several streams or steps the smallest status stays, whatever comes first.
__device__ __forceinline__ void report(int64_t* status, int64_t found) {
  auto* word = reinterpret_cast<unsigned long long*>(status);
  unsigned long long seen = *word;
  while (found != kDone && (seen == kDone || static_cast<unsigned long long>(found) < seen)) {
    const unsigned long long before = atomicCAS(word, seen, static_cast<unsigned long long>(found));
    if (before == seen) return;
    seen = before;
  }
}

// A container of a batch: its streams are those from `first_block` on in the list.
struct Container {
  const uint8_t* data;
  int64_t bytes;
  ContainerState* state;
  int32_t sample;
  int32_t streams;
};

template <class By>
struct ToSymbols {
  using Source = Symbols<By>;
  By by;
  int64_t stride;  // from a sample to the next in `by`
  int32_t* symbols;
  int64_t elements;

  __device__ __forceinline__ Source source(int64_t sample, const Share& share) const {
    return {by + (sample * stride + share.first), symbols + (sample * elements + share.first)};
  }
};

template <class By>
struct ToValues {
  using Source = Values<By>;
  By by;
  const float* means;
  const int32_t* places;
  float* values;
  int64_t room;
  int64_t elements;

  __device__ __forceinline__ Source source(int64_t sample, const Share& share) const {
    const int64_t at = sample * room;
    return {by + at,     means ? means + at : nullptr,      places,
            values + at, static_cast<int32_t>(share.first), static_cast<int32_t>(room)};
  }
};

// One stream's share of a step; whether anything is left over is known to the last step.
template <class Target, class TableSet>
__device__ __forceinline__ int64_t decode_share(Warp& warp, const TableSet& tables, const Container& c, int64_t w,
                                                const Target& target, bool last) {
  const Layout layout{c.state->lanes, c.state->streams, c.state->skip};
  if (layout.streams != c.streams || layout.lanes < 1 || layout.lanes > kMostLanes || c.state->bytes != c.bytes) {
    return kImpossible;
  }
  if (layout.skip && !has_ladder(tables)) return kNoLadder;
  StreamState* state = reinterpret_cast<StreamState*>(c.state + 1) + w;
  const Share share = share_of(target.elements, layout, w);
  typename Target::Source source = target.source(c.sample, share);
  warp::Decoder<Warp, typename Target::Source> decoder(warp, tables, layout, c.data, c.bytes, state);
  const Status status = decoder.run(source, static_cast<int32_t>(share.count));
  if (status != kDone || !last) return status;
  return warp::used_up(warp, layout, *state) ? kDone : kLeftOver;
}

template <class Target, bool kShared>
__global__ void __launch_bounds__(kThreads, 2)
    decode_kernel(const __grid_constant__ ListTable<Container> list, const Launch how, const Target target) {
  __shared__ int64_t queues[kWarps][warp::kQueue];
  typename Target::Source::Coding::TableSet tables;
  const bool opened = load_tables<kShared>(how, &tables);
  const int32_t own = threadIdx.x / 32, stream = static_cast<int32_t>(blockIdx.x) * how.each + own;
  if (own >= how.each || stream >= list.blocks) return;
  Warp warp{static_cast<int32_t>(threadIdx.x % 32), queues[own]};
  const int32_t entry = list.entry_of(stream), w = stream - list.first_block[entry];
  const Container& c = list.entries[entry];
  int64_t status = opened ? kDone : kImpossible;
  if (opened && how.scales && !has_ladder(tables)) status = kNoLadder;
  if (status == kDone) status = decode_share(warp, tables, c, w, target, how.last);
  if (warp.lane > 0) return;
  if (w == 0) {
    ContainerState& head = *c.state;
    const bool too_many = head.elements - head.elements_done < target.elements;
    head.elements_done += target.elements;
    head.steps_done += !how.last || target.elements > 0;
    const bool all = head.elements_done == head.elements && (head.steps == 0 || head.steps == head.steps_done);
    if (too_many || (how.last && !all)) report(&head.status, kLeftOver);
  }
  report(&c.state->status, status);
}

// Symbols [B, elements] and how they are coded, and for each stream of a sample the element at which its room begins.
template <class By>
struct Encoding {
  const int32_t* symbols;
  By by;
  int64_t stride;  // from a sample to the next in `by`
  const int64_t* steps;
  const int64_t* rooms;  // [streams + 1]
  int64_t batch, elements, step_count;
  Layout layout;
  uint16_t* words;   // 2 an element
  int32_t* escapes;  // 1 an element
  Finished* finished;
};

template <class By, bool kShared>
__global__ void __launch_bounds__(kThreads) encode_kernel(const Encoding<By> e, const Launch how) {
  __shared__ int64_t queues[kWarps][warp::kQueue];
  typename By::TableSet tables;
  const bool opened = load_tables<kShared>(how, &tables);
  const int32_t own = threadIdx.x / 32;
  const int64_t stream = static_cast<int64_t>(blockIdx.x) * how.each + own;
  if (own >= how.each || stream >= e.batch * e.layout.streams) return;
  Warp warp{static_cast<int32_t>(threadIdx.x % 32), queues[own]};
  Finished* finished = e.finished + stream;
  if (!opened || ((how.scales || e.layout.skip) && !has_ladder(tables))) {
    if (warp.lane == 0) finished->rows = -(opened ? kNoLadder : kImpossible);
    return;
  }
  const int64_t sample = stream / e.layout.streams, w = stream % e.layout.streams;
  const int64_t first = sample * e.elements, room_end = first + e.rooms[w + 1];
  warp::Encoder<Warp, By> encoder(warp, tables, e.layout, e.words + 2 * room_end, e.escapes + room_end);
  const Given<By> given{e.by + sample * e.stride, e.symbols + first};
  int64_t end = e.elements;
  for (int64_t s = e.step_count - 1; s >= 0; --s) {
    const Share share = share_of(e.steps[s], e.layout, w);
    end -= e.steps[s];
    encoder.add(given + (end + share.first), share.count);
  }
  const Status status = encoder.finish(finished);
  if (status != kDone && warp.lane == 0) finished->rows = -status;
}

// A piece of a container: bytes from every four, `width` of them.
struct Piece {
  const uint8_t* from;
  uint8_t* to;
  int64_t bytes;
  int64_t width;  // 1, 2 or 4
};

__global__ void __launch_bounds__(kThreads) gather_kernel(const Piece* pieces) {
  const Piece piece = pieces[blockIdx.x];
  const int32_t bits = piece.width == 4 ? 2 : piece.width == 2 ? 1 : 0;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < piece.bytes; i += stride) {
    piece.to[i] = piece.from[(i >> bits) * 4 + (i & ((1 << bits) - 1))];
  }
}

// The CRC-32C of containers, without their last four bytes: exclusive or over pieces.
struct Whole {
  uint8_t* data;
  int64_t bytes;  // before the check
};

__global__ void __launch_bounds__(kThreads) check_kernel(const Whole* containers, uint32_t* checks) {
  __shared__ uint32_t table[256];
  for (int32_t byte = threadIdx.x; byte < 256; byte += kThreads) table[byte] = crc32c_pieces::with_bits(byte, 8);
  __syncthreads();
  const Whole whole = containers[blockIdx.x];
  const int64_t count = crc32c_pieces::pieces(whole.bytes), stride = static_cast<int64_t>(gridDim.y) * kThreads;
  uint32_t sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < count; i += stride) {
    sum ^= crc32c_pieces::of_piece(whole.data, whole.bytes, i, table);
  }
  if (sum) atomicXor(checks + blockIdx.x, sum);
}

__global__ void __launch_bounds__(kThreads)
    seal_kernel(const Whole* containers, const uint32_t* checks, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  for (int32_t byte = 0; byte < 4; ++byte) {
    containers[i].data[containers[i].bytes + byte] = static_cast<uint8_t>(~checks[i] >> 8 * byte);
  }
}

}  // namespace lic_fast::rans::device
