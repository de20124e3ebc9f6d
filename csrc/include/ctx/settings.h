// What attention to a memory is, as one value.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "ctx/export.h"
#include "ctx/schedule.h"

namespace ctx {

// Everything but sizes, the compressor and the bias of its slots. A score is scale * q.k (with
// relative positions also the term of the distance), capped if logit_softcap is set; then ALiBi, the
// slot bias and the slot mass are added.
struct AttentionSettings {
  Schedule schedule;
  // "slot" or "token": how far a compressed slot or a sink is from the query.
  std::string distance = "slot";
  int64_t rotary_dim = 0;  // channels that are rotated, even; 0: no rotary positions
  double rotary_base = 10000.0;
  // Pairs of channels are (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
  bool rotary_interleaved = false;
  // rotary_dim / 2 radians per position; empty: rotary_base^(-2i / rotary_dim).
  std::vector<double> inv_freq = {};
  double attention_factor = 1.0;  // cosines and sines are multiplied by it, > 0
  // Keys are given rotated to the number of their token in its stream, attention_factor included;
  // queries are not.
  bool keys_rotated = false;
  double scale = 0.0;  // of the scores; 0: head_dim^-1/2
  // The scores of a slot also get its log-mass, which the compressor gives (compressor.h).
  bool slot_mass = false;
  // A scaled score s becomes logit_softcap * tanh(s / logit_softcap); 0: it stays.
  double logit_softcap = 0.0;
  // ALiBi (Press et al. 2022, arXiv:2108.12409): slope * distance is taken from every scaled score;
  // [H], absent: not.
  std::optional<at::Tensor> alibi_slopes = std::nullopt;
  // Relative positions (Dai et al. 2019, arXiv:1901.02860, section 3.3): a score is (q + u) . k +
  // (q + v) . R(distance), R(d) = W [sin(d w); cos(d w)], w_i = 10000^(-2i/P); v and W are others
  // for compressed slots (Rae et al. 2019). Empty: not; else
  //   u [H, D], v [H, D], W [H, D, P], compressed v [H, D], compressed W [H, D, P]; P even
  std::vector<at::Tensor> relative = {};

  // "rotary", "alibi", "relative" or "none": the scheme that the above amounts to.
  CTX_API std::string position() const;

  // Throws ValueError naming the first setting that is out of range, or two schemes at once.
  CTX_API void validate(int64_t head_dim) const;

  // The same with a number wherever a default stands for one: inv_freq, scale, and the overlap that
  // the schedule takes from the compressor. Throws what validate throws.
  CTX_API AttentionSettings resolved(int64_t head_dim, int64_t overlap) const;
};

// Settings as the operators of torch.ops.ctx take them: `int[] settings` and `float[] numbers`, of
// resolved ones and the name of a compressor. Throws ValueError for an unknown name.
struct PackedSettings {
  std::vector<int64_t> settings;
  std::vector<double> numbers;
};
CTX_API PackedSettings packed(const AttentionSettings& settings, const std::string& compressor);

}  // namespace ctx
