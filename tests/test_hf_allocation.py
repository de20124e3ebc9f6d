"""Entries shared out among layers: the choice is the best one, what it is made by is what a layer's
memory costs alone, and a fit with it goes on after interruptions.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ctx.hf
from hf_models import model_of
from test_hf_fit import SMALL, StopError, divergence, fitted, laws_with, same, text

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers")

from ctx.hf.budgets import schedule_of  # noqa: E402
from ctx.hf.fitting import allocation  # noqa: E402
from ctx.hf.fitting.allocation import OneLayer, allocate, further_sizes  # noqa: E402
from ctx.hf.fitting.settings import FitSettings, placed_in  # noqa: E402
from ctx.hf.fitting.whole import logits_at  # noqa: E402

MEASURED = {"slots": 12, "sinks": 1, "allocation": "measured", "excerpt_tokens": 96}


@given(
    st.lists(
        st.dictionaries(st.integers(1, 6), st.floats(0, 1), min_size=1, max_size=4),
        min_size=1, max_size=4,
    ),
    st.integers(1, 24),
)  # fmt: skip
def test_the_choice_is_the_best_of_all(losses, total):
    every = [
        (sum(layer[size] for layer, size in zip(losses, sizes, strict=True)), sizes)
        for sizes in itertools.product(*losses)
        if sum(sizes) <= total
    ]
    if not every:
        with pytest.raises(ValueError, match="total must be at least"):
            allocate(losses, total)
        return
    chosen = allocate(losses, total)
    assert sum(chosen) <= total
    cost = sum(layer[size] for layer, size in zip(losses, chosen, strict=True))
    assert cost == pytest.approx(min(every)[0])


def test_only_layers_that_cost_more_than_the_mean_may_grow():
    settings = FitSettings(allocation="measured")
    assert settings.sizes == [256, 512, 1024, 2048]
    found = further_sizes([0.1, 0.5, 0.2], settings)
    assert found == [(0, 256), (1, 256), (2, 256), (1, 1024), (1, 2048)]
    assert FitSettings(allocation="measured", excerpt_tokens=2048).sizes == [256, 512, 1024]
    assert FitSettings().sizes == [512]


@given(st.integers(20, 600), st.integers(0, 8), st.integers(2, 8), st.integers(20, 2400))
def test_a_placement_in_other_entries_keeps_its_share(slots, compressed, ratio, other):
    schedule = schedule_of(slots, compressed, ratio if compressed else 1, 2)
    made = placed_in(other, schedule)
    assert made.max_slots <= other and made.sinks == 2
    assert bool(made.compressed) == bool(compressed)
    if compressed:
        share = (compressed + 2) * other // schedule.max_slots - 2
        assert made.ratio == ratio and made.compressed == max(share, 1)
    if other == slots:
        assert made == schedule


@pytest.mark.parametrize(
    "family, implementation",
    [("llama", "sdpa"), ("llama", "eager"), ("gpt_neox", "sdpa"), ("gemma2", "eager"),
     ("phi", "sdpa")],
)  # fmt: skip
def test_a_layer_alone_costs_what_the_whole_model_says(family, implementation, monkeypatch):
    """Without running the layers in front of it, and with."""
    model = model_of(family, implementation)
    tokens, at = text(80), torch.arange(40, 80, 3)
    number = 0 if family == "gemma2" else 1
    count = model.config.num_hidden_layers
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    law = laws_with(model.config, "gated", "slot", schedule_of(20, 8, 2, 2), heads)[number]
    law.bias = torch.full((heads,), 0.5)
    law.measure((heads, *laws_sizes(model)), torch.device("cpu"), "test")
    alone = OneLayer(model, tokens, at)
    assert len(alone.blocks) == count == len(alone.given)
    ran = []
    hooks = [
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
        if hasattr(block, "self_attn")
        else block.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(alone.blocks)
    ]
    got = alone.kl(number, law)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(alone.own[number], count))
    laws = [None] * len(alone.own)
    full = logits_at(model, laws, tokens, at).log_softmax(-1)
    laws[number] = law
    with torch.no_grad():
        bounded = logits_at(model, laws, tokens, at).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(bounded, full, reduction="batchmean", log_target=True)
    assert got > 1e-6
    assert got == pytest.approx(wanted.item(), rel=1e-3)
    assert all("forward" not in block.__dict__ for block in alone.blocks)
    assert model.config._attn_implementation == implementation
    # Blocks that cannot be told apart are run.
    monkeypatch.setattr(allocation, "_blocks", lambda *_: [])
    assert OneLayer(model, tokens, at).kl(number, law) == pytest.approx(got, rel=1e-3)


def laws_sizes(model):
    """Channels of a key and of a value."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def test_a_measured_fit_holds_no_more_and_says_what_it_measured():
    model = model_of("llama")
    fit = fitted(model, **MEASURED)
    assert sum(schedule.max_slots for schedule in fit.schedules) <= 2 * 12
    assert fit.mean_slots <= 12
    for layer, schedule in zip(fit.report["layers"], fit.schedules, strict=True):
        costs = dict(layer["alone"])
        assert schedule.max_slots == layer["entries"] and layer["entries"] in costs
        assert {6, 12} <= set(costs) <= {6, 12, 24, 48}
        assert all(cost >= 0 for cost in costs.values())
    equal = fitted(model, **{**MEASURED, "allocation": "equal"})
    for mine, theirs in zip(fit.compressors, equal.compressors, strict=True):
        for name, x in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], x)
    assert torch.equal(fit.bias, equal.bias)
    assert divergence(model, fit, text(240)) > 0  # a cache takes sizes that differ by layer


