// The bitstream of docs/BITSTREAM.md over tensors: containers from symbols and indexes, and back.
//
// Reads 4 bytes a symbol and 1 or 4 an index (or fp32 scale), and what the words take, once each. Streams are
// independent: threads share them out, over a whole batch. The kernels are in cpu/rans_avx512.h, rans_avx2.h,
// rans_scalar.h, and the GPU's in cpu/rans_lockstep.h.
#include <atomic>
#include <memory>
#include <tuple>

#include "common/crc32c_pieces.h"
#include "common/rans_open.h"
#include "cpu/parallel.h"
#include "cpu/rans_lockstep.h"
#include "cpu/rans_tensors.h"

namespace lic_fast {
namespace {

using rans::ContainerState;
using rans::Layout;
using rans::StreamState;

// The check as threads of a GPU find it.
uint32_t check_by_pieces(const uint8_t* data, int64_t bytes) {
  uint32_t table[256], crc = 0;
  for (uint32_t byte = 0; byte < 256; ++byte) table[byte] = crc32c_pieces::with_bits(byte, 8);
  for (int64_t i = 0; i < crc32c_pieces::pieces(bytes); ++i) crc ^= crc32c_pieces::of_piece(data, bytes, i, table);
  return ~crc;
}

// Calls body(b, w) for every stream of every container.
template <class Body>
void over_streams(int64_t batch, int64_t streams, int64_t elements, const Body& body) {
  const int64_t each = std::max<int64_t>(1, elements / streams);
  torch::stable::parallel_for(0, batch * streams, (kSerialElements + each - 1) / each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / streams, i % streams);
  });
}

rans::Mixtures mixtures_of(const Tensor& words, const Tensor& symbols) {
  STD_TORCH_CHECK(words.dim() == 3 && symbols.dim() == 2 && words.size(0) == symbols.size(0) &&
                      words.size(2) == symbols.size(1) && words.size(1) >= 4 &&
                      words.size(1) <= 2 + 2 * rans::kMostComponents && words.size(1) % 2 == 0,
                  "rans_coder: parameters that are not [B, 2 + 2 K, N]");
  return {data_of<int32_t>(words, ScalarType::Int), words.size(2), static_cast<int32_t>(words.size(1) / 2 - 1)};
}

// What tells how the elements of a sample are coded.
template <class Index>
const Index* sample(const Index* indexes, int64_t b, int64_t elements) {
  return indexes + b * elements;
}
rans::Mixtures sample(const rans::Mixtures& all, int64_t b, int64_t elements) {
  return all + b * (2 + 2 * all.components) * elements;
}

