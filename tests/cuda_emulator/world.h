// A memory of random law, size and type, its rings on the device, and calls of ragged rows on it.
#pragma once

#include "device.h"
#include "ops/kernels.h"

namespace ctx::test {

constexpr CompressorKind kKinds[] = {CompressorKind::kMean,
                                     CompressorKind::kMax,
                                     CompressorKind::kConv,
                                     CompressorKind::kDilated,
                                     CompressorKind::kGated,
                                     CompressorKind::kMostUsed,
                                     CompressorKind::kGiven};

// What a test may fix; the rest is random.
struct Wish {
  bool small = true;  // head sizes of any number, else those of mma tiles
  int kind = -1;      // of the compressor
  int storage = -1;
  int64_t q_per_kv = 0;
};

// One ring of rows, read and written as float64.
struct Ring {
  Storage storage;
  int64_t capacity = 0, heads = 0, width = 0;
  Buffer<char> bytes;
  std::vector<int64_t> held;  // the ring's row of each row of a call; empty: the same
  int64_t row_bytes() const {
    return width * cuda::size_of(storage) + (storage == Storage::kInt8 ? kScaleBytes : 0);
  }
  void make(Storage s, int64_t rows, int64_t h, int64_t n, int64_t w) {
    storage = s, capacity = n, heads = h, width = w;
    bytes.assign(size_t(rows * h * n * row_bytes()), char(-1));  // NaN
  }
  const char* row(int64_t b, int64_t h, int64_t i) const {
    const int64_t from = held.empty() ? b : held[b];
    return &bytes[((from * heads + h) * capacity + i) * row_bytes()];
  }
  double get(int64_t b, int64_t h, int64_t i, int64_t d) const {
    const char* r = row(b, h, i);
    double x = load_number(storage, r + d * cuda::size_of(storage));
    if (storage == Storage::kInt8) x *= load_number(Storage::kFloat32, r + width);
    return x;
  }
};

// Numbers in the arithmetic's type.
struct WideNumbers {
  Storage type = Storage::kFloat32;
  Buffer<char> bytes;

  void assign(Storage arithmetic, size_t count, double x) {
    type = arithmetic;
    bytes.assign(count * cuda::size_of(type), char{});
    for (size_t i = 0; i < count; ++i) set(i, x);
  }
  size_t size() const { return bytes.size() / cuda::size_of(type); }
  double operator[](size_t i) { return load_number(type, &bytes[i * cuda::size_of(type)]); }
  void set(size_t i, double x) { store_number(type, &bytes[i * cuda::size_of(type)], x); }
  void* device() { return bytes.device(); }
  void fetch() { bytes.fetch(); }
};

class World {
 public:
  World(Random& random, const Wish& wish) : random_(random) {
    constexpr Storage kStorages[] = {
        Storage::kFloat32, Storage::kFloat64, Storage::kBFloat16, Storage::kFloat16};
    kind = wish.kind >= 0 ? static_cast<CompressorKind>(wish.kind) : random.of(kKinds);
    storage = wish.storage >= 0 ? static_cast<Storage>(wish.storage) : random.of(kStorages);
    arithmetic = storage == Storage::kFloat64 ? Storage::kFloat64 : Storage::kFloat32;
    compressed_storage = storage;
    if (storage != Storage::kFloat64 && random.coin()) {
      constexpr Storage kSlots[] = {
          Storage::kInt8, Storage::kInt8, Storage::kFloat32, Storage::kFloat16};
      compressed_storage = random.of(kSlots);
    }
    clock.token_distance = random.coin();
    Schedule& s = clock.schedule;
    s.ratio = random.between(1, 5);
    s.segment = random.between(1, 9);
    s.window = random.between(0, 12);
    s.compressed = random.one_in(6) ? 0 : random.between(1, 7);
    s.sinks = random.coin() ? 0 : random.between(1, 5);
    if (kind == CompressorKind::kDilated) s.overlap = dilated_overlap(s.ratio);
    if (kind == CompressorKind::kConv && random.coin()) s.overlap = random.between(1, 4);
    batch = random.between(1, 3);
    kv_heads = random.between(1, 2);
    q_per_kv = wish.q_per_kv > 0 ? wish.q_per_kv : random.between(1, 5);
    head_dim = wish.small ? random.between(1, 24) : 16 * random.between(1, 4);
    value_dim = wish.small ? random.between(1, 24) : 16 * random.between(1, 4);
    if (wish.small && random.coin()) head_dim = 8 * random.between(1, 4);
    if (wish.small && random.coin()) value_dim = 8 * random.between(1, 4);
    headroom = random.between(1, 12);
    make_rotary(head_dim / 2);
    make_map();
    make_rings();
    make_parameters();
    seen.assign(batch, 0);
  }

