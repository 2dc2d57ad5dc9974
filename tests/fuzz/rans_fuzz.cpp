// Mutated and truncated containers through the parser and all decoders of this processor (docs/BITSTREAM.md, section
// 8), to be compiled with sanitizers: rans_fuzz FIRST COUNT runs the cases FIRST to FIRST + COUNT - 1.
//
// A case is its number: `rans_fuzz 4711 1` repeats one. Of sixteen cases the first is a container as it was made, which
// has to decode to its symbols. For all it is checked that
//   - nothing is read or written outside of anything (AddressSanitizer; every buffer is as long as it says), no
//     behaviour is undefined (UBSan), nothing leaks,
//   - opening allocates no more than its streams' states, of which there is one for every three bytes at the most, and
//     decoding no more than a copy of the indexes and symbols that it was called for,
//   - a case ends within kSeconds,
//   - scalar, AVX2 and AVX-512 decoders and the GPU's (in lockstep) come to the same end, with the same symbols and
//     states: those of tables, and those of mixtures,
//   - damage does not get past a CRC that is looked at.
// The last line is a JSON object of how often which end was come to.
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <string>

#include "rans_mutations.h"

namespace {

constexpr unsigned kSeconds = 60;  // for a case; the machine may be busy
int64_t case_number = -1;
int64_t allocated = 0;  // bytes, since the start

void say_case() {
  char text[64];
  const int length = std::snprintf(text, sizeof text, "rans_fuzz: case %lld\n", static_cast<long long>(case_number));
  if (write(STDERR_FILENO, text, length) < 0) return;
}

void timed_out(int) {
  const char text[] = "rans_fuzz: a case does not end\n";
  if (write(STDERR_FILENO, text, sizeof text - 1) > 0) say_case();
  _exit(3);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "rans_fuzz: %s\n", what);
  say_case();
  std::exit(1);
}

}  // namespace

extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=64:detect_leaks=1"; }

