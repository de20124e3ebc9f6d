// A session under load: streams join, bring tokens in ragged ticks, fork, go back, are moved as bytes
// and as files, leave, and are used wrongly, at random. Some are run once more, each alone, and every
// output of theirs is compared. Resident memory is read four times on the way.
//
//   soak_session [--tokens 20000] [--threads 1]     that many tokens in all; a session per thread
//   soak_session --misuse race                      what a sanitizer must find: one session in two
//   soak_session --misuse leak                      threads, and a session that nobody deletes
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <thread>

#include "check.h"
#include "ctx/session.h"
#include "streams.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryIsOurs = false;  // a sanitizer keeps what was freed
#else
constexpr bool kMemoryIsOurs = true;
#endif

namespace ctx::test {
namespace {

constexpr int64_t kRows = 48, kWatched = 8, kMostPerTick = 16, kLongest = 40;
constexpr double kMostGrowth = 1 << 12;  // KiB after the first quarter

// Two laws and two compressors; the second one's slots are int8.
std::vector<MemoryOptions> model() {
  MemoryOptions first = options("conv"), second = options("gated");
  second.attention.schedule = {9, 4, 3, 3, 2};
  second.attention.rotary_dim = 0;
  second.compressor = Compressor::make("gated", kKvHeads, 3, kHeadDim, kValueDim);
  second.compressed_dtype = at::kChar;
  return {first, second};
}

std::vector<KVMemory> memories() {
  std::vector<KVMemory> made;
  for (MemoryOptions& layer : model()) {
    layer.batch_size = 1;
    made.emplace_back(std::move(layer));
  }
  return made;
}

struct Count {
  int64_t tokens = 0, ticks = 0, compared = 0, events = 0, refused = 0;
  double worst = 0;