  int64_t heads() const { return kv_heads * q_per_kv; }

  MemoryView view() {
    MemoryView m;
    m.clock = clock, m.storage = storage, m.compressed_storage = compressed_storage;
    m.rotary = rotary();
    m.batch = batch, m.kv_heads = kv_heads, m.head_dim = head_dim, m.value_dim = value_dim;
    m.window_capacity = rings[4].capacity, m.compressed_capacity = rings[2].capacity;
    m.sink_keys = rings[0].bytes.device(), m.sink_values = rings[1].bytes.device();
    m.compressed_keys = rings[2].bytes.device(), m.compressed_values = rings[3].bytes.device();
    m.window_keys = rings[4].bytes.device(), m.window_values = rings[5].bytes.device();
    if (has_mass) m.slot_mass = mass.device();
    if (kind == CompressorKind::kMostUsed) {
      m.usage = usage.device();
      m.slot_positions = slot_positions.device();
    }
    return m;
  }
  void fetch() {
    for (Ring& ring : rings) ring.bytes.fetch();
    mass.fetch(), usage.fetch(), slot_positions.fetch();
  }

  Rotary rotary() {
    Rotary r;
    r.dim = rotary_dim;
    r.inv_freq = inv_freq.device();
    r.attention_factor = attention_factor, r.interleaved = interleaved;
    r.keys_rotated = keys_rotated;
    return r;
  }

  // Ring `side` of a region, and the entry of a number.
  Ring& ring(int region, int side) { return rings[2 * region + side]; }
  int64_t entry(int region, int64_t number) {
    return region == kSinks ? number : number % ring(region, 0).capacity;
  }

  std::vector<double> rotated(std::vector<double> x, double position, bool back = false) {
    const int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
      const double factor = back ? 1 / attention_factor : attention_factor;
      const double c = std::cos(position * inv_freq[i]) * factor;
      const double s = std::sin(position * inv_freq[i]) * factor * (back ? -1 : 1);
      const double p = x[a], q = x[b];
      x[a] = p * c - q * s, x[b] = q * c + p * s;
    }
    return x;
  }

  // The next call: some tokens of some rows; rows may begin anew, inside the call, too.
  void next_call() {
    tokens = random_.between(1, headroom);
    ragged = random_.coin();
    origin.assign(batch, 0), lengths.assign(batch, 0);
    for (int64_t b = 0; b < batch; ++b) {
      if (random_.one_in(8)) seen[b] = random_.coin() ? 0 : -random_.between(0, tokens);
      origin[b] = seen[b];
      lengths[b] = ragged ? random_.between(0, tokens) : tokens;
    }
  }
  // Blocks of the call that hold no segment's first token but as their own first.
  std::vector<int64_t> cuts() {
    std::vector<int64_t> at{0};
    for (int64_t i = 1; i < tokens; ++i) {
      bool cut = false;
      for (int64_t b = 0; b < batch; ++b)
        cut = cut || (origin[b] + i) % clock.schedule.segment == 0;
      if (cut) at.push_back(i);
    }
    at.push_back(tokens);
    return at;
  }
  Block block(int64_t begin, int64_t end) {
    const int64_t* const map = maps ? rows.device() : nullptr;
    const int64_t* const counts = ragged ? lengths.device() : nullptr;
    return {origin.device(), counts, begin, end - begin, 0, 1, map, memory_rows};
  }
  void end_call() {
    for (int64_t b = 0; b < batch; ++b) {
      seen[b] = origin[b] + lengths[b];
      if (seen[b] < 0) seen[b] = 0;  // a stream that did not begin
    }
  }

  CompressorKind kind;
  Storage storage, arithmetic, compressed_storage;
  Clock clock;
  int64_t batch, kv_heads, q_per_kv, head_dim, value_dim, headroom;
  // The memory's row that each row of a call is.
  bool maps = false;
  int64_t memory_rows = 0;
  Buffer<int64_t> rows;
  std::vector<int64_t> held;
  int64_t rotary_dim = 0;
  double attention_factor = 1.0;
  bool interleaved = false, keys_rotated = false, has_mass = true, wide_parameters = false;
  Buffer<double> inv_freq;
  Ring rings[6];
  WideNumbers mass;
  Buffer<char> usage;
  Buffer<int64_t> slot_positions;
  Buffer<char> parameters[6];
  std::vector<int64_t> seen;
  // The call.
  int64_t tokens = 0;
  bool ragged = false;
  Buffer<int64_t> origin, lengths;

