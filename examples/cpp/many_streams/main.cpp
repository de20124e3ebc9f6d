// A thousand endless streams in one session: in every tick 32 of them bring a token or a prompt, and
// now and then one leaves, arrives, forks, goes back some tokens, or is saved and taken back from its
// file. Fifty streams are run once more, each alone, and every output is compared. From the
// repository's folder, with ctx installed:
//
//   cmake -S examples/cpp/many_streams -B build/many_streams -DCMAKE_PREFIX_PATH="$(python -m ctx --cmake-prefix-path)" && cmake --build build/many_streams && build/many_streams/many_streams --seconds 10
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ctx/ctx.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>

namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;

constexpr int64_t kStreams = 1000, kWatched = 50, kPerTick = 32;
constexpr int64_t kLayers = 2, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kWidth = kHeads * kHeadDim;

std::mt19937_64 random_numbers(0);
int64_t below(int64_t n) {
  return static_cast<int64_t>(random_numbers() % static_cast<uint64_t>(n));
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

ctx::MemoryOptions layer_options() {
  ctx::MemoryOptions options;
  options.attention.schedule = {64, 32, 4, 16, 1};
  options.attention.rotary_dim = kHeadDim;
  options.kv_heads = kKvHeads, options.head_dim = kHeadDim;
  options.max_rewind = 16;
  return options;
}

// Bytes in, residual attention layers of random weights.
struct Model {
  Tensor embedding = at::randn({256, kWidth});
  std::vector<Tensor> weights;

  Model() {
    for (int64_t i = 0; i < kLayers; ++i)
      weights.push_back(at::randn({kWidth, (kHeads + 2 * kKvHeads) * kHeadDim}) /
                        std::sqrt(double(kWidth)));
  }

  Tensor layer(int64_t i, const Tensor& x, const ctx::Session::Attend& attend) const {
    const Tensor heads = x.matmul(weights[i]).unflatten(-1, {-1, kHeadDim}).transpose(1, 2);
    const Tensor q = heads.narrow(1, 0, kHeads), k = heads.narrow(1, kHeads, kKvHeads);
    const Tensor v = heads.narrow(1, kHeads + kKvHeads, kKvHeads);
    return x + attend(q, k, v).transpose(1, 2).flatten(2);
  }
};

struct Stream {
  uint64_t text = random_numbers();  // what it says: token t is a function of it
  int64_t tokens = 0;
  std::shared_ptr<std::vector<ctx::KVMemory>> alone;  // of a watched one

  void watch() {
    alone = std::make_shared<std::vector<ctx::KVMemory>>();
    for (int64_t i = 0; i < kLayers; ++i) alone->emplace_back(layer_options());
  }

  Tensor bring(const Model& model, int64_t count) {
    std::vector<int64_t> bytes;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t x = text + 0x9e3779b97f4a7c15 * static_cast<uint64_t>(++tokens);
      x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
      bytes.push_back(static_cast<int64_t>((x >> 32) & 255));
    }
    return model.embedding.index_select(0, at::tensor(bytes, at::kLong));
  }
};

