#include "ops/rows.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <sstream>

#include "ops/check.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// Which of a layer's tensors stands at a place of a state.
int index_of(at::TensorList state, size_t place) {
  const size_t rings = state.size() - kClock;
  return static_cast<int>(place < rings ? place % kRings : kRings + place - rings);
}

}  // namespace

std::vector<int64_t> numbers(const Tensor& x) {
  const Tensor here = x.cpu().contiguous();
  std::vector<int64_t> values(here.numel());
  // A tensor of a trace has nothing to read, and says so in item().
  const bool traced = at::isTensorSubclassLike(here);
  for (size_t i = 0; i < values.size(); ++i) {
    const auto place = static_cast<int64_t>(i);
    values[i] = traced ? here[place].item<int64_t>() : here.const_data_ptr<int64_t>()[i];
  }
  return values;
}

void check_chosen(const Tensor& rows, int64_t batch, std::string_view where) {
  CTX_CHECK_TYPE(rows.scalar_type() == at::kLong || rows.scalar_type() == at::kBool,
                 where,
                 "rows must be int64 or bool, got ",
                 rows.scalar_type());
  CTX_CHECK_VALUE(rows.dim() == 1, where, "rows must be [N], got ", rows.sizes());
  check_readable(rows, "rows", std::string(where).c_str());
  if (rows.scalar_type() == at::kBool) {
    CTX_CHECK_VALUE(
        rows.size(0) == batch, where, "rows must be bool [B] = [", batch, "], got ", rows.sizes());
    return;
  }
  for (const int64_t row : numbers(rows)) {
    CTX_CHECK_INDEX(row >= 0 && row < batch,
                    where,
                    "rows must be between 0 and B - 1 = ",
                    batch - 1,
                    ", got ",
                    row);
  }
}

void refuse_counted(at::TensorList state, std::string_view where) {
  for (size_t layer = 0; layer < layers_of(state); ++layer) {
    CTX_CHECK_VALUE(!counts_attention(rings_of(state, layer)),
                    where,
                    "compressor must be one whose slots follow from the tokens alone, got "
                    "\"most_used\"");
  }
}

void check_same_kind(at::TensorList state,
                     at::TensorList other,
                     bool together,
                     std::string_view where) {
  const auto kind = [&](const Tensor& x) {
    std::ostringstream text;
    text << "[";
    together ? text << "B" : text << x.sym_size(0);
    for (int64_t i = 1; i < x.dim(); ++i) text << ", " << x.sym_size(i);
    text << "] torch." << c10::getDtypeNames(x.scalar_type()).first;
    if (together) text << " on " << x.device();
    return text.str();
  };
  const size_t first = together ? 1 : 0;
  for (size_t i = 0; i + kClock < state.size(); ++i) {
    const Tensor &mine = state[i], &theirs = other[i];
    CTX_CHECK_VALUE(mine.dim() == theirs.dim() && mine.scalar_type() == theirs.scalar_type() &&
                        mine.sym_sizes().slice(first) == theirs.sym_sizes().slice(first) &&
                        (!together || mine.device() == theirs.device()),
                    where,
                    state_name(index_of(state, i)),
                    " must be ",
                    kind(mine),
                    ", got ",
                    kind(theirs));
  }
}

void reset_rows(const Tensor& seen,
                const Tensor& rewindable,
                const std::optional<Tensor>& rows,
                std::string_view where) {
  if (rows) check_chosen(*rows, seen.size(0), where);
  const Writing writing(seen);
  for (const Tensor& clock : {seen, rewindable}) {
    if (!rows) {
      clock.zero_();
    } else if (rows->scalar_type() == at::kBool) {
      clock.masked_fill_(rows->to(clock.device()), 0);
    } else {
      clock.index_fill_(0, rows->to(clock.device()), 0);
    }
  }
}

Tensors merge_rows(at::TensorList states, int64_t memories, std::string_view where) {
  CTX_CHECK_VALUE(memories >= 1, where, "memories must be at least one, got none");
  const size_t size = states.size() / memories;
  for (int64_t i = 1; i < memories; ++i)
    check_same_kind(states.slice(0, size), states.slice(i * size, size), true, where);
  const Ordinary ordinary;
  Tensors made;
  for (size_t place = 0; place < size; ++place) {
    Tensors parts;
    for (int64_t i = 0; i < memories; ++i) parts.push_back(states[i * size + place]);
    made.push_back(at::cat(parts));
  }
  return made;
}

Tensors rows_to(at::TensorList state,
                std::optional<at::ScalarType> pairs,
                std::optional<at::ScalarType> slots,
                std::optional<at::Device> device,
                std::string_view where) {
  const auto was = state[0].scalar_type(), kept = state[kCompressedKeys].scalar_type();
  const auto type = pairs.value_or(was);
  storage_of(type, std::string(where).c_str(), "dtype");
  const auto stored = slots.value_or(kept != was && type != at::kDouble ? kept : type);
  const Ordinary ordinary;
  Tensors made;
  for (size_t i = 0; i < state.size(); ++i) {
    const int index = index_of(state, i);
    const auto wanted = state_type(index, type, stored);
    const Tensor& x = state[i];
    const bool packed = is_slots(index) && x.scalar_type() != wanted;
    made.push_back((packed ? slots_as(x, wanted) : x)
                       .to(device.value_or(x.device()), wanted, /*non_blocking=*/false, true));
  }
  return made;
}

}  // namespace ctx::ops
