// Tables of tensor lists that travel in a kernel's parameters: one launch for a whole list, no copy to the device.
#pragma once

#include "common/tensors.h"

namespace lic_fast {

// Kernel parameters hold 32,764 bytes since CUDA 12.1; longer lists take another launch each kListCapacity tensors.
template <class Entry>
struct ListTable {
  static constexpr int32_t kCapacity = (32764 - 64) / (sizeof(Entry) + sizeof(int32_t));
  Entry entries[kCapacity];
  int32_t first_block[kCapacity];  // the first block of entry e; entries hold at least one block
  int32_t count = 0;
  int32_t blocks = 0;

  bool full() const { return count == kCapacity; }

  void add(const Entry& entry, int32_t entry_blocks) {
    entries[count] = entry;
    first_block[count++] = blocks;
    blocks += entry_blocks;
  }

  // The entry that block b works on: the last one whose first block is not beyond b. Uniform in a block.
#ifdef __CUDACC__
  __device__
#endif
      int32_t entry_of(int32_t b) const {
    int32_t low = 0, high = count - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) >> 1;
      if (first_block[middle] <= b) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace lic_fast
