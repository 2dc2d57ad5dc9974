// CompressAI's entropy coder over tensors: what its RansEncoder and RansDecoder do with lists, byte for byte.
//
// Reads 8 bytes a symbol and writes what the stream takes, or the other way round. One lane and no threads: the format
// is one chain. The coder itself is in cpu/ans_coder.h.
#include "cpu/ans_coder.h"

#include "common/tensors.h"

namespace lic_fast {
namespace {

ans::Tables opened(const Tensor& packed) {
  ans::Tables tables;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Long && packed.is_contiguous() &&
                      ans::open(static_cast<const int64_t*>(packed.const_data_ptr()), packed.numel(), &tables),
                  "ans_coder: tables that are not what pack() made");
  return tables;
}

const int32_t* int32_data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.is_cpu(),
                  "ans_coder: symbols and indexes must be contiguous int32 on the CPU");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// The stream as bytes, one dimension; none (0 bytes) where an index lies outside the tables.
Tensor ans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed) {
  check_same_numel(symbols, indexes);
  const int64_t n = symbols.numel();
  ans::Words words(n / 8 + 64);
  const bool done = ans::encode(int32_data(symbols), int32_data(indexes), n, opened(packed), words) == ans::kDone;
  const int64_t bytes = done ? 4 * words.size() : 0;
  Tensor stream = torch::stable::new_empty(symbols, {bytes}, ScalarType::Byte);
  if (bytes) std::memcpy(stream.mutable_data_ptr(), words.data(), bytes);
  return stream;
}

// state int64 [2]: the coder's state and how many words it has read. The status is that of ans::Status; state keeps its
// values where it is not 0.
int64_t ans_coder_decode_out(Tensor stream, Tensor state, Tensor indexes, Tensor packed, Tensor symbols) {
  check_same_numel(symbols, indexes);
  STD_TORCH_CHECK(stream.scalar_type() == ScalarType::Byte && stream.is_contiguous() &&
                      state.scalar_type() == ScalarType::Long && state.is_contiguous() && state.numel() >= 2,
                  "ans_coder: a stream of bytes and a state of 64-bit integers are needed");
  int64_t* at = static_cast<int64_t*>(state.mutable_data_ptr());
  return ans::decode(static_cast<const uint8_t*>(stream.const_data_ptr()), stream.numel(),
                     reinterpret_cast<uint64_t*>(at), at + 1, int32_data(indexes), indexes.numel(), opened(packed),
                     const_cast<int32_t*>(int32_data(symbols)));
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def("ans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed) -> Tensor");
  m.def(
      "ans_coder_decode_out(Tensor stream, Tensor(a!) state, Tensor indexes, Tensor packed, Tensor(b!) symbols) -> "
      "int");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("ans_coder_encode", TORCH_BOX(&lic_fast::ans_coder_encode));
  m.impl("ans_coder_decode_out", TORCH_BOX(&lic_fast::ans_coder_decode_out));
}
