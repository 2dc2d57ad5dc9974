// The bitstream of docs/BITSTREAM.md on a GPU: a warp a stream, states and pointers in device memory between steps.
//
// Decoding is one launch a step, of a whole batch, whose containers and states travel in the kernel's parameters: it
// allocates nothing, copies nothing and waits for nothing, and so can be captured in a graph. What goes wrong is left
// as a status in the states. It reads 4 bytes an element (1 for levels in bytes) and the words, and writes 4; what
// bounds it is the chain from row to row of a stream (common/rans_warp.h), 32 elements long, so that a few thousand
// elements a warp and as many warps as the GPU has schedulers are wanted.
//
// Encoding is a launch for all streams into room for the worst case (8 bytes an element), then, once the host knows how
// long each came out, one that gathers what was written into containers, and two for the check.
#include "cuda/rans_coder.cuh"

#include "common/rans_open.h"

namespace lic_fast {
namespace {

namespace device = rans::device;
using rans::Layout;

template <class T>
const T* data_of(const Tensor& tensor, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  "rans_coder: a contiguous tensor of another dtype, or on another device, is needed");
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* writable(const Tensor& tensor, ScalarType type, const Tensor& like) {
  return const_cast<T*>(data_of<T>(tensor, type, like));
}

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "rans_coder: CUDA says ", cudaGetErrorString(error));
}

int32_t attribute(cudaDeviceAttr which, const Tensor& like) {
  int32_t value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, static_cast<int32_t>(like.get_device_index())));
  return value;
}

// How streams are spread over blocks, and whether the tables fit into shared memory beside the queues.
struct Grid {
  device::Launch how;
  uint32_t blocks;
  int64_t shared_bytes;  // 0 where they do not fit
  int64_t most_bytes;
};

Grid grid_for(int64_t streams, const Tensor& packed, const Tensor& like, bool scales, bool last) {
  const int64_t table_bytes = 8 * (packed.numel() - rans::kTablesHeader);
  STD_TORCH_CHECK(table_bytes > 0 && packed.numel() < int64_t{1} << 24, "rans_coder: tables that pack() did not make");
  const int64_t processors = std::max(1, attribute(cudaDevAttrMultiProcessorCount, like));
  const int64_t each = std::min<int64_t>(device::kWarps, (streams + processors - 1) / processors);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, like) - device::kQueueBytes - 1024;
  return {{data_of<int64_t>(packed, ScalarType::Long, like), static_cast<int32_t>(packed.numel()),
           static_cast<int8_t>(each), scales, last},
          static_cast<uint32_t>((streams + each - 1) / each),
          table_bytes <= most ? table_bytes : 0,
          most};
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  // The same limit whatever the tables: threads that code with others do not take it away between here and the launch.
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int32_t>(grid.most_bytes)));
  kernel<<<grid.blocks, device::kThreads, grid.shared_bytes, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Target>
void decode(const std::vector<Tensor>& containers, const std::vector<Tensor>& states, const Tensor& packed,
            const Target& target, const Tensor& like, bool last) {
  using By = typename Target::Source::Coding;
  STD_TORCH_CHECK(target.elements <= rans::kMostStep, "rans_coder: a step of 2^31 elements; make several");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const cudaStream_t stream = current_stream(like);
  ListTable<device::Container> list;
  const auto flush = [&] {
    if (list.blocks == 0) return;
    const Grid grid = grid_for(list.blocks, packed, like, By::kScales, last);
    auto kernel = device::decode_kernel<Target, true>;
    if constexpr (By::kSkips) {  // tables of mixtures always fit
      if (!grid.shared_bytes) kernel = device::decode_kernel<Target, false>;
    }
    launch(kernel, grid, stream, list, grid.how, target);
    list.count = list.blocks = 0;
  };
  for (size_t b = 0; b < containers.size(); ++b) {
    const int64_t words = states[b].numel() - 32;
    STD_TORCH_CHECK(words > 0 && words % 24 == 0 && words / 24 <= rans::kMostStreams,
                    "rans_coder: a state that is not that of a stream");
    if (list.full()) flush();
    list.add({data_of<uint8_t>(containers[b], ScalarType::Byte, like), containers[b].numel(),
              writable<rans::ContainerState>(states[b], ScalarType::Long, like), static_cast<int32_t>(b),
              static_cast<int32_t>(words / 24)},
             static_cast<int32_t>(words / 24));
  }
  flush();
}

// Tables of mixtures are known by their size, which no others have: what they hold lies on the device.
bool of_mixtures(const Tensor& packed) { return packed.numel() == rans::kMixtureWords; }