void* operator new(std::size_t bytes) {
  allocated += static_cast<int64_t>(bytes);
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace lic_fast::rans::fuzz {
namespace {

const char* const kNames[] = {"done",    "truncated",     "foreign",    "version",   "profile",
                              "flags",   "number",        "impossible", "trailing",  "check",
                              "padding", "index outside", "ran out",    "left over", "not zero"};
constexpr int64_t kCasesOfSample = 16;
constexpr int64_t kSamplesOfMixtures = 3;  // one of so many; the others are of tables

struct Counts {
  int64_t opened[15] = {}, decoded[15] = {};
};

// A decoding's end: what a caller of the library would get.
struct End {
  Status status = kDone;
  std::vector<int32_t> symbols;
  std::vector<StreamState> streams;
};

// Whether all of the container was used up, by the words of section 4.
bool used_up(const ContainerState& head, const std::vector<StreamState>& streams, int64_t elements, int64_t steps) {
  bool clean = head.elements == elements && (head.dimensions >= 0 || head.steps == steps);
  for (const StreamState& stream : streams) {
    clean = clean && stream.words == 0 && stream.escapes == 0 && stream.rows <= 0;
    for (int64_t i = 0; i < head.lanes; ++i) clean = clean && stream.x[i] == (stream.rows == 0 ? kLow : 0);
  }
  return clean;
}

template <class Elements, class AnyTables>
End decode(const AnyTables& tables, const Opened& opened, const Bytes& bytes, Elements elements, int64_t n,
           const std::vector<int64_t>& steps, Variant variant) {
  const ContainerState& head = opened.head;
  const Layout layout{head.lanes, head.streams, head.skip};
  End end{kDone, std::vector<int32_t>(n), opened.streams};
  const int64_t before = allocated;
  int64_t at = 0;
  for (const int64_t step : steps) {
    for (int64_t w = 0; w < head.streams; ++w) {
      const Share share = share_of(step, layout, w);
      int32_t* const symbols = end.symbols.data() + at + share.first;
      const Elements own = elements + (at + share.first);
      Status status;
      if (variant == kLockstep) {
        status = lockstep::decode_symbols(tables, layout, bytes.data(), static_cast<int64_t>(bytes.size()),
                                          &end.streams[w], own, symbols, share.count);
      } else {
        StreamDecoder<Elements> decoder(tables, layout, bytes.data(), &end.streams[w], variant);
        status = decoder.run(own, symbols, share.count);
      }
      if (end.status == kDone) end.status = status;
    }
    if (end.status != kDone) break;
    at += step;
  }
  const auto calls = head.streams * static_cast<int64_t>(steps.size());
  if (allocated - before > 8 * n + 8 * calls) fail("decoding allocates more than its symbols and indexes");
  if (end.status == kDone && !used_up(head, end.streams, n, static_cast<int64_t>(steps.size()))) end.status = kLeftOver;
  return end;
}

bool same(const StreamState& a, const StreamState& b) {
  return a.word_at == b.word_at && a.words == b.words && a.escape_at == b.escape_at && a.escapes == b.escapes &&
         a.rows == b.rows && std::equal(a.x, a.x + kMostLanes, b.x);
}

bool same(const End& a, const End& b) {
  if (a.status != b.status) return false;
  if (a.status != kDone && a.status != kLeftOver) return true;
  for (size_t w = 0; w < a.streams.size(); ++w) {
    if (!same(a.streams[w], b.streams[w])) return false;
  }
  return a.symbols == b.symbols;
}

// Of a stream that runs out before an index is outside a GPU says the latter: it goes on to the end of a step.
bool same_on_gpu(const End& a, const End& b) {
  return (a.status == kRanOut && b.status == kIndexOutside) || same(a, b);
}

template <class Elements, class AnyTables>
End decode_by_all(const AnyTables& tables, const Opened& opened, const Bytes& bytes, Elements elements, int64_t n,
                  const std::vector<int64_t>& steps) {
  const auto by = [&](Variant variant) { return decode(tables, opened, bytes, elements, n, steps, variant); };
  End end = by(kScalar);
  for (const Variant variant : {kAvx2, kAvx512Loads, kAvx512Gathers}) {
    if (has(variant) && !same(end, by(variant))) fail("two decoders come to different ends");
  }
  if (!same_on_gpu(end, by(kLockstep))) fail("the decoder of a GPU comes to another end");
  return end;
}

Status open_bounded(const Bytes& bytes, bool check, Opened* opened) {
  const int64_t before = allocated, size = static_cast<int64_t>(bytes.size());
  const Status status = open(bytes.data(), size, check, opened);
  const int64_t states = std::min<int64_t>(kMostStreams, size / 3);
  if (allocated - before > states * static_cast<int64_t>(sizeof(StreamState))) {
    fail("opening allocates more than the states that the bytes may hold");
  }
  if (status == kDone && (opened->head.bytes != size || opened->head.elements > kMostElements ||
                          opened->head.streams > kMostStreams || opened->head.lanes > kMostLanes)) {
    fail("opening lets sizes through that it should refuse");
  }
  return status;
}

class Run {
 public:
  void one(int64_t number) {
    case_number = number;
    alarm(kSeconds);
    if (number / kCasesOfSample != sample_number_) prepare(number / kCasesOfSample);
    Random random(static_cast<uint64_t>(number) * 2 + 1);
    if (number % kCasesOfSample == 0) return untouched();
    Bytes mutated = sample_.bytes;
    if (random.once_in(64)) {  // noise behind a head that may be right
      mutated.resize(random.below(14));
      for (int64_t more = random.below(200); more > 0; --more) mutated.push_back(static_cast<uint8_t>(random.next()));
    } else {
      mutate(random, sample_, other_.bytes, &mutated);
    }
    const bool repaired = random.below(5) < 2, check = repaired || random.once_in(3);
    if (repaired) seal(&mutated);
    const Bytes bytes(mutated);  // not a byte of room behind it
    Opened opened;
    const Status status = open_bounded(bytes, check, &opened);
    ++counts_.opened[status];
    if (status != kDone) return;
    if (!repaired && check && bytes != sample_.bytes && bytes != other_.bytes) fail("damage gets past the CRC");
    const bool foreign = random.once_in(8);
    const Indexes indexes = foreign ? other_indexes(random, sample_.indexes) : sample_.indexes;
    ++counts_.decoded[decode_by_all(opened, bytes, indexes).status];
  }

  void report(double seconds) const {
    const auto object = [](const int64_t (&counts)[15]) {
      std::string text;
      for (int32_t i = 0; i < 15; ++i) {
        if (counts[i])
          text += (text.empty() ? "\"" : ", \"") + std::string(kNames[i]) + "\": " + std::to_string(counts[i]);
      }
      return "{" + text + "}";
    };
    std::printf("{\"opened\": %s, \"decoded\": %s, \"seconds\": %.1f}\n", object(counts_.opened).c_str(),
                object(counts_.decoded).c_str(), seconds);
  }

 private:
  void prepare(int64_t number) {
    sample_number_ = number;
    Random random(static_cast<uint64_t>(number) * 2);
    if (number % kSamplesOfMixtures) {
      make_samples(random, &tables_);
    } else {
      make_samples(random, &mixtures_);
    }
  }

  template <class Set>
  void make_samples(Random& random, std::unique_ptr<Set>* set) {
    *set = std::make_unique<Set>(random);
    if (!(*set)->good()) fail("tables that pack() would make are refused");
    sample_ = {}, other_ = {};
    if (!make_sample(random, (*set)->get(), &sample_) || !make_sample(random, (*set)->get(), &other_)) {
      fail("an encoder refuses what it should take");
    }
  }

  End decode_by_all(const Opened& opened, const Bytes& bytes, const Indexes& indexes) const {
    const auto by_all = [&](const auto& held) {
      const int64_t n = count_of(held);
      if constexpr (std::is_same_v<std::decay_t<decltype(held)>, MixtureWords>) {
        return fuzz::decode_by_all(mixtures_->get(), opened, bytes, elements_of(held), n, sample_.steps);
      } else {
        return fuzz::decode_by_all(tables_->get(), opened, bytes, elements_of(held), n, sample_.steps);
      }
    };
    return std::visit(by_all, indexes);
  }

  void untouched() {
    Opened opened;
    const Bytes bytes(sample_.bytes);
    if (open_bounded(bytes, true, &opened) != kDone) fail("a container as it was made does not open");
    const End end = decode_by_all(opened, bytes, sample_.indexes);
    if (end.status != kDone || end.symbols != sample_.symbols) fail("a container as it was made does not decode");
    ++counts_.opened[kDone];
    ++counts_.decoded[kDone];
  }

  int64_t sample_number_ = -1;
  std::unique_ptr<TableSet> tables_;
  std::unique_ptr<MixtureSet> mixtures_;
  Sample sample_, other_;
  Counts counts_;
};

}  // namespace
}  // namespace lic_fast::rans::fuzz

int main(int count, char** arguments) {
  if (count != 3) return std::fprintf(stderr, "usage: rans_fuzz FIRST COUNT\n"), 2;
  __sanitizer_set_death_callback(say_case);
  signal(SIGALRM, timed_out);
  const auto began = std::chrono::steady_clock::now();
  const int64_t first = std::atoll(arguments[1]), cases = std::atoll(arguments[2]);
  lic_fast::rans::fuzz::Run run;
  for (int64_t i = first; i < first + cases; ++i) run.one(i);
  alarm(0);
  run.report(std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
}