def test_a_layer_that_needs_more_gets_it(monkeypatch):
    """With costs as given: the second layer costs much unless it has four times as much."""
    costs = {(0, 12): 0.1, (0, 6): 0.2, (1, 12): 5.0, (1, 6): 6.0, (1, 24): 4.0, (1, 48): 0.0}
    asked = []

    def kl(self, number, law):
        asked.append((number, law.schedule.max_slots))
        return costs[asked[-1]]

    monkeypatch.setattr(OneLayer, "kl", kl)
    fit = fitted(model_of("llama"), **MEASURED)
    assert set(asked) == set(costs) and len(asked) == len(costs)
    # 6 + 48 entries are more than 24; the best that fits is an equal share, or 6 + 12, 6 + 6.
    assert [x.max_slots for x in fit.schedules] == [12, 12]
    costs[1, 24] = 0.0
    costs[0, 6] = 0.1
    asked.clear()
    monkeypatch.setattr(FitSettings, "sizes", property(lambda _: [6, 12, 18]))
    costs[1, 18] = 0.0
    fit = fitted(model_of("llama"), **MEASURED)
    assert [x.max_slots for x in fit.schedules] == [6, 18]


@pytest.mark.parametrize("stage, at", [("layers", 2), ("alone", 1), ("allocation", 2)])
def test_goes_on_where_it_was_interrupted(tmp_path, stage, at):
    model, file = model_of("llama"), tmp_path / "partial"
    settings = {**MEASURED, "end_to_end": True}
    whole = fitted(model, **settings)

    def stop(now, done, total, said):
        assert done <= total
        if (now, done) == (stage, at):
            raise StopError

    with pytest.raises(StopError):
        fitted(model, **settings, partial=file, progress=stop)
    resumed = fitted(model, **settings, partial=file)
    same(resumed, whole)
    assert resumed.report == whole.report
    assert [x.numbers for x in resumed.schedules] == [x.numbers for x in whole.schedules]


def test_saved_and_loaded(tmp_path):
    fit = fitted(model_of("llama"), **MEASURED)
    fit.save(tmp_path / "a.safetensors")
    loaded = ctx.hf.load_compressors(tmp_path / "a.safetensors")
    assert loaded.schedules == fit.schedules and loaded.mean_slots == fit.mean_slots
    assert loaded.report["settings"] == {**SMALL, **FitSettings(**{**SMALL, **MEASURED}).to_dict()}
    same(loaded, fit)
