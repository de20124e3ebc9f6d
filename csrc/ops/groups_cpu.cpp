// ctx::evicted_groups and its backward on the CPU: one pass over the tokens that are read.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/groups_ways.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/rotary.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

// Which row a group reads, and where it lies.
enum class Source : uint8_t { kNone, kCall, kRing, kSink };

struct Read {
  Source source;
  int64_t index;     // in the call, or in the ring
  int64_t position;  // of the token in its stream
};

std::vector<Read> reads_of(const PlanRows& plan,
                           const Schedule& s,
                           bool carried,
                           int64_t capacity) {
  const int64_t read = tokens_read(s);
  std::vector<Read> reads;
  reads.reserve(plan.batch() * plan.groups() * read);
  for (int64_t b = 0; b < plan.batch(); ++b) {
    const int64_t seen = plan.header(b, kPlanSeen);
    const int64_t oldest = std::max<int64_t>(0, plan.header(b, kPlanOldestToken) - s.overlap);
    for (int64_t g = 0; g < plan.groups(); ++g) {
      const int64_t first = s.first_token(plan.group(b, kPlanNumber, g)) - s.overlap;
      for (int64_t i = 0; i < read; ++i) {
        const int64_t place = plan.group(b, kPlanPlace, g) - s.overlap + i;
        const int64_t token = seen + place;
        Read r{Source::kNone, 0, first + i};
        if (first + i < 0) {
        } else if (place >= 0) {
          if (plan.tokens() > 0) r = {Source::kCall, std::min(place, plan.tokens() - 1), first + i};
        } else if (carried && token >= oldest) {
          r = token < s.sinks ? Read{Source::kSink, token, token}
                              : Read{Source::kRing, token % capacity, token};
        }
        reads.push_back(r);
      }
    }
  }
  return reads;
}

// Rows [B, heads, n, width] in the arithmetic's type.
Tensor gather(const Tensor& x,
              const Tensor& ring,
              const Tensor& sinks,
              const std::vector<Read>& reads,
              const PlanRows& plan) {
  const auto type = arithmetic_type(x.scalar_type());
  const int64_t batch = x.size(0), heads = x.size(1), width = x.size(3);
  const int64_t count = static_cast<int64_t>(reads.size()) / std::max<int64_t>(batch, 1);
  const Tensor out = at::empty({batch, heads, count, width}, x.options().dtype(type));
  if (out.numel() == 0) return out;
  const Tensor call = rows(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "evicted_groups", [&] {
    using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    auto* const target = out.data_ptr<Wide>();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (count * width));
    at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / heads, h = task % heads;
        const int64_t held = plan.memory_row(b);
        const auto row = [&](const Tensor& from, int64_t i, int64_t r) {
          return from.const_data_ptr<scalar_t>() + r * from.stride(0) + h * from.stride(1) +
                 i * from.stride(2);
        };
        for (int64_t i = 0; i < count; ++i) {
          const Read& r = reads[b * count + i];
          Wide* const to = target + (task * count + i) * width;
          if (r.source == Source::kNone) {
            std::fill_n(to, width, Wide(0));
            continue;
          }
          const scalar_t* const from = r.source == Source::kCall   ? row(call, r.index, b)
                                       : r.source == Source::kRing ? row(ring, r.index, held)
                                                                   : row(sinks, r.index, held);
          for (int64_t d = 0; d < width; ++d) to[d] = static_cast<Wide>(from[d]);
        }
      }
    });
  });
  return out;
}

// Rotates rows back, in place; what is before the stream stays zero.
void rotate_back(const Tensor& x, const std::vector<Read>& reads, const Rotary& rotary) {
  if (rotary.dim == 0 || x.numel() == 0) return;
  std::vector<double> positions;
  for (const Read& r : reads) positions.push_back(static_cast<double>(r.position));
  RotateArgs args;
  args.rotary = rotary;
  args.inverse = true;
  args.storage = storage_of(x.scalar_type(), kGroups, "k");
  args.batch = x.size(0), args.heads = x.size(1), args.tokens = x.size(2);
  args.head_dim = x.size(3);
  args.positions = positions.data();
  args.in = args.out = strided(x);
  kernels_for(x.device().type()).rotate(args);
}