 private:
  void make_rotary(int64_t most) {
    if (most == 0 || random_.one_in(4)) return;
    rotary_dim = 2 * random_.between(random_.coin() ? most : 1, most);
    inv_freq.assign(rotary_dim / 2, 0.0);
    for (int64_t i = 0; i < rotary_dim / 2; ++i) inv_freq[i] = std::pow(0.3, double(i));
    if (random_.coin()) attention_factor = 1.25;
    interleaved = random_.coin();
    keys_rotated = random_.one_in(3);
  }

  // A memory may have more rows than a call, in another order.
  void make_map() {
    maps = random_.coin();
    memory_rows = batch + (maps ? random_.between(0, 2) : 0);
    for (int64_t b = 0; b < memory_rows; ++b) held.push_back(b);
    for (int64_t b = 0; maps && b < batch; ++b)
      std::swap(held[b], held[random_.between(b, memory_rows - 1)]);
    held.resize(batch);
    rows.assign(batch, 0);
    for (int64_t b = 0; b < batch; ++b) rows[b] = held[b];
    if (maps && held[0] == 0) rows[0] = -1;  // the row of the same number
  }

  void make_rings() {
    const Schedule& s = clock.schedule;
    const int64_t window = s.window_capacity(headroom), slots = s.compressed_capacity(headroom);
    const int64_t sizes[] = {s.sinks, slots, window};
    for (int region = 0; region < kRegions; ++region) {
      const Storage stored = region == kCompressed ? compressed_storage : storage;
      ring(region, 0).make(stored, memory_rows, kv_heads, sizes[region], head_dim);
      ring(region, 1).make(stored, memory_rows, kv_heads, sizes[region], value_dim);
      for (int side = 0; side < 2; ++side) ring(region, side).held = held;
    }
    has_mass = random_.coin();
    const double nan = std::numeric_limits<double>::quiet_NaN();
    mass.assign(arithmetic, size_t(memory_rows * kv_heads * slots), nan);
    if (kind != CompressorKind::kMostUsed) return;
    usage.assign(size_t(memory_rows * kv_heads * window * cuda::size_of(arithmetic)), char(-1));
    slot_positions.assign(size_t(memory_rows * kv_heads * slots), -7);
  }

  void make_parameters() {
    wide_parameters = random_.coin();
    const Storage p = parameter_storage();
    const int64_t c = clock.schedule.ratio, k = c + clock.schedule.overlap;
    const auto make = [&](int i, int64_t size, double scale) {
      parameters[i].assign(size_t(kv_heads * size * cuda::size_of(p)), char{});
      for (int64_t j = 0; j < kv_heads * size; ++j)
        store_number(p, &parameters[i][j * cuda::size_of(p)], scale * random_.number());
    };
    for (int side = 0; side < 2; ++side) {
      const int64_t w = side == 0 ? head_dim : value_dim;
      if (kind == CompressorKind::kConv) {
        make(side, k * w * w, 0.5);
        if (wide_parameters) make(2 + side, w, 1.0);
      } else if (kind == CompressorKind::kDilated) {
        const int64_t layers = dilated_layers(c);
        make(3 * side, 2 * w * 2 * w, 0.5);
        if (layers > 1) make(3 * side + 1, (layers - 1) * 2 * 2 * w * 2 * w, 0.4);
        make(3 * side + 2, c * 2 * w * w, 0.5);
      } else if (kind == CompressorKind::kGated) {
        make(2 * side, head_dim, 1.0);
        make(2 * side + 1, c, 1.0);
      }
    }
  }

 public:
  Storage parameter_storage() const { return wide_parameters ? arithmetic : storage; }
  // Number j of head h of parameter i, of `size` numbers per head.
  double parameter(int i, int64_t h, int64_t size, int64_t j) const {
    const Storage p = parameter_storage();
    return load_number(p, &parameters[i][(h * size + j) * cuda::size_of(p)]);
  }

 private:
  Random& random_;
};

}  // namespace ctx::test