// Calls body(by, stride) with what says how elements [B, N] (like `values`) are coded, and how far a sample is from the
// next in it: indexes of their shape, or integers of mixtures [B, 2 + 2 K, N].
template <class Body>
void with_elements(const Tensor& indexes, const Tensor& packed, const Tensor& values, const Body& body) {
  if (of_mixtures(packed)) {
    STD_TORCH_CHECK(indexes.dim() == 3 && values.dim() == 2 && indexes.size(0) == values.size(0) &&
                        indexes.size(2) == values.size(1) && indexes.size(1) >= 4 &&
                        indexes.size(1) <= 2 + 2 * rans::kMostComponents && indexes.size(1) % 2 == 0,
                    "rans_coder: parameters that are not [B, 2 + 2 K, N]");
    const rans::Mixtures all{data_of<int32_t>(indexes, ScalarType::Int, values), indexes.size(2),
                             static_cast<int32_t>(indexes.size(1) / 2 - 1)};
    return rans::with_coding(all, [&](const auto& by) { body(by, indexes.size(1) * indexes.size(2)); });
  }
  check_same_numel(values, indexes);
  const int64_t stride = indexes.numel() / std::max<int64_t>(1, indexes.size(0));
  const auto run = [&](const auto* index) { rans::with_coding(index, [&](const auto& by) { body(by, stride); }); };
  if (indexes.scalar_type() == ScalarType::Float) return run(data_of<float>(indexes, ScalarType::Float, values));
  if (indexes.scalar_type() == ScalarType::Byte) return run(data_of<uint8_t>(indexes, ScalarType::Byte, values));
  run(data_of<int32_t>(indexes, ScalarType::Int, values));
}

// On the host, as lic_fast_cpp::rans_coder_open.
Tensor rans_coder_open(Tensor stream, bool check) { return rans::open_tensor(stream, check); }

// As lic_fast_cpp::rans_coder_decode_out, on the current stream; each state's status says how its container went.
void rans_coder_decode_out(std::vector<Tensor> streams, std::vector<Tensor> states, Tensor indexes, Tensor packed,
                           Tensor symbols, bool last) {
  const int64_t batch = static_cast<int64_t>(streams.size());
  STD_TORCH_CHECK(streams.size() == states.size() && batch > 0 && symbols.numel() % batch == 0,
                  "rans_coder: streams and states that do not belong together");
  int32_t* out = writable<int32_t>(symbols, ScalarType::Int, indexes);
  with_elements(indexes, packed, symbols, [&](const auto& by, int64_t stride) {
    const device::ToSymbols<std::decay_t<decltype(by)>> target{by, stride, out, symbols.numel() / batch};
    decode(streams, states, packed, target, symbols, last);
  });
}

// As lic_fast_cpp::rans_coder_reconstruct_out, on the current stream.
void rans_coder_reconstruct_out(std::vector<Tensor> streams, std::vector<Tensor> states, Tensor indexes, Tensor packed,
                                std::optional<Tensor> means, std::optional<Tensor> places, Tensor values, bool last) {
  STD_TORCH_CHECK(!of_mixtures(packed), "rans_coder: mixtures are decoded into symbols only");
  if (means) check_same_numel(values, *means);
  const int64_t batch = static_cast<int64_t>(streams.size());
  STD_TORCH_CHECK(streams.size() == states.size() && batch > 0 && values.numel() % batch == 0,
                  "rans_coder: streams and states that do not belong together");
  const int64_t room = values.numel() / batch;
  STD_TORCH_CHECK(room <= rans::kMostStep, "rans_coder: values of 2^31 places; split them");
  STD_TORCH_CHECK(room > 0 || !places || places->numel() == 0, "rans_coder: places in nothing");
  const float* mean = means ? data_of<float>(*means, ScalarType::Float, values) : nullptr;
  const int32_t* place = places ? data_of<int32_t>(*places, ScalarType::Int, values) : nullptr;
  float* out = writable<float>(values, ScalarType::Float, indexes);
  with_elements(indexes, packed, values, [&](const auto& by, int64_t) {
    using By = std::decay_t<decltype(by)>;
    if constexpr (By::kSkips) {
      const device::ToValues<By> target{by, mean, place, out, room, places ? places->numel() : room};
      decode(streams, states, packed, target, values, last);
    }
  });
}

// Memory on the device that holds a copy of the host's. The copy is staged before this returns.
template <class T>
Tensor to_device(const std::vector<T>& values, const Tensor& like, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
  Tensor memory = torch::stable::new_empty(like, {std::max<int64_t>(1, bytes)}, ScalarType::Byte);
  if (bytes) {
    check_cuda(cudaMemcpyAsync(memory.mutable_data_ptr(), values.data(), bytes, cudaMemcpyHostToDevice, stream));
  }
  return memory;
}