template <class Source, class TableSet>
std::tuple<Tensor, Tensor> encode(const Tensor& symbols, Source source, const TableSet& tables, const Tensor& head,
                                  const Tensor& steps, const Layout& layout, rans::Variant variant) {
  const int64_t batch = symbols.size(0), elements = symbols.size(1);
  const int32_t* values = data_of<int32_t>(symbols, ScalarType::Int);
  const int64_t* of_step = data_of<int64_t>(steps, ScalarType::Long);
  std::vector<std::unique_ptr<rans::StreamEncoder<Source>>> coders(batch * layout.streams);
  std::atomic<int64_t> failure{rans::kDone};
  over_streams(batch, layout.streams, elements, [&](int64_t b, int64_t w) {
    auto coder = std::make_unique<rans::StreamEncoder<Source>>(tables, layout, elements / layout.streams, variant);
    const Source own = sample(source, b, elements);
    const int32_t* const symbol = values + b * elements;
    if (variant == rans::kLockstep) {
      const rans::Status status =
          rans::lockstep::encode(tables, layout, own, symbol, of_step, steps.numel(), w, coder.get());
      if (status != rans::kDone) failure = status;
      coders[b * layout.streams + w] = std::move(coder);
      return;
    }
    int64_t end = elements;
    for (int64_t s = steps.numel() - 1; s >= 0 && failure == rans::kDone; --s) {
      const rans::Share share = rans::share_of(of_step[s], layout, w);
      end -= of_step[s];
      const rans::Status status = coder->add(own + (end + share.first), symbol + (end + share.first), share.count);
      if (status != rans::kDone) failure = status;
    }
    coder->finish();
    coders[b * layout.streams + w] = std::move(coder);
  });
  Tensor sizes = torch::stable::new_empty(symbols, {std::max<int64_t>(batch, 1)}, ScalarType::Long);
  int64_t* size = static_cast<int64_t*>(sizes.mutable_data_ptr());
  size[0] = -failure;
  if (failure != rans::kDone) return {torch::stable::new_empty(symbols, {0}, ScalarType::Byte), sizes};

  std::vector<std::vector<uint8_t>> heads(batch);
  int64_t total = 0;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<rans::Finished> finished;
    for (int64_t w = 0; w < layout.streams; ++w) finished.push_back(coders[b * layout.streams + w]->result);
    heads[b] = rans::write_head(data_of<uint8_t>(head, ScalarType::Byte), head.numel(), finished.data(), layout.streams,
                                layout.lanes);
    size[b] = static_cast<int64_t>(heads[b].size()) + rans::kCheckBytes;
    for (const rans::Finished& one : finished) size[b] += 2 * one.words + one.escape_width * one.escapes;
    total += size[b];
  }
  Tensor stream = torch::stable::new_empty(symbols, {total}, ScalarType::Byte);
  uint8_t* out = static_cast<uint8_t*>(stream.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    uint8_t* const first = out;
    const auto append = [&out](const void* from, int64_t bytes) {
      if (bytes) std::memcpy(out, from, bytes);
      out += bytes;
    };
    append(heads[b].data(), heads[b].size());
    for (int64_t w = 0; w < layout.streams; ++w) {
      rans::Words& words = coders[b * layout.streams + w]->words;
      append(words.at(), 2 * words.size());
    }
    for (int64_t w = 0; w < layout.streams; ++w) {
      const rans::StreamEncoder<Source>& coder = *coders[b * layout.streams + w];
      for (int64_t i = 0; i < coder.escapes.size(); ++i) {
        const int32_t value = coder.escapes.from_last(i);
        append(&value, coder.result.escape_width);  // its low bytes
      }
    }
    const int64_t bytes = out - first;
    const uint32_t check = variant == rans::kLockstep ? check_by_pieces(first, bytes) : crc32c(first, bytes);
    append(&check, sizeof check);
  }
  return {stream, sizes};
}

// symbols int32 [B, N]; indexes (levels int32 or uint8, or fp32 scales) [B, N], or a mixture's integers [B, 2 + 2 K,
// N]; head: what each container begins with; steps int64 [S], summing to N. Returns the containers, uint8 [bytes], and
// their sizes int64 [B]; a negative first size is a rans::Status.
std::tuple<Tensor, Tensor> rans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed, Tensor head, Tensor steps,
                                             int64_t lanes, int64_t streams, int64_t skip, int64_t variant) {
  const Layout layout{lanes, streams, skip};
  const auto chosen = static_cast<rans::Variant>(variant);
  STD_TORCH_CHECK(symbols.dim() == 2 && lanes >= 1 && lanes <= rans::kMostLanes && !(lanes & (lanes - 1)) &&
                      streams >= 1 && streams <= rans::kMostStreams && rans::has(chosen),
                  "rans_coder: lanes, streams or a variant that do not exist");
  if (of_mixtures(packed)) {
    STD_TORCH_CHECK(skip == 0, "rans_coder: mixtures are not skipped");
    return encode(symbols, mixtures_of(indexes, symbols), opened<rans::MixtureTables>(packed), head, steps, layout,
                  chosen);
  }
  check_same_numel(symbols, indexes);
  const auto tables = opened<rans::Tables>(packed);
  STD_TORCH_CHECK(tables.ladder >= 0 || (indexes.scalar_type() != ScalarType::Float && skip == 0),
                  "rans_coder: scales and skipping need tables with a ladder");
  if (indexes.scalar_type() == ScalarType::Float) {
    return encode(symbols, data_of<float>(indexes, ScalarType::Float), tables, head, steps, layout, chosen);
  }
  if (indexes.scalar_type() == ScalarType::Byte) {
    return encode(symbols, data_of<uint8_t>(indexes, ScalarType::Byte), tables, head, steps, layout, chosen);
  }
  return encode(symbols, data_of<int32_t>(indexes, ScalarType::Int), tables, head, steps, layout, chosen);
}

