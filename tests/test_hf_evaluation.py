"""ctx.hf.evaluation: losses, windows, repeated passages, needles, budgets, and their tables."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ctx
from ctx.hf import evaluation
from ctx.hf.evaluation import (
    candidates,
    compare,
    grid,
    needles,
    picture,
    repeats,
    schedule_of,
    statistics,
    stream,
    tables,
    windows,
)
from hf_models import VOCABULARY, full_cache, logits_of, model_of, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")

FULL = candidates.full_cache()
WINDOW = candidates.window_and_sinks(20)
MEAN = candidates.compressive("mean", schedule_of(20, 6, 4), baseline=WINDOW.name)
WIDE = candidates.compressive("wide", schedule_of(220, 8, 4), baseline=WINDOW.name)


def text(count=120, seed=3):
    return tokens(1, count, seed)[0]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- losses ---------------------------------------------------------------------------------------


def losses_by_hand(logits, ids):
    return F.cross_entropy(logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_losses_are_those_of_one_forward(family):
    attention = "eager" if family == "gemma2" else "sdpa"
    model, ids = model_of(family, attention), text()
    logits = logits_of(model, full_cache(model), ids[None])
    (one,) = stream(model, ids, [FULL], chunk=19)
    close(one.losses, losses_by_hand(logits, ids))
    assert torch.equal(one.hits, logits[0, :-1].argmax(-1) == ids[1:])
    assert (one.first, one.tokens, one.kl) == (1, len(ids), None)
    assert one.seconds > 0
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("start", [0, 1, 2, 50, 57, 119])
@pytest.mark.parametrize("keeps", [True, False])
def test_scored_from_a_token_on(start, keeps, monkeypatch):
    model, ids = model_of("llama"), text()
    if not keeps:  # a model that always computes all logits
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda x, **rest: forward(x, **rest), raising=True)
    wanted = losses_by_hand(logits_of(model, full_cache(model), ids[None]), ids)
    for one in stream(model, ids, [FULL, WIDE], chunk=19, start=start):
        close(one.losses, wanted[max(start, 1) - 1 :])
        assert one.first == max(start, 1)


def test_chunks_do_not_matter():
    model, ids = model_of("llama"), text()
    wanted, *others = (
        stream(model, ids, [FULL, WINDOW, MEAN], chunk=chunk, kl=True) for chunk in (120, 1, 7, 64)
    )
    assert [one.kl is None for one in wanted] == [True, False, False]
    for scores in others:
        for a, b in zip(scores, wanted, strict=True):
            close(a.losses, b.losses)
            assert (a.nbytes, a.tokens) == (b.nbytes, b.tokens)
            if b.kl is not None:
                close(a.kl, b.kl)
    assert (wanted[2].losses - wanted[0].losses).abs().max() > 1e-2


def test_divergence_by_hand():
    model, ids = model_of("llama"), text()
    full, _, mean = stream(model, ids, [FULL, WINDOW, MEAN], kl=True, start=30)
    p, q = (
        logits_of(model, one.make(model), ids[None])[0, 29:-1].double().log_softmax(-1)
        for one in (FULL, MEAN)
    )
    close(mean.kl.double(), (p.exp() * (p - q)).sum(-1))
    assert full.kl is None and mean.kl.min() > -1e-6


def test_nothing_evicted_is_the_full_cache():
    model, ids = model_of("llama"), text()
    full, wide = stream(model, ids, [FULL, WIDE], kl=True, chunk=50)
    close(wide.losses, full.losses)
    close(wide.kl, torch.zeros(119))


def test_limits():
    """The full cache reads as far as it fits, the others go on."""
    model, ids = model_of("llama"), text()
    read = []
    limited = candidates.full_cache("first", 50)
    first, mean = stream(model, ids, [limited, MEAN], chunk=32, kl=True, advance=read.append)
    assert sum(read) == 50 + 120
    assert (first.tokens, len(first.losses), len(mean.losses), len(mean.kl)) == (50, 49, 119, 49)
    whole = stream(model, ids, [FULL])[0]
    close(first.losses, whole.losses[:49])
    assert first.nbytes * 12 == whole.nbytes * 5
    (none,) = stream(model, ids, [limited], start=60)
    assert len(none.losses) == 0


def test_bytes_are_of_all_layers():
    model, ids = model_of("gemma2"), text(40)
    mean = stream(model, ids, [MEAN])[0]
    assert mean.nbytes > MEAN.make(model).nbytes  # the sliding layer has its own


def test_the_model_is_as_it_was():
    model = model_of("llama", "sdpa").train()
    stream(model, text(), [WINDOW])
    assert model.training and model.config._attn_implementation == "sdpa"

    def failing(model):
        raise RuntimeError("not made")

    for make in (failing, lambda model: object()):
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            stream(model, text(), [WINDOW, evaluation.Candidate("bad", make)])
        assert model.training and model.config._attn_implementation == "sdpa"


def test_bfloat16():
    model, ids = model_of("llama", dtype=torch.bfloat16), text()
    full, wide = stream(model, ids, [FULL, WIDE], kl=True)
    assert full.losses.dtype == wide.kl.dtype == torch.float32
    assert abs(full.losses.mean() - wide.losses.mean()) < 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ids": torch.zeros(1, 5, dtype=torch.int64)}, r"ids must be \[N\], N >= 2, got \[1, 5\]"),
        ({"ids": torch.zeros(1, dtype=torch.int64)}, "N >= 2"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"start": 120}, "start must be below the number of tokens, 120, got 120"),
        ({"candidates": []}, "candidates must be at least one"),
        ({"candidates": [FULL, FULL]}, "of different names"),
    ],
)
def test_refused(options, message):
    arguments = {"ids": text(), "candidates": [FULL], **options}
    with pytest.raises(ValueError, match=message):
        stream(model_of("llama"), **arguments)


# --- budgets --------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2000), st.integers(0, 1000), st.integers(1, 16), st.integers(0, 8),
    st.integers(1, 16),
)  # fmt: skip
def test_largest_window_of_a_budget(slots, compressed, ratio, sinks, segment):
    least = ctx.Schedule(0, compressed, ratio, segment, sinks).max_slots
    if least > slots:
        with pytest.raises(ValueError, match=f"at least {least}, .* got {slots}"):
            schedule_of(slots, compressed, ratio, sinks, segment)
        return
    made = schedule_of(slots, compressed, ratio, sinks, segment)
    assert made.max_slots <= slots
    assert made.resized(window=made.window + 1).max_slots > slots
    assert made.numbers[1:] == (compressed, ratio, segment, sinks)
    seen = (len(part) for part in made.visible(3 * made.reach + 5))
    assert sum(seen) <= slots


def test_window_and_sinks_are_a_budget():
    assert schedule_of(512).numbers == (507, 0, 1, 1, 4)
    assert schedule_of(512, 252, 4).numbers == (252, 252, 4, 1, 4)
    with pytest.raises(ValueError, match="got -1"):
        schedule_of(512, -1)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        schedule_of(0)


# --- means ----------------------------------------------------------------------------------------


def test_estimates():
    made = statistics.mean(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert made.value == 3.0
    assert made.error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert str(made) == "3.0000 ± 1.0801"
    assert str(statistics.mean(torch.tensor([1.5]))) == "1.5000"
    noise = torch.randn(20) * 10
    assert statistics.difference(noise + 0.5, noise).error < 1e-5


def test_share_closed():
    full = torch.tensor([1.0, 2.0, 3.0, 4.0])
    gap = torch.tensor([0.5, 1.0, 1.5, 1.0])
    made = statistics.share_closed(full, full + gap, full + 0.25 * gap)
    assert made.value == pytest.approx(0.75) and made.error == pytest.approx(0, abs=1e-6)
    candidate = full + torch.tensor([0.5, 0.0, 0.5, 0.5])
    made = statistics.share_closed(full, full + gap, candidate)
    assert made.value == pytest.approx(1 - 1.5 / 4)
    left_out = [1 - 1.0 / 3.5, 1 - 1.5 / 3.0, 1 - 1.0 / 2.5, 1 - 1.0 / 3.0]
    mean = sum(left_out) / 4
    spread = math.sqrt(3 / 4 * sum((x - mean) ** 2 for x in left_out))
    assert made.error == pytest.approx(spread)
    assert statistics.share_closed(full[:1], full[:1] + 1, full[:1]).error is None


def test_share_of_no_gap():
    full = torch.tensor([1.0, 2.0])
    assert statistics.share_closed(full, full + 1e-6, full) is None
    assert statistics.share_closed(full, full + torch.tensor([0.0, 1.0]), full) is None


def test_blocks():
    assert statistics.block_means(torch.arange(12.0), 4).tolist() == [1.5, 5.5, 9.5]
    assert statistics.block_means(torch.arange(9.0), 4).tolist() == [2.0, 6.5]
    assert statistics.block_means(torch.arange(3.0), 4).tolist() == [1.0]


# --- windows --------------------------------------------------------------------------------------


def test_windows_are_disjoint():
    ids = torch.arange(100)
    made = windows.cut(ids, 3, 30)
    assert [window[0].item() for window in made] == [0, 35, 70]
    assert [len(window) for window in made] == [30] * 3
    assert torch.equal(torch.cat(windows.cut(ids[:90], 3, 30)), ids[:90])
    made = windows.cut(ids, 3, 31, bos=-1)
    assert all(window[0] == -1 and len(window) == 31 for window in made)
    with pytest.raises(ValueError, match="at least 4 × 30 = 120 tokens, got 100"):
        windows.cut(ids, 4, 30)


def test_comparison_of_windows():
    model, read = model_of("llama"), []
    cut = windows.cut(text(400), 3, 120)
    options = {"start": 60, "chunk": 32, "advance": read.append}
    samples = windows.score(model, cut, [FULL, WINDOW, MEAN], **options)
    assert samples.losses.shape == samples.kl.shape == samples.hits.shape == (3, 3)
    assert sum(read) == 9 * 120
    for number, ids in enumerate(cut):
        scores = stream(model, ids, [FULL, WINDOW, MEAN], start=60, kl=True)
        for row, one in enumerate(scores):
            close(samples.losses[row, number], one.losses.double().mean())
            assert samples.hits[row, number] == one.hits.double().mean()
    full, window, mean = compare(samples)
    assert full.over_full is full.share is full.kl is window.share is None
    assert full.perplexity == pytest.approx(math.exp(samples.losses[0].mean()))
    close(
        torch.tensor(mean.over_full.value), (samples.losses[2] - samples.losses[0]).mean().float()
    )
    losses = samples.losses.mean(1)
    wanted = (losses[1] - losses[2]) / (losses[1] - losses[0])
    assert mean.share.value == pytest.approx(float(wanted)) and mean.share.error > 0
    kl = samples.kl.mean(1)
    assert mean.kl.value == pytest.approx(float(kl[2]))
    assert mean.kl_share.value == pytest.approx(float((kl[1] - kl[2]) / kl[1]))
    table = tables.markdown([full, window, mean])
    assert table.startswith("| cache ") and len(table.splitlines()) == 5
    assert tables.percent(mean.share) in table
    lost = evaluation.Candidate("lost", MEAN.make, baseline="nothing")
    with pytest.raises(ValueError, match="baseline of 'lost' must be one of"):
        compare(evaluation.Samples((FULL, lost), samples.losses[:2]))


def test_no_gap_has_no_share():
    """A window wider than the text is the full cache: no share, no division by zero."""
    cut = windows.cut(text(400), 3, 100)
    wide = candidates.window_and_sinks(300)
    same = candidates.compressive("same", schedule_of(300, 8, 4), baseline=wide.name)
    lines = compare(windows.score(model_of("llama"), cut, [FULL, wide, same], start=50))
    assert lines[2].share is None and lines[2].kl_share is None
    assert abs(lines[2].over_full.value) < 1e-5 and abs(lines[2].kl.value) < 1e-5
    assert "gap closed" not in tables.markdown(lines)


class Loaded:
    """What ctx.hf.load_compressors gives, as far as the evaluation looks."""

    def __init__(self, *schedules):
        self.schedules = schedules


def test_grid():
    chosen = {(20, 2): None, (20, 4): "max", (28, 2): ctx.compression.Mean(2, 2, 8)}
    made = grid.candidates_of(chosen)
    assert [one.name for one in made] == [
        "full cache", "window + sinks, 20", "20 slots, ratio 2", "20 slots, ratio 4",
        "window + sinks, 28", "28 slots, ratio 2",
    ]  # fmt: skip
    model, cut = model_of("llama"), windows.cut(text(400), 2, 90)
    most = [one.make(model)._stream.laws[0].schedule.max_slots for one in made[1:]]
    assert most == [20, 20, 20, 28, 28]
    lines = grid.score_grid(model, cut, chosen, start=40)
    assert [line.name for line in lines] == [one.name for one in made]
    assert [line.share is None for line in lines] == [True, True, False, False, True, False]
    table = grid.table(lines, chosen).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:5]] == [
        "slots", "window + sinks", "ratio 2", "ratio 4",
    ]  # fmt: skip
    assert table[3].split("|")[4].strip() == ""  # not in the grid


def test_grid_of_loaded_compressors():
    fits, wide = Loaded(schedule_of(20, 6, 4)), Loaded(schedule_of(20, 6, 4), schedule_of(21, 6, 4))
    made = grid.candidates_of({(20, 4): fits})
    assert made[-1].baseline == "window + sinks, 20"
    with pytest.raises(ValueError, match="of 20 slots must attend to no more, got 21"):
        grid.candidates_of({(20, 4): wide})
    with pytest.raises(ValueError, match="ratio must be 2"):
        grid.candidates_of({(20, 2): fits})


# --- repeated passages ----------------------------------------------------------------------------


def test_passages_repeat():
    ids = torch.arange(1000)
    for distance in (1, 30, 100):
        made = repeats.build(ids, distance, passage=20, count=4, lead=7)
        assert [len(one) for one in made] == [7 + 20 + distance + 20] * 4
        for one in made:
            assert torch.equal(one[-20:], one[7:27])
            assert torch.equal(one[:-20], torch.arange(one[0], one[0] + 27 + distance))
        own = [set(one.tolist()) for one in made]
        assert len(set.union(*own)) == sum(map(len, own))  # stretches of their own
    with pytest.raises(ValueError, match="at least 4 × 1020 = 4080 tokens, got 1000"):
        repeats.build(ids, 1000, passage=20, count=4, lead=0)


def test_second_occurrence_is_scored():
    model = model_of("llama")
    made = repeats.build(text(600), 60, passage=16, count=3, lead=5)
    samples = repeats.score_repeats(model, made, [FULL, WINDOW, MEAN], passage=16, chunk=32)
    for number, ids in enumerate(made):
        logits = logits_of(model, full_cache(model), ids[None])
        close(samples.losses[0, number].float(), losses_by_hand(logits, ids)[-16:].mean())
    assert samples.kl is None
    assert [line.samples for line in compare(samples)] == [3] * 3


# --- needles --------------------------------------------------------------------------------------


def encode(part):
    """A byte a token, within the tiny models' vocabulary."""
    return [2 + byte % (VOCABULARY - 2) for byte in part.encode()]


