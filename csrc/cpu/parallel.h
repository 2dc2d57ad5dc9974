// One parallel region over all elements of a list of tensors.
#pragma once

#include <algorithm>

#include "common/tensors.h"

namespace lic_fast {

constexpr int64_t kSerialElements = 1 << 15;  // less than this stays on one thread

// Calls body(t, begin, end) for elements [begin, end) of tensor t; first[t] is the number of elements before tensor t,
// first.back() that of all. Every thread takes one stretch of the concatenated list, so that shapes do not matter.
template <class Body>
void parallel_over_list(const std::vector<int64_t>& first, const Body& body) {
  torch::stable::parallel_for(0, first.back(), kSerialElements, [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (; begin < end; ++t) {
      const int64_t stop = std::min(end, first[t + 1]);
      if (stop > begin) body(t, begin - first[t], stop - first[t]);
      begin = stop;
    }
  });
}

template <class T>
T* advance(T* base, int64_t elements, int64_t size) {
  return base ? reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + elements * size) : nullptr;
}

}  // namespace lic_fast
