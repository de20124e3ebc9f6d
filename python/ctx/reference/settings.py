"""What attention to a compressive memory is, besides its schedule: one value for every function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .rotary import NoRotation, Rotary

CHOICES = {
    "position": ("rotary", "relative", "alibi", None),
    "distance": ("slot", "token"),
    "keys": ("plain", "rotated"),
}


@dataclass(frozen=True)
class Settings:
    """Positions, distances and what is added to scores.

    Args:
        position: "rotary" (rotary.py), "relative" or "alibi" (positions.py), or None.
        alibi_slopes: one number per query head; with "alibi" and no other scheme.
        relative: the five tensors of `positions.Relative`; with "relative" and no other scheme.
        rotary_base, rotary_dim, rotary_interleaved, inv_freq, attention_factor: see
            `rotary.Rotary`.
        keys: "plain": keys are given without rotation; "rotated": keys are given rotated to the
            number of their token in its stream, `attention_factor` included, as Hugging Face
            models cache them. They are stored as given and un-rotated to be compressed. Queries
            are given without rotation in both cases.
        distance: "slot" counts what stands between a query and a key, as the paper does; "token"
            counts tokens (`Schedule.distances`).
        scale: factor of the scores; None means D^-1/2.
        compressed_bias: what is added to the score of every compressed slot: "none", "log_ratio"
            (log c, as a slot stands for c tokens) or one number per query head.
        slot_mass: also add the mass that the compressor gives each slot (compression.py).
        logit_softcap: s > 0 replaces a scaled score x by s tanh(x / s); None or 0: no cap. This is
            a choice of this library, taken from Gemma 2 (arXiv:2408.00118, section 2): the law
            has none. The cap comes before biases, mass and ALiBi, which it leaves unbounded.
    """

    position: str | None = "rotary"
    alibi_slopes: Sequence[float] | Tensor | None = None
    relative: Sequence[Tensor] | None = None
    rotary_base: float = 10000.0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    inv_freq: Sequence[float] | Tensor | None = None
    attention_factor: float = 1.0
    keys: str = "plain"
    distance: str = "slot"
    scale: float | None = None
    compressed_bias: str | Tensor | Sequence[float] = "none"
    slot_mass: bool = False
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"ctx.reference: {name} must be one of {choices}, got {value!r}")
        for name, scheme in (("alibi_slopes", "alibi"), ("relative", "relative")):
            if (getattr(self, name) is not None) != (self.position == scheme):
                raise ValueError(
                    f"ctx.reference: {name} must come with position={scheme!r} and with no other, "
                    f"got position={self.position!r}"
                )
        if self.keys == "rotated" and self.position != "rotary":
            raise ValueError(
                "ctx.reference: keys must be 'plain' unless position is 'rotary', got 'rotated'"
            )
        bias = self.compressed_bias
        if isinstance(bias, str) and bias not in ("none", "log_ratio"):
            raise ValueError(
                "ctx.reference: compressed_bias must be 'none', 'log_ratio' or a number per head, "
                f"got {bias!r}"
            )
        if self.slot_mass and isinstance(bias, str) and bias == "log_ratio":
            raise ValueError(
                "ctx.reference: compressed_bias must not be 'log_ratio' with slot_mass, which "
                "counts the tokens of a slot already, got 'log_ratio'"
            )
        if self.logit_softcap is not None and self.logit_softcap < 0:
            raise ValueError(
                f"ctx.reference: logit_softcap must be at least 0, got {self.logit_softcap}"
            )

    @property
    def rotary(self) -> Rotary | NoRotation:
        """How queries and keys are rotated."""
        if self.position != "rotary":
            return NoRotation()
        frequencies = None if self.inv_freq is None else tuple(float(f) for f in self.inv_freq)
        return Rotary(
            self.rotary_base,
            self.rotary_dim,
            self.rotary_interleaved,
            frequencies,
            self.attention_factor,
        )