// Where the room of each stream begins within a sample's, by the elements it codes.
std::vector<int64_t> rooms_of(const int64_t* steps, int64_t count, const Layout& layout) {
  std::vector<int64_t> rooms(layout.streams + 1);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t w = 0; w < layout.streams; ++w) {
      const int64_t own = rans::share_of(steps[s], layout, w).count;
      if (own == 0) break;  // nor do those behind it have any
      rooms[w + 1] += own;
    }
  }
  for (int64_t w = 0; w < layout.streams; ++w) rooms[w + 1] += rooms[w];
  return rooms;
}

// What an encoder's launch left, on the device and for the host.
struct Coded {
  Tensor words, escapes;
  std::vector<int64_t> rooms;
  std::vector<rans::Finished> finished;
};

template <class By>
Coded encode_streams(const Tensor& symbols, const By& by, int64_t stride, const Tensor& packed, const Tensor& steps,
                     const Layout& layout, cudaStream_t stream) {
  const int64_t batch = symbols.size(0), elements = symbols.size(1), streams = batch * layout.streams;
  const int64_t* of_step = static_cast<const int64_t*>(steps.const_data_ptr());
  Coded coded{torch::stable::new_empty(symbols, {4 * batch * elements + 1}, ScalarType::Byte),
              torch::stable::new_empty(symbols, {batch * elements + 1}, ScalarType::Int),
              rooms_of(of_step, steps.numel(), layout), std::vector<rans::Finished>(streams)};
  const Tensor rooms = to_device(coded.rooms, symbols, stream);
  const Tensor sizes = to_device(std::vector<int64_t>(of_step, of_step + steps.numel()), symbols, stream);
  const int64_t bytes = streams * static_cast<int64_t>(sizeof(rans::Finished));
  Tensor finished = torch::stable::new_empty(symbols, {bytes}, ScalarType::Byte);
  const Grid grid = grid_for(streams, packed, symbols, By::kScales, false);
  const device::Encoding<By> e{data_of<int32_t>(symbols, ScalarType::Int, symbols),
                               by,
                               stride,
                               static_cast<const int64_t*>(sizes.const_data_ptr()),
                               static_cast<const int64_t*>(rooms.const_data_ptr()),
                               batch,
                               elements,
                               steps.numel(),
                               layout,
                               static_cast<uint16_t*>(coded.words.mutable_data_ptr()),
                               static_cast<int32_t*>(coded.escapes.mutable_data_ptr()),
                               static_cast<rans::Finished*>(finished.mutable_data_ptr())};
  auto kernel = device::encode_kernel<By, true>;
  if constexpr (By::kSkips) {
    if (!grid.shared_bytes) kernel = device::encode_kernel<By, false>;
  }
  launch(kernel, grid, stream, e, grid.how);
  check_cuda(cudaMemcpyAsync(coded.finished.data(), finished.const_data_ptr(), bytes, cudaMemcpyDeviceToHost, stream));
  check_cuda(cudaStreamSynchronize(stream));
  return coded;
}