def encode_plainly(part):
    return list(part.encode())


def test_needles_are_where_they_should_be():
    ids = torch.full((3000,), ord("."))
    depths = (0, 0.25, 0.5, 1)
    made = needles.build(encode_plainly, ids, length=400, depths=depths, per_depth=2, digits=4)
    assert len({one.text for one in made}) == 8
    for number, one in enumerate(made):
        assert len(one.ids) == 400
        said = bytes(one.ids.tolist()).decode()
        fact = said[one.needle.start : one.needle.stop]
        assert fact == f"\n{one.text}\n"
        question, answer = one.text[:-1].rsplit(" ", 1)
        assert said.endswith(f"\n{question} {answer}") and len(answer) == 4
        assert said[one.answer.start : one.answer.stop] == f" {answer}"
        own = 400 - len(fact) - len(question) - 1 - len(answer) - 1
        assert one.needle.start == round(depths[number // 2] * own)
    again = needles.build(encode_plainly, ids, length=400, depths=depths, per_depth=2, digits=4)
    assert [one.text for one in again] == [one.text for one in made]
    with pytest.raises(ValueError, match="length must be at least"):
        needles.build(encode_plainly, ids, length=60)
    with pytest.raises(ValueError, match="as the text has 3000 tokens, got 9999"):
        needles.build(encode_plainly, ids, length=9999)
    with pytest.raises(ValueError, match="depths must be between 0 and 1"):
        needles.build(encode_plainly, ids, depths=[1.5])


def test_answers_are_scored():
    model = model_of("llama")
    made = needles.build(encode, text(500), length=180, depths=(0.2, 0.8), per_depth=1, digits=3)
    samples = needles.score_probes(model, made, [FULL, WINDOW], chunk=64)
    for number, one in enumerate(made):
        logits = logits_of(model, full_cache(model), one.ids[None])
        wanted = losses_by_hand(logits, one.ids)[-len(one.answer) :]
        close(samples.losses[0, number].float(), wanted.sum(), 1e-4)
        greedy = logits[0, one.answer.start - 1 : -1].argmax(-1)
        assert bool(samples.hits[0, number]) == torch.equal(greedy, one.ids[-len(one.answer) :])
    assert [line.perplexity for line in compare(samples)] == [None, None]
    joined = evaluation.Samples.join([samples, samples])
    assert joined.losses.shape == joined.hits.shape == (2, 4)
    assert joined.kl is None and joined.whole


def test_an_answer_that_is_known_is_exact():
    """Greedy decoding from the question gives the answer: the hit is that of generation."""
    model = model_of("llama")
    (probe,) = needles.build(encode, text(300), length=180, depths=(0.5,), per_depth=1)
    ids, begin = probe.ids.clone(), probe.answer.start
    for place in range(begin, len(ids)):
        logits = logits_of(model, full_cache(model), ids[None, :place])
        ids[place] = logits[0, -1].argmax()
    known = needles.Probe(ids, probe.needle, probe.answer, probe.text)
    samples = needles.score_probes(model, [known], [FULL])
    assert samples.hits.tolist() == [[1.0]]


# --- the picture ----------------------------------------------------------------------------------


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    scores = stream(model_of("llama"), text(), [candidates.full_cache("first", 20), MEAN])
    assert picture.draw(tmp_path / "losses.png", scores, 16)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
