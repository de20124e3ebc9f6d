// Slots that are tokens: of those that leave the window at one boundary the most used stay, in the
// order of their positions.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/slots.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
class Chooser {
 public:
  using A = Acc<T>;

  explicit Chooser(const CompressArgs& args)
      : args_(args),
        m_(args.memory),
        schedule_(m_.clock.schedule),
        row_(std::max(m_.head_dim, m_.value_dim)),
        table_(m_.rotary.dim) {}

  // Head h of row b; all groups that are due leave at one boundary.
  void run(int64_t b, int64_t h) {
    const int64_t count = args_.block.count(b);
    if (count == 0) return;
    const int64_t begun = schedule_.groups(args_.block.first(b) - 1);
    const int64_t last = schedule_.groups(args_.block.first(b) + count - 1);
    if (begun == last) return;
    const int64_t held = args_.block.row(b);
    choose(held, h, schedule_.first_token(begun), last - begun);
    for (int64_t g = begun; g < last; ++g) {
      const int64_t token = tokens_[g - begun];
      report(b, h, g, token);
      if (last - g <= m_.compressed_capacity) copy(held, h, g, token);
    }
  }

 private:
  // The `groups` most used of c * groups tokens from `first` on; of equals the earlier.
  void choose(int64_t held, int64_t h, int64_t first, int64_t groups) {
    const int64_t all = schedule_.tokens_of(groups);
    const A* usage = ring_row<A>(m_.usage, m_.kv_heads, m_.window_capacity, 1, held, h, 0);
    used_.resize(all);
    tokens_.resize(all);
    for (int64_t i = 0; i < all; ++i) {
      const A value = usage[(first + i) % m_.window_capacity];
      used_[i] =
          value == value ? value : -std::numeric_limits<A>::infinity();  // a NaN has no order
      tokens_[i] = first + i;
    }
    const auto more = [&](int64_t one, int64_t other) {
      const A mine = used_[one - first], theirs = used_[other - first];
      return mine > theirs || (mine == theirs && one < other);
    };
    std::nth_element(tokens_.begin(), tokens_.begin() + (groups - 1), tokens_.end(), more);
    std::sort(tokens_.begin(), tokens_.begin() + groups);
  }

  // Which token slot g is, for whoever asked.
  void report(int64_t b, int64_t h, int64_t g, int64_t token) {
    if (args_.chosen == nullptr) return;
    const int64_t start = args_.block.start(b);
    const int64_t block = args_.slot_block[b * args_.slot_block_stride];
    const int64_t place = schedule_.block_of(start, g) - block;
    if (place < 0 || place >= args_.slots) return;
    const int64_t group = schedule_.block_of(start, schedule_.group_of(token)) - block;
    const int64_t slot = (b * m_.kv_heads + h) * args_.slots + place;
    args_.chosen[slot] = schedule_.tokens_of(group) + schedule_.place_in_group(token);
    args_.chosen_positions[slot] = token;
  }

  // The token's pair becomes slot g; under the distance "token" its key stays where it is.
  void copy(int64_t held, int64_t h, int64_t g, int64_t token) {
    const int64_t from = token % m_.window_capacity;
    const int64_t to = g % m_.compressed_capacity;
    const auto window = [&](void* ring, int64_t width) {
      return ring_row<T>(ring, m_.kv_heads, m_.window_capacity, width, held, h, from);
    };
    load_row(window(m_.window_keys, m_.head_dim), row_.data(), m_.head_dim);
    if (!m_.clock.token_distance && m_.rotary.dim > 0) {
      rotate(static_cast<double>(token), Rotation::kBack);
      rotate(static_cast<double>(g), Rotation::kTo);
    }
    store(m_.compressed_keys, m_.head_dim, held, h, to);
    load_row(window(m_.window_values, m_.value_dim), row_.data(), m_.value_dim);
    store(m_.compressed_values, m_.value_dim, held, h, to);
    if (m_.slot_mass != nullptr)  // one token stands for itself
      *ring_row<A>(m_.slot_mass, m_.kv_heads, m_.compressed_capacity, 1, held, h, to) = A(0);
    *ring_row<int64_t>(m_.slot_positions, m_.kv_heads, m_.compressed_capacity, 1, held, h, to) =
        token;
  }

  void store(void* ring, int64_t width, int64_t held, int64_t h, int64_t index) const {
    dispatch_slots<T>(m_.compressed_storage, [&](auto type) {
      using S = decltype(type);
      const int64_t stored = stored_width<S>(width);
      S* target = ring_row<S>(ring, m_.kv_heads, m_.compressed_capacity, stored, held, h, index);
      store_slot(row_.data(), target, width);
    });
  }

  void rotate(double position, Rotation rotation) {
    const RotaryTable<A> table = make_rotary_table(m_.rotary, position, table_.data());
    rotate_row(m_.rotary, table, rotation, row_.data());
  }

  const CompressArgs& args_;
  const MemoryView& m_;
  const Schedule& schedule_;
  std::vector<A> row_;
  std::vector<A> table_;
  std::vector<A> used_;
  std::vector<int64_t> tokens_;
};

}  // namespace

void choose(const CompressArgs& args) {
  const MemoryView& m = args.memory;
  bool due = false;
  for (int64_t b = 0; b < m.batch && !due; ++b) {
    const EvictedGroups groups = evicted_groups(m, args.block, b);
    due = groups.first < groups.last;
  }
  if (!due) return;
  const Schedule& s = m.clock.schedule;
  const int64_t tokens = s.tokens_of(s.max_new_groups(int64_t{1}));
  const int64_t work = tokens * 16 + m.head_dim + m.value_dim + 80 * m.rotary.dim;
  dispatch(m.storage, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, m.batch * m.kv_heads, grain(work), [&](int64_t begin, int64_t end) {
      Chooser<T> chooser(args);
      for (int64_t task = begin; task < end; ++task)
        chooser.run(task / m.kv_heads, task % m.kv_heads);
    });
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