Tensor rans_coder_open(Tensor stream, bool check) { return rans::open_tensor(stream, check); }

ContainerState* state_of(const Tensor& state, const Tensor& stream) {
  auto* head = static_cast<ContainerState*>(
      const_cast<void*>(static_cast<const void*>(data_of<int64_t>(state, ScalarType::Long))));
  STD_TORCH_CHECK(state.numel() >= 32 && state.numel() == 32 + 24 * head->streams && head->lanes >= 1 &&
                      head->lanes <= rans::kMostLanes && head->bytes == stream.numel(),
                  "rans_coder: a state that is not that of this stream");
  return head;
}

rans::Status left_over(const ContainerState& head, StreamState* streams) {
  bool clean = head.elements_done == head.elements && (head.steps == 0 || head.steps == head.steps_done);
  for (int64_t w = 0; w < head.streams; ++w) {
    uint32_t x = 0;
    for (int64_t i = 0; i < head.lanes; ++i) x |= streams[w].x[i] - (streams[w].rows == 0 ? rans::kLow : 0);
    clean = clean && x == 0 && streams[w].words == 0 && streams[w].escapes == 0 && streams[w].rows <= 0;
  }
  return clean ? rans::kDone : rans::kLeftOver;
}

// Calls body(b, layout, share, state) for every stream of every container, where a step of so many elements comes next.
template <class Body>
rans::Status over_states(const std::vector<Tensor>& containers, const std::vector<Tensor>& states, int64_t elements,
                         bool last, const Body& body) {
  const int64_t batch = static_cast<int64_t>(containers.size());
  std::vector<ContainerState*> heads(batch);
  int64_t streams = 1;
  for (int64_t b = 0; b < batch; ++b) {
    heads[b] = state_of(states[b], containers[b]);
    streams = std::max(streams, heads[b]->streams);
    if (heads[b]->elements - heads[b]->elements_done < elements) return rans::kLeftOver;
  }
  std::atomic<rans::Status> failure{rans::kDone};
  over_streams(batch, streams, elements, [&](int64_t b, int64_t w) {
    if (w >= heads[b]->streams) return;
    const Layout layout{heads[b]->lanes, heads[b]->streams, heads[b]->skip};
    StreamState* state = reinterpret_cast<StreamState*>(heads[b] + 1) + w;
    const rans::Status status = body(b, layout, rans::share_of(elements, layout, w), state);
    if (status != rans::kDone) failure = status;
  });
  for (int64_t b = 0; b < batch && failure == rans::kDone; ++b) {
    heads[b]->elements_done += elements;
    heads[b]->steps_done += !last || elements;
    if (last) failure = left_over(*heads[b], reinterpret_cast<StreamState*>(heads[b] + 1));
  }
  return failure;
}

template <class Source, class TableSet>
rans::Status decode(const std::vector<Tensor>& containers, const std::vector<Tensor>& states, Source source,
                    const TableSet& tables, int32_t* symbols, int64_t elements, bool last, rans::Variant variant) {
  const auto body = [&](int64_t b, const Layout& layout, const rans::Share& share, StreamState* state) {
    const auto* container = static_cast<const uint8_t*>(containers[b].const_data_ptr());
    const Source own = sample(source, b, elements) + share.first;
    int32_t* const symbol = symbols + (b * elements + share.first);
    if (variant == rans::kLockstep) {
      return rans::lockstep::decode_symbols(tables, layout, container, containers[b].numel(), state, own, symbol,
                                            share.count);
    }
    rans::StreamDecoder<Source> coder(tables, layout, container, state, variant);
    return coder.run(own, symbol, share.count);
  };
  return over_states(containers, states, elements, last, body);
}