  void add(const Count& more) {
    tokens += more.tokens, ticks += more.ticks, compared += more.compared;
    events += more.events, refused += more.refused, worst = std::max(worst, more.worst);
  }
};

int64_t resident_kib() {
  int64_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

class Soak {
 public:
  explicit Soak(uint64_t seed, std::string file)
      : file_(std::move(file)),
        random_(seed),
        generator_(at::detail::createCPUGenerator(seed)),
        session_(model(), kRows) {}
  ~Soak() { std::filesystem::remove(file_); }

  // One tick of some streams, and what else happens.
  void turn() {
    if (streams_.size() < 4 || below(3) == 0) join();
    tick();
    happen();
    if (streams_.size() > kRows - 4) leave(any());
  }

  Count count;

 private:
  using Alone = std::shared_ptr<std::vector<KVMemory>>;  // null: of a stream that is not watched

  int64_t below(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }

  int64_t any() {
    auto found = streams_.begin();
    std::advance(found, below(static_cast<int64_t>(streams_.size())));
    return found->first;
  }

  bool room() const { return static_cast<int64_t>(streams_.size()) < kRows; }

  int64_t watched() const {
    return std::count_if(streams_.begin(), streams_.end(), [](auto& x) { return x.second; });
  }

  void join() {
    const int64_t id = session_.join();
    Alone alone;
    if (watched() < kWatched) alone = std::make_shared<std::vector<KVMemory>>(memories());
    streams_.emplace(id, alone);
  }

  void leave(int64_t id) {
    session_.leave(id);
    streams_.erase(id);
  }

  std::vector<int64_t> some() {
    std::vector<int64_t> ids;
    for (const auto& [id, alone] : streams_) ids.push_back(id);
    std::shuffle(ids.begin(), ids.end(), random_);
    ids.resize(std::min<size_t>(ids.size(), static_cast<size_t>(1 + below(kMostPerTick))));
    return ids;
  }

  at::Tensor random(at::IntArrayRef sizes) {
    return at::rand(sizes, generator_, at::kFloat).mul_(2).sub_(1);
  }

  struct Pairs {
    at::Tensor q, k, v;

    Pairs of(int64_t row, int64_t tokens) const {
      const auto mine = [&](const at::Tensor& x) {
        return x.narrow(0, row, 1).narrow(2, 0, tokens);
      };
      return {mine(q), mine(k), mine(v)};
    }
  };

  Pairs pairs(int64_t streams, int64_t tokens) {
    return {random({streams, kHeads, tokens, kHeadDim}),
            random({streams, kKvHeads, tokens, kHeadDim}),
            random({streams, kKvHeads, tokens, kValueDim})};
  }

  void tick() {
    const std::vector<int64_t> ids = some();
    const auto streams = static_cast<int64_t>(ids.size());
    const int64_t tokens = below(4) == 0 ? 1 + below(kLongest) : 1 + below(3);
    Session::Lengths lengths;
    if (below(2) == 0) {
      lengths.emplace();
      for (int64_t i = 0; i < streams; ++i) lengths->push_back(below(tokens + 1));
    }
    for (int64_t layer = 0; layer < session_.layers(); ++layer) {
      const Pairs x = pairs(streams, tokens);
      const at::Tensor out = session_.step(ids, layer, x.q, x.k, x.v, lengths);
      for (int64_t i = 0; i < streams; ++i) {
        const int64_t mine = lengths ? (*lengths)[static_cast<size_t>(i)] : tokens;
        if (layer == 0) count.tokens += mine;
        const Alone& alone = streams_[ids[static_cast<size_t>(i)]];
        if (alone && mine > 0)
          compare((*alone)[static_cast<size_t>(layer)], x.of(i, mine), out[i].narrow(1, 0, mine));
      }
    }
    ++count.ticks;
  }

  void compare(KVMemory& memory, const Pairs& x, const at::Tensor& out) {
    const at::Tensor want = memory.step(x.q, x.k, x.v)[0];
    count.worst = std::max(count.worst, (want - out).abs().max().item<double>());
    count.compared += x.k.size(2);
  }

  void happen() {
    const int64_t id = any();
    switch (below(12)) {
      case 0:
        leave(id);
        break;
      case 1:
        if (!room()) return;
        fork(id);
        break;
      case 2:
        rewind(id);
        break;
      case 3: {
        const std::vector<char> bytes = session_.snapshot(id);
        session_.leave(id);
        rename(id, session_.restore(bytes));
        break;
      }
      case 4:
        session_.save(id, file_), session_.leave(id);
        rename(id, session_.load(file_));
        break;
      case 5:
        give_up(id);
        break;
      case 6:
        refuse(id);
        return;
      default:
        return;
    }
    ++count.events;
  }

  void fork(int64_t id) {
    Alone copy;
    if (const Alone& alone = streams_[id]; alone && watched() < kWatched) {
      copy = std::make_shared<std::vector<KVMemory>>();
      for (const KVMemory& memory : *alone) copy->push_back(memory.clone());
    }
    streams_.emplace(session_.fork(id), copy);
  }

  void rewind(int64_t id) {
    const int64_t back = below(session_.rewindable(id) + 1);
    session_.rewind(id, back);
    if (const Alone& alone = streams_[id])
      for (KVMemory& memory : *alone) memory.rewind(back);
  }

  void rename(int64_t from, int64_t to) {
    auto node = streams_.extract(from);
    node.key() = to;
    streams_.insert(std::move(node));
  }

  // A tick that does not reach its last layer has not happened.
  void give_up(int64_t id) {
    const int64_t seen = session_.seen(id);
    const Pairs x = pairs(1, 1 + below(3));
    session_.step({id}, 0, x.q, x.k, x.v);
    session_.rewind(id, 0);
    EXPECT(session_.seen(id) == seen);
  }

  void refuse(int64_t id) {
    const Pairs x = pairs(2, 1);
    const auto refused = [&](const auto& call) {
      try {
        call();
        EXPECT(false && "an error");
      } catch (const c10::Error&) {
        ++count.refused;
      }
    };
    refused([&] { session_.step({id, id}, 0, x.q, x.k, x.v); });
    refused([&] { session_.step({id, -1}, 0, x.q, x.k, x.v); });
    refused([&] { session_.step({id}, 0, x.q, x.k, x.v); });
    refused([&] { session_.rewind(id, session_.rewindable(id) + 1); });
    std::vector<char> bytes = session_.snapshot(id);
    bytes.resize(static_cast<size_t>(below(static_cast<int64_t>(bytes.size()))));
    if (room()) refused([&] { session_.restore(bytes); });
  }

  const std::string file_;
  std::mt19937_64 random_;
  at::Generator generator_;
  Session session_;
  std::map<int64_t, Alone> streams_;
};

int soak(int64_t tokens, int64_t threads) {
  const auto folder = std::filesystem::temp_directory_path();
  std::vector<std::thread> workers;
  std::vector<Count> counts(static_cast<size_t>(threads));
  std::vector<int64_t> resident;  // of the first thread's quarters
  for (int64_t i = 0; i < threads; ++i) {
    workers.emplace_back([&, i] {
      const std::string name = "ctx-soak-" + std::to_string(getpid()) + "-" + std::to_string(i);
      Soak soak(static_cast<uint64_t>(i), (folder / name).string());
      for (int64_t quarter = 1; quarter <= 4; ++quarter) {
        while (soak.count.tokens < quarter * tokens / threads / 4) soak.turn();
        if (i == 0) resident.push_back(resident_kib());
      }
      counts[static_cast<size_t>(i)] = soak.count;
    });
  }
  for (std::thread& worker : workers) worker.join();
  Count all;
  for (const Count& count : counts) all.add(count);
  std::printf("%lld tokens in %lld ticks of %lld sessions; %lld events, %lld calls refused\n",
              (long long)all.tokens,
              (long long)all.ticks,
              (long long)threads,
              (long long)all.events,
              (long long)all.refused);
  std::printf("%lld outputs compared with the stream alone: worst difference %.1e\n",
              (long long)all.compared,
              all.worst);
  std::printf("resident after each quarter:");
  for (const int64_t kib : resident) std::printf(" %lld", (long long)kib);
  std::printf(" KiB\n");
  EXPECT(all.tokens >= tokens && all.compared > 0);
  EXPECT(all.worst < 1e-5);
  EXPECT(!kMemoryIsOurs || double(resident.back() - resident.front()) < kMostGrowth);
  return status();
}

int misuse(const std::string& kind) {
  if (kind == "leak") {
    Session* volatile lost = new Session(model(), 2);
    lost = nullptr;
    return lost == nullptr ? 0 : 1;
  }
  Session session(model(), 2);
  const std::vector<int64_t> ids = {session.join(), session.join()};
  std::vector<std::thread> workers;
  for (const int64_t id : ids)
    workers.emplace_back([&, id] {
      for (int i = 0; i < 100; ++i) session.rewind(id, 0);
    });
  for (std::thread& worker : workers) worker.join();
  return 0;
}

}  // namespace
}  // namespace ctx::test

// torch's own reader of archives keeps what it has allocated when it finds no way to go on.
extern "C" CTX_API const char* __lsan_default_suppressions() { return "leak:mz_zip_"; }

int main(int argc, char** argv) {
  int64_t tokens = 20'000, threads = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--misuse") return ctx::test::misuse(argv[i + 1]);
    if (std::string(argv[i]) == "--tokens") tokens = std::atoll(argv[i + 1]);
    if (std::string(argv[i]) == "--threads") threads = std::max(1LL, std::atoll(argv[i + 1]));
  }
  return ctx::test::soak(tokens, threads);
}