int64_t resident_kib() {
  int64_t all = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> all >> resident;
  return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

class Server {
 public:
  Server() : session_(std::vector<ctx::MemoryOptions>(kLayers, layer_options()), kStreams) {
    while (ids_.size() < kStreams) arrive();
  }

  void tick() {
    std::shuffle(ids_.begin(), ids_.end(), random_numbers);
    const std::vector<int64_t> some(ids_.begin(), ids_.begin() + kPerTick);
    std::vector<Tensor> x;
    for (const int64_t id : some) {
      const bool prompt = streams_[id].tokens == 0 || below(200) == 0;
      x.push_back(streams_[id].bring(model_, prompt ? 1 + below(200) : 1));
      tokens += x.back().size(0);
    }
    const auto begin = Clock::now();
    const auto out =
        session_.tick(some, x, [&](int64_t i, const Tensor& hidden, const auto& attend) {
          return model_.layer(i, hidden, attend);
        });
    latencies.push_back(seconds_since(begin));
    for (size_t i = 0; i < some.size(); ++i) compare(streams_[some[i]], x[i], out[i]);
  }

  // What else happens to streams.
  void happen() {
    const size_t place = static_cast<size_t>(below(kStreams));
    const int64_t id = ids_[place];
    switch (below(20)) {
      case 0:
        leave(place), arrive();
        break;
      case 1: {  // as if another worker took it over
        const std::string path = (folder_ / "stream").string();
        session_.save(id, path), session_.leave(id);
        rename(place, session_.load(path));
        break;
      }
      case 2: {
        const std::vector<char> bytes = session_.snapshot(id);
        snapshot_bytes = bytes.size();
        session_.leave(id);
        rename(place, session_.restore(bytes));
        break;
      }
      case 3: {
        leave(place);  // makes room
        const int64_t from = ids_[static_cast<size_t>(below(kStreams - 1))];
        Stream copy = streams_[from];
        if (copy.alone) {
          copy.alone = std::make_shared<std::vector<ctx::KVMemory>>();
          for (const ctx::KVMemory& memory : *streams_[from].alone)
            copy.alone->push_back(memory.clone());
          ++watched_;
        }
        enter(session_.fork(from), std::move(copy));
        break;
      }
      case 4: {
        const int64_t back = below(session_.rewindable(id) + 1);
        session_.rewind(id, back);
        streams_[id].tokens -= back;
        if (streams_[id].alone)
          for (ctx::KVMemory& memory : *streams_[id].alone) memory.rewind(back);
        break;
      }
      default:
        return;
    }
    ++events;
  }

  int64_t bytes_per_stream() const { return session_.bytes_per_stream(); }

  int64_t tokens = 0, compared = 0, events = 0;
  size_t snapshot_bytes = 0;
  double worst = 0;
  std::vector<double> latencies;

 private:
  void enter(int64_t id, Stream stream) {
    streams_.emplace(id, std::move(stream));
    ids_.push_back(id);
  }
  void arrive() {
    Stream stream;
    if (watched_ < kWatched) stream.watch(), ++watched_;
    enter(session_.join(), std::move(stream));
  }
  void leave(size_t place) {
    if (streams_[ids_[place]].alone) --watched_;
    session_.leave(ids_[place]);
    streams_.erase(ids_[place]);
    ids_.erase(ids_.begin() + static_cast<int64_t>(place));
  }
  void rename(size_t place, int64_t id) {
    streams_.emplace(id, std::move(streams_[ids_[place]]));
    streams_.erase(ids_[place]);
    ids_[place] = id;
  }

  void compare(Stream& stream, const Tensor& x, const Tensor& out) {
    if (!stream.alone) return;
    Tensor hidden = x.unsqueeze(0);
    for (int64_t i = 0; i < kLayers; ++i)
      hidden = model_.layer(i, hidden, [&](const Tensor& q, const Tensor& k, const Tensor& v) {
        return (*stream.alone)[i].step(q, k, v);
      });
    worst = std::max(worst, (hidden[0] - out).abs().max().item<double>());
    compared += x.size(0);
  }

  Model model_;
  ctx::Session session_;
  std::map<int64_t, Stream> streams_;
  std::vector<int64_t> ids_;
  int64_t watched_ = 0;
  std::filesystem::path folder_ = [] {
    std::string name = (std::filesystem::temp_directory_path() / "many_streams.XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::perror("mkdtemp"), std::exit(1);
    return std::filesystem::path(name);
  }();

 public:
  ~Server() { std::filesystem::remove_all(folder_); }
};

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  if (argc == 3 && std::strcmp(argv[1], "--seconds") == 0) seconds = std::atof(argv[2]);
  const at::NoGradGuard no_grad;
  at::manual_seed(0);
  Server server;
  int64_t resident = 0;
  const auto begin = Clock::now();
  while (seconds_since(begin) < seconds) {
    server.tick();
    for (int i = 0; i < 4; ++i) server.happen();
    if (resident == 0 && seconds_since(begin) > seconds / 4) resident = resident_kib();
  }
  std::vector<double>& times = server.latencies;
  std::sort(times.begin(), times.end());
  double busy = 0;
  for (const double time : times) busy += time;
  const auto milliseconds = [&](double part) {
    return 1000 * times[static_cast<size_t>(part * static_cast<double>(times.size() - 1))];
  };
  std::printf(
      "%lld streams of %lld bytes each, %zu in a snapshot; %lld joined, left, moved, forked or "
      "went back\n",
      (long long)kStreams,
      (long long)server.bytes_per_stream(),
      server.snapshot_bytes,
      (long long)server.events);
  std::printf("%zu ticks of %lld streams, %.0f tokens/s in them, p50 %.2f ms, p99 %.2f ms\n",
              times.size(),
              (long long)kPerTick,
              double(server.tokens) / busy,
              milliseconds(0.5),
              milliseconds(0.99));
  std::printf("resident: %lld KiB after a quarter of the time, %lld KiB at the end\n",
              (long long)resident,
              (long long)resident_kib());
  std::printf(
      "%lld outputs of %lld streams compared with the stream alone: worst difference %.1e\n",
      (long long)server.compared,
      (long long)kWatched,
      server.worst);
  return server.compared > 0 && server.worst < 1e-4 ? 0 : 1;
}