// A step of which nothing but the places differs from sample to sample.
struct Latent {
  const float* means;     // or null
  const int32_t* places;  // or null
  float* values;
  int64_t room;
};

template <class Index>
rans::Status reconstruct(const std::vector<Tensor>& containers, const std::vector<Tensor>& states, const Index* indexes,
                         const rans::Tables& tables, const Latent& latent, int64_t elements, bool last,
                         rans::Variant variant) {
  for (int64_t i = 0; latent.places && i < elements; ++i) {
    if (static_cast<uint64_t>(latent.places[i]) >= static_cast<uint64_t>(latent.room)) return rans::kIndexOutside;
  }
  const auto body = [&](int64_t b, const Layout& layout, const rans::Share& share, StreamState* state) {
    const auto* container = static_cast<const uint8_t*>(containers[b].const_data_ptr());
    const int64_t at = b * latent.room;
    const rans::Values<rans::ByLevel<Index>> source{
        {indexes + at},     latent.means ? latent.means + at : nullptr, latent.places,
        latent.values + at, static_cast<int32_t>(share.first),          static_cast<int32_t>(latent.room)};
    if (variant == rans::kLockstep) {
      return rans::lockstep::decode(tables, layout, container, containers[b].numel(), state, source, share.count);
    }
    std::vector<int32_t> symbols(share.count);
    std::vector<Index> gathered(latent.places ? share.count : 0);
    for (size_t i = 0; i < gathered.size(); ++i) gathered[i] = source.fetch(source.place(i)).code;
    rans::StreamDecoder<const Index*> coder(tables, layout, container, state, variant);
    const rans::Status status =
        coder.run(latent.places ? gathered.data() : indexes + at + share.first, symbols.data(), share.count);
    for (int64_t i = 0; i < share.count; ++i) {
      const int64_t place = source.place(i);
      source.put(place, source.fetch(place), symbols[i]);
    }
    return status;
  };
  return over_states(containers, states, elements, last, body);
}

// The next step of each of B containers: indexes [B, n] to symbols int32 [B, n]. Where `last`, nothing may be left. The
// first state's status says how it went; after any but kDone the states mean nothing.
void rans_coder_decode_out(std::vector<Tensor> streams, std::vector<Tensor> states, Tensor indexes, Tensor packed,
                           Tensor symbols, bool last, int64_t variant) {
  const auto chosen = static_cast<rans::Variant>(variant);
  const int64_t batch = static_cast<int64_t>(streams.size());
  STD_TORCH_CHECK(streams.size() == states.size() && batch > 0 && symbols.numel() % batch == 0 && rans::has(chosen),
                  "rans_coder: streams, states or a variant that do not belong together");
  const int64_t elements = symbols.numel() / batch;
  int32_t* out = const_cast<int32_t*>(data_of<int32_t>(symbols, ScalarType::Int));
  if (of_mixtures(packed)) {
    state_of(states[0], streams[0])->status = decode(streams, states, mixtures_of(indexes, symbols),
                                                     opened<rans::MixtureTables>(packed), out, elements, last, chosen);
    return;
  }
  check_same_numel(symbols, indexes);
  const auto tables = opened<rans::Tables>(packed);
  STD_TORCH_CHECK(tables.ladder >= 0 || indexes.scalar_type() != ScalarType::Float,
                  "rans_coder: scales need tables with a ladder");
  const auto run = [&](const auto* of_elements) {
    state_of(states[0], streams[0])->status = decode(streams, states, of_elements, tables, out, elements, last, chosen);
  };
  if (indexes.scalar_type() == ScalarType::Float) return run(data_of<float>(indexes, ScalarType::Float));
  if (indexes.scalar_type() == ScalarType::Byte) return run(data_of<uint8_t>(indexes, ScalarType::Byte));
  run(data_of<int32_t>(indexes, ScalarType::Int));
}

