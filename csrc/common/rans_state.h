// What coders keep between steps and give each other, on the host and on devices. Free of torch.
#pragma once

#include "common/rans.h"

namespace lic_fast::rans {

// What an opening or a decoder finds; lic_fast/functional/rans.py has a sentence for each.
enum Status : int64_t {
  kDone = 0,
  kTruncated = 1,
  kForeign = 2,
  kVersion = 3,
  kProfile = 4,
  kFlags = 5,
  kNumber = 6,      // a number that is not in its shortest form, or too large
  kImpossible = 7,  // sizes that no encoder writes
  kTrailing = 8,
  kCheck = 9,
  kPadding = 10,
  kIndexOutside = 11,
  kRanOut = 12,
  kLeftOver = 13,
  kNotZero = 14,   // an encoder met a symbol other than 0 where it skips
  kNoLadder = 15,  // scales or a skip, and tables without a ladder
};

constexpr int64_t kMostDimensions = 8;

// A stream from where it is to be decoded on. Also the layout of state tensors: 24 words of 64 bits.
struct StreamState {
  int64_t word_at;  // byte of the container
  int64_t words;    // that are left
  int64_t escape_at;
  int64_t escapes;
  int64_t escape_width;
  int64_t rows;  // before the tail; -1 once in it
  int64_t unused[2];
  uint32_t x[kMostLanes];
};

// The first 32 words of a state tensor; the streams' states follow.
struct ContainerState {
  int64_t status;
  int64_t bytes;  // that the container has, or needs where it is truncated or has trailing data
  int64_t lanes;  // of a stream
  int64_t streams;
  int64_t profile;
  int64_t skip;
  int64_t steps;  // 0: not stepwise
  int64_t elements;
  int64_t elements_done;
  int64_t steps_done;
  uint64_t table_hash;
  int64_t dimensions;
  int64_t shape[kMostDimensions];
  int64_t unused[12];
};
static_assert(sizeof(StreamState) == 24 * 8 && sizeof(ContainerState) == 32 * 8);

// A stream as its encoder leaves it, to be put into a container.
struct Finished {
  int64_t rows = 0;  // before the tail
  int64_t words = 0;
  int64_t escapes = 0;
  int64_t escape_width = 1;
  uint32_t x[kMostLanes] = {};
};

}  // namespace lic_fast::rans
