#include "ctx/rows.h"

#include "ops/check.h"
#include "ops/rows.h"

namespace ctx {

using at::Tensor;
using rows::State;

namespace rows {

void reset(const Tensor& seen,
           const Tensor& rewindable,
           const std::optional<Tensor>& rows,
           std::string_view where) {
  ops::reset_rows(seen, rewindable, rows, where);
}

State merge(at::TensorList states, int64_t memories, std::string_view where) {
  return ops::merge_rows(states, memories, where);
}

State to(at::TensorList state,
         std::optional<at::ScalarType> pairs,
         std::optional<at::ScalarType> slots,
         std::optional<at::Device> device,
         std::string_view where) {
  return ops::rows_to(state, pairs, slots, device, where);
}

void rewind(const State& state, const Tensor& tokens, std::string_view where) {
  ops::refuse_counted(state, where);
  const Tensor &seen = ops::seen_of(state), &rewindable = ops::rewindable_of(state);
  CTX_CHECK_TYPE(
      tokens.scalar_type() == at::kLong, where, "tokens must be int64, got ", tokens.scalar_type());
  CTX_CHECK_VALUE(tokens.sym_sizes() == seen.sym_sizes(),
                  where,
                  "tokens must be [B] = ",
                  seen.sym_sizes(),
                  ", got ",
                  tokens.sym_sizes());
  ops::check_readable(tokens, "tokens", std::string(where).c_str());
  const auto asked = ops::numbers(tokens), most = ops::numbers(rewindable);
  for (size_t row = 0; row < asked.size(); ++row) {
    CTX_CHECK_VALUE(asked[row] >= 0 && asked[row] <= most[row],
                    where,
                    "tokens must be between 0 and what row ",
                    row,
                    " can take back = ",
                    most[row],
                    ", got ",
                    asked[row]);
  }
  const ops::Writing writing(seen);
  // A copy: they may be the memory's own counters.
  const Tensor here = tokens.to(seen.device(), at::kLong, /*non_blocking=*/false, /*copy=*/true);
  seen.sub_(here);
  rewindable.sub_(here);
}

State select(const State& state, const Tensor& rows, std::string_view where) {
  const Tensor& seen = ops::seen_of(state);
  ops::check_chosen(rows, seen.size(0), where);
  Tensor chosen = rows.scalar_type() == at::kBool ? rows.nonzero().squeeze(1) : rows;
  CTX_CHECK_VALUE(chosen.size(0) > 0, where, "rows must be at least one, got none");
  chosen = chosen.to(seen.device());
  const ops::Ordinary ordinary;
  State made;
  for (const Tensor& x : state) made.push_back(x.index_select(0, chosen));
  return made;
}

void copy(const State& state, const State& from, std::string_view where) {
  ops::check_same_kind(state, from, false, where);
  const ops::Writing writing(ops::seen_of(state));
  for (size_t i = 0; i < state.size(); ++i) state[i].copy_(from[i]);
}

}  // namespace rows
}  // namespace ctx