// The next step of each of B containers, elements [n] at places int32 [n] or at [0, M), into values fp32 [B, M]: their
// symbols plus means fp32 [B, M]. indexes [B, M]. The rest as in rans_coder_decode_out.
void rans_coder_reconstruct_out(std::vector<Tensor> streams, std::vector<Tensor> states, Tensor indexes, Tensor packed,
                                std::optional<Tensor> means, std::optional<Tensor> places, Tensor values, bool last,
                                int64_t variant) {
  check_same_numel(values, indexes);
  if (means) check_same_numel(values, *means);
  const auto tables = opened<rans::Tables>(packed);
  const auto chosen = static_cast<rans::Variant>(variant);
  const int64_t batch = static_cast<int64_t>(streams.size());
  STD_TORCH_CHECK(streams.size() == states.size() && batch > 0 && values.numel() % batch == 0 && rans::has(chosen),
                  "rans_coder: streams, states or a variant that do not belong together");
  STD_TORCH_CHECK(tables.ladder >= 0 || indexes.scalar_type() != ScalarType::Float,
                  "rans_coder: scales need tables with a ladder");
  const Latent latent{means ? data_of<float>(*means, ScalarType::Float) : nullptr,
                      places ? data_of<int32_t>(*places, ScalarType::Int) : nullptr,
                      const_cast<float*>(data_of<float>(values, ScalarType::Float)), values.numel() / batch};
  const int64_t elements = places ? places->numel() : latent.room;
  STD_TORCH_CHECK(elements <= rans::kMostStep && latent.room <= rans::kMostStep, "rans_coder: a step of 2^31 elements");
  const auto run = [&](const auto* of_places) {
    state_of(states[0], streams[0])->status =
        reconstruct(streams, states, of_places, tables, latent, elements, last, chosen);
  };
  if (indexes.scalar_type() == ScalarType::Float) return run(data_of<float>(indexes, ScalarType::Float));
  if (indexes.scalar_type() == ScalarType::Byte) return run(data_of<uint8_t>(indexes, ScalarType::Byte));
  run(data_of<int32_t>(indexes, ScalarType::Int));
}

// Which variants run on this processor, as bits.
int64_t rans_coder_variants() {
  int64_t found = 0;
  for (int64_t v = rans::kBest; v <= rans::kLockstep; ++v) {
    found |= static_cast<int64_t>(rans::has(static_cast<rans::Variant>(v))) << v;
  }
  return found;
}

}  // namespace
}  // namespace lic_fast

STABLE_TORCH_LIBRARY_FRAGMENT(lic_fast_cpp, m) {
  m.def(
      "rans_coder_encode(Tensor symbols, Tensor indexes, Tensor packed, Tensor head, Tensor steps, int lanes, int "
      "streams, int skip, int variant) -> (Tensor, Tensor)");
  m.def("rans_coder_open(Tensor stream, bool check) -> Tensor");
  m.def(
      "rans_coder_decode_out(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor(b!) symbols, "
      "bool last, int variant) -> ()");
  m.def(
      "rans_coder_reconstruct_out(Tensor[] streams, Tensor(a!)[] states, Tensor indexes, Tensor packed, Tensor? means, "
      "Tensor? places, Tensor(b!) values, bool last, int variant) -> ()");
  m.def("rans_coder_variants() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lic_fast_cpp, CompositeExplicitAutograd, m) {
  m.impl("rans_coder_encode", TORCH_BOX(&lic_fast::rans_coder_encode));
  m.impl("rans_coder_open", TORCH_BOX(&lic_fast::rans_coder_open));
  m.impl("rans_coder_decode_out", TORCH_BOX(&lic_fast::rans_coder_decode_out));
  m.impl("rans_coder_reconstruct_out", TORCH_BOX(&lic_fast::rans_coder_reconstruct_out));
  m.impl("rans_coder_variants", TORCH_BOX(&lic_fast::rans_coder_variants));
}