Tensor sum_reads(const Tensor& grad, const std::vector<Read>& reads, int64_t tokens) {
  const int64_t batch = grad.size(0), heads = grad.size(1), width = grad.size(4);
  const int64_t count = grad.size(2) * grad.size(3);
  const Tensor total = at::zeros({batch, heads, tokens, width}, grad.options());
  if (total.numel() == 0 || count == 0) return total;
  const Tensor from = grad.contiguous();
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "evicted_groups_backward", [&] {
    const auto* const source = from.const_data_ptr<scalar_t>();
    auto* const target = total.data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (count * width));
    at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t i = 0; i < count; ++i) {
          const Read& r = reads[task / heads * count + i];
          if (r.source != Source::kCall) continue;
          const auto* const row = source + (task * count + i) * width;
          auto* const sum = target + (task * tokens + r.index) * width;
          for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
        }
      }
    });
  });
  return total;
}

}  // namespace

Pairs groups_cpu(const Tensor& k,
                 const Tensor& v,
                 const Tensor& plan,
                 OptionalList list,
                 at::IntArrayRef packed,
                 at::ArrayRef<double> numbers) {
  const at::TensorList memory = or_empty(list);
  const Settings settings = check_groups(k, v, memory, packed, numbers, plan);
  const Schedule& s = settings.schedule();
  const PlanRows rows(plan, k.size(0), k.size(2), kGroups);
  const bool carried = !memory.empty();
  for (int64_t b = 0; carried && b < rows.batch(); ++b) {
    CTX_CHECK_VALUE(rows.memory_row(b) < memory[kWindowKeys].size(0),
                    kGroups,
                    "plan must be one of this memory's rows, 0 to ",
                    memory[kWindowKeys].size(0) - 1,
                    ", got ",
                    rows.memory_row(b));
  }
  const auto reads = reads_of(rows, s, carried, carried ? memory[kWindowKeys].size(2) : 1);
  const auto held = [&](StateIndex index) { return carried ? memory[index] : Tensor(); };
  // As the memory stores them, so that slots do not depend on which call brought a token.
  const Tensor stored =
      settings.rotary.keys_rotated
          ? k
          : rotated(k,
                    PlanTensors(plan, k.size(0), k.size(2), kGroups).token(kPlanPosition),
                    settings.rotary);
  const Tensor keys = gather(stored, held(kWindowKeys), held(kSinkKeys), reads, rows);
  rotate_back(keys, reads, settings.rotary);
  const Tensor values = gather(v, held(kWindowValues), held(kSinkValues), reads, rows);
  const auto grouped = [&](const Tensor& x) {
    return x.view({x.size(0), x.size(1), rows.groups(), tokens_read(s), x.size(3)});
  };
  return {grouped(keys), grouped(values)};
}

Pairs groups_backward_cpu(const Tensor& grad_k,
                          const Tensor& grad_v,
                          const Tensor& plan,
                          SymInt symbolic_tokens,
                          at::ScalarType type,
                          at::IntArrayRef packed,
                          at::ArrayRef<double> numbers) {
  const Settings settings = unpack(packed, numbers, kGroups);
  const int64_t tokens = symbolic_tokens.expect_int();
  if (settings.rotary.keys_rotated)
    return groups_backward_composite(grad_k, grad_v, plan, tokens, type, packed, numbers);
  const PlanRows rows(plan, grad_k.size(0), tokens, kGroups);
  auto reads = reads_of(rows, settings.schedule(), /*carried=*/false, 1);
  // Places past the call's end were clamped; no law shows them.
  const int64_t read = tokens_read(settings.schedule());
  for (int64_t b = 0; b < rows.batch(); ++b) {
    for (int64_t g = 0; g < rows.groups(); ++g) {
      for (int64_t i = 0; i < read; ++i) {
        if (rows.group(b, kPlanPlace, g) - settings.schedule().overlap + i >= tokens)
          reads[(b * rows.groups() + g) * read + i].source = Source::kNone;
      }
    }
  }
  return {sum_reads(grad_k, reads, tokens).to(type), sum_reads(grad_v, reads, tokens).to(type)};
}

}  // namespace ctx::ops