// Containers of what was coded; sizes are left in `size`.
Tensor gather(const Coded& coded, const Tensor& symbols, const Tensor& head, const Layout& layout, int64_t* size,
              cudaStream_t stream) {
  const int64_t batch = symbols.size(0), elements = symbols.size(1);
  std::vector<std::vector<uint8_t>> heads(batch);
  std::vector<uint8_t> all_heads;
  int64_t total = 0, longest = 1;
  for (int64_t b = 0; b < batch; ++b) {
    const rans::Finished* own = coded.finished.data() + b * layout.streams;
    heads[b] = rans::write_head(static_cast<const uint8_t*>(head.const_data_ptr()), head.numel(), own, layout.streams,
                                layout.lanes);
    size[b] = static_cast<int64_t>(heads[b].size()) + rans::kCheckBytes;
    for (int64_t w = 0; w < layout.streams; ++w) size[b] += 2 * own[w].words + own[w].escape_width * own[w].escapes;
    total += size[b];
    longest = std::max(longest, size[b]);
    all_heads.insert(all_heads.end(), heads[b].begin(), heads[b].end());
  }
  Tensor result = torch::stable::new_empty(symbols, {total}, ScalarType::Byte);
  const Tensor head_bytes = to_device(all_heads, symbols, stream);
  std::vector<device::Piece> pieces;
  std::vector<device::Whole> wholes;
  const auto* from = static_cast<const uint8_t*>(head_bytes.const_data_ptr());
  const auto* words = static_cast<const uint16_t*>(coded.words.const_data_ptr());
  const auto* escapes = static_cast<const int32_t*>(coded.escapes.const_data_ptr());
  auto* to = static_cast<uint8_t*>(result.mutable_data_ptr());
  const auto add = [&](const void* source, int64_t bytes, int64_t width) {
    if (bytes) pieces.push_back({static_cast<const uint8_t*>(source), to, bytes, width});
    to += bytes;
  };
  for (int64_t b = 0; b < batch; ++b) {
    const rans::Finished* own = coded.finished.data() + b * layout.streams;
    const int64_t* end = coded.rooms.data() + 1;
    wholes.push_back({to, size[b] - rans::kCheckBytes});
    add(from, static_cast<int64_t>(heads[b].size()), 4);
    from += heads[b].size();
    for (int64_t w = 0; w < layout.streams; ++w) {
      add(words + 2 * (b * elements + end[w]) - own[w].words, 2 * own[w].words, 4);
    }
    for (int64_t w = 0; w < layout.streams; ++w) {
      add(escapes + b * elements + end[w] - own[w].escapes, own[w].escape_width * own[w].escapes, own[w].escape_width);
    }
    to += rans::kCheckBytes;
  }
  const uint32_t parts = static_cast<uint32_t>(std::min<int64_t>(256, (longest + 65535) / 65536));
  const Tensor of_pieces = to_device(pieces, symbols, stream), of_wholes = to_device(wholes, symbols, stream);
  const Tensor checks = to_device(std::vector<uint32_t>(batch), symbols, stream);
  const auto* whole = static_cast<const device::Whole*>(of_wholes.const_data_ptr());
  auto* check = static_cast<uint32_t*>(const_cast<void*>(checks.const_data_ptr()));
  device::gather_kernel<<<dim3(pieces.size(), parts), device::kThreads, 0, stream>>>(
      static_cast<const device::Piece*>(of_pieces.const_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  device::check_kernel<<<dim3(batch, parts), device::kThreads, 0, stream>>>(whole, check);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const uint32_t blocks = static_cast<uint32_t>((batch + device::kThreads - 1) / device::kThreads);
  device::seal_kernel<<<blocks, device::kThreads, 0, stream>>>(whole, check, batch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// As lic_fast_cpp::rans_coder_encode: symbols, indexes and tables on the device, head and steps on the host; containers
// on the device, sizes on the host.
std::tuple<Tensor, Tensor> rans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed, Tensor head, Tensor steps,
                                             int64_t lanes, int64_t streams, int64_t skip) {
  const Layout layout{lanes, streams, skip};
  STD_TORCH_CHECK(symbols.dim() == 2 && lanes >= 1 && lanes <= rans::kMostLanes && !(lanes & (lanes - 1)) &&
                      streams >= 1 && streams <= rans::kMostStreams,
                  "rans_coder: lanes or streams that do not exist");
  STD_TORCH_CHECK(head.is_cpu() && head.is_contiguous() && head.scalar_type() == ScalarType::Byte && steps.is_cpu() &&
                      steps.is_contiguous() && steps.scalar_type() == ScalarType::Long,
                  "rans_coder: head and steps on the CPU are needed");
  const int64_t batch = symbols.size(0);
  const torch::stable::accelerator::DeviceGuard guard(symbols.get_device_index());
  const cudaStream_t stream = current_stream(symbols);
  Tensor sizes = torch::stable::new_empty(steps, {std::max<int64_t>(batch, 1)}, ScalarType::Long);
  Tensor none = torch::stable::new_empty(symbols, {0}, ScalarType::Byte);
  int64_t* size = static_cast<int64_t*>(sizes.mutable_data_ptr());
  size[0] = 0;
  if (batch == 0) return {none, sizes};
  std::optional<Coded> coded;
  with_elements(indexes, packed, symbols, [&](const auto& by, int64_t stride) {
    coded = encode_streams(symbols, by, stride, packed, steps, layout, stream);
  });
  int64_t status = rans::kDone;
  for (const rans::Finished& one : coded->finished) {
    if (one.rows < 0) status = status ? std::min(status, -one.rows) : -one.rows;
  }
  size[0] = -status;
  if (status != rans::kDone) return {none, sizes};
  return {gather(*coded, symbols, head, layout, size, stream), sizes};
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cuda, m) {
  m.def(
      "rans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed, Tensor head, Tensor steps, int lanes, int "
      "streams, int skip) -> (Tensor, Tensor)");
  m.def("rans_coder_open(Tensor stream, bool check) -> Tensor");
  m.def(
      "rans_coder_decode_out(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor(b!) symbols, "
      "bool last) -> ()");
  m.def(
      "rans_coder_reconstruct_out(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor? means, "
      "Tensor? places, Tensor(b!) values, bool last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cuda, CompositeExplicitAutograd, m) {
  m.impl("rans_coder_encode", TORCH_BOX(&lic_fast::rans_coder_encode));
  m.impl("rans_coder_open", TORCH_BOX(&lic_fast::rans_coder_open));
  m.impl("rans_coder_decode_out", TORCH_BOX(&lic_fast::rans_coder_decode_out));
  m.impl("rans_coder_reconstruct_out", TORCH_BOX(&lic_fast::rans_coder_reconstruct_out));
}
