"""A short training run must learn: fewer bits than any model that ignores context."""

import itertools
import sysconfig
from pathlib import Path

import pytest
import torch

from ctx.recipes.data import load_corpus, unigram_entropy
from ctx.recipes.errors import RecipeError
from ctx.recipes.evaluation import evaluate, stream, table
from ctx.recipes.region_weights import region_weights, region_weights_table
from ctx.recipes.settings import TrainSettings, model_config
from ctx.recipes.trainer import Trainer

SMALL = {"embed_dim": 48, "num_layers": 2, "num_heads": 4, "window": 16, "compressed": 16,
         "segment": 16}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    files = [Path(sysconfig.get_path("stdlib"), name) for name in ("argparse.py", "inspect.py")]
    corpus = load_corpus(files, 8 * 1024)
    settings = TrainSettings(steps=220, batch=8, length=64, warmup=20, lr=5e-3)
    trainer = Trainer(model_config(SMALL), settings, corpus)
    history = [trainer.train_step() for _ in range(settings.steps)]
    return trainer, history, evaluate(trainer.model, corpus.held_out, lambda count: None)


def test_beats_the_unigram_entropy_of_its_text(trained):
    trainer, history, results = trained
    bound = unigram_entropy(trainer.corpus.held_out)
    assert results[0].bits_per_byte < bound - 0.5
    assert sum(line["bits_per_byte"] for line in history[-20:]) / 20 < bound - 0.5


def test_starts_near_a_uniform_guess(trained):
    assert 7 < trained[1][0]["bits_per_byte"] < 9


def test_what_is_seen_helps(trained):
    both, off, empty = (result.bits_per_byte for result in trained[2])
    assert both <= off + 0.01
    assert off < empty


def test_memory_and_reach(trained):
    both, off, empty = trained[2]
    assert (both.reach, off.reach, empty.reach) == (16 + 4 * 16, 16, 0)
    assert both.memory_bytes > off.memory_bytes > empty.memory_bytes > 0


def test_evaluation_is_streaming(trained):
    """The table's figure is that of one long parallel call."""
    model, text = trained[0].model, trained[0].corpus.held_out[:1000]
    result = stream("one row", model, text, lambda count: None)
    tokens = text.long()[None]
    with torch.no_grad():
        logits, _ = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]) / torch.log(
        torch.tensor(2.0)
    )
    assert result.bits_per_byte == pytest.approx(loss.item(), rel=1e-5)


def test_shares_are_those_of_one_call(trained):
    """What `ctx eval --usage` prints: averages over tokens and heads of one long parallel call."""
    model, text = trained[0].model, trained[0].corpus.held_out[:1000]
    counts = []
    found = region_weights(model, text, counts.append)
    with torch.no_grad():
        usage = model(text.long()[None], return_region_weights=True)[2]
    want = usage.double().mean((1, 2, 3))
    assert found.shape == (2, 3) and sum(counts) == 1000
    torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
    first, *_, last = region_weights_table(found).splitlines()
    assert first.split()[-3:] == ["sinks", "compressed", "window"]
    assert last.split() == ["layer", "1", *(f"{share:.3f}" for share in want[1])]


@pytest.mark.parametrize("position", ["rotary", "relative", "alibi", "none"])
def test_position_of_the_command_line(position):
    config = model_config({**SMALL, "position": position})
    assert config.position == (None if position == "none" else position)


def test_relative_positions_decay_like_the_rest():
    """Matrices do, rows do not."""
    corpus = load_corpus([Path(sysconfig.get_path("stdlib"), "argparse.py")], 1024)
    trainer = Trainer(model_config({**SMALL, "position": "relative"}), TrainSettings(), corpus)
    decayed = {id(parameter) for parameter in trainer.optimizer.param_groups[0]["params"]}
    for name, parameter in trainer.model.named_parameters():
        if ".relative." in name:
            assert (id(parameter) in decayed) == name.endswith("_weight"), name


def test_wrong_position():
    with pytest.raises(RecipeError, match=r"`position` must be one of .* got 'far'"):
        model_config({**SMALL, "position": "far"})


def test_forgetting_is_a_fresh_memory_per_segment(trained):
    model, text = trained[0].model, trained[0].corpus.held_out[:161]
    local = model.with_memory(window=0, compressed=0)
    result = stream("", local, text, lambda count: None, forget=True)
    tokens, targets = text[:-1].long().view(10, 16), text[1:].long().view(10, 16)
    with torch.no_grad():
        logits, _ = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert result.bits_per_byte == pytest.approx(loss.item() / 0.6931471805599453, rel=1e-5)


def test_progress_counts_every_byte(trained):
    model, text = trained[0].model, trained[0].corpus.held_out[:1001]
    counts = []
    stream("", model, text, counts.append)
    assert sum(counts) == 1000


def test_table_is_aligned(trained):
    lines = table(trained[2], trained[0].corpus.held_out).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "bits/byte" in lines[0] and "byte-unigram entropy" in lines[-1]


def test_learning_rate_warms_up_and_falls():
    settings = TrainSettings(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-3)


def updating(every, after, steps=100):
    settings = TrainSettings(steps=steps, update_every=every, update_every_after=after)
    return [step for step in range(steps) if settings.updates(step)]


def test_updates_are_as_rare_as_asked_and_the_last_step_has_one():
    assert updating(1, 0) == updating(1, 7) == updating(4, 100) == updating(4, 999)
    assert updating(1, 0, 20) == list(range(20))
    assert updating(4, 0, 12) == [3, 7, 11]
    assert updating(4, 3, 15) == [0, 1, 2, 6, 10, 14]
    assert updating(4, 3, 17) == [0, 1, 2, 6, 10, 14, 16]
    assert updating(50, 0, 5) == [4]


def test_one_update_takes_the_mean_of_its_gradients():
    """Three steps at unchanged weights, clipped as one gradient."""
    files = [Path(sysconfig.get_path("stdlib"), "argparse.py")]
    corpus = load_corpus(files, 1000)
    made = {"batch": 2, "length": 32, "steps": 7, "clip": 0.1}
    rare = Trainer(model_config(SMALL), TrainSettings(update_every=3, **made), corpus)
    often = Trainer(model_config(SMALL), TrainSettings(**made), corpus)
    weights = [parameter.clone() for parameter in often.model.parameters()]
    gradients = [torch.zeros_like(weight) for weight in weights]
    memory = None
    for step in range(3):
        tokens, targets = often.streams.chunk(step)
        logits, memory = often.model(tokens, memory)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for total, one in zip(
            gradients, torch.autograd.grad(loss, [*often.model.parameters()]), strict=True
        ):
            total += one / 3
    metrics = [rare.train_step() for _ in range(2)]
    assert all("grad_norm" not in line for line in metrics)
    for parameter, weight in zip(rare.model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    last = rare.train_step()
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert norm > 0.1 and last["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for parameter, gradient in zip(often.model.parameters(), gradients, strict=True):
        parameter.grad = gradient * (0.1 / norm)
    for group in often.optimizer.param_groups:
        group["lr"] = often.settings.learning_rate(2)
    often.optimizer.step()
    for ours, theirs in zip(rare.model.parameters(), often.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert "grad_norm" in [rare.train_step() for _ in range(4)][-1]  # the last step of all


def test_a_loss_that_is_not_finite_stops_the_run():
    files = [Path(sysconfig.get_path("stdlib"), "argparse.py")]
    trainer = Trainer(model_config(SMALL), TrainSettings(batch=2), load_corpus(files, 100))
    with torch.no_grad():
        trainer.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match="not finite at step 1: lower `lr`"):
        trainer.train_step()
    assert trainer.step == 0


@pytest.mark.parametrize("aux", ["reconstruction", "autoencoding"])
def test_the_papers_way_trains_the_compressor_by_the_auxiliary_loss(aux):
    """Task and auxiliary loss in one step; the compressor moves, though no task reaches it."""
    files = [Path(sysconfig.get_path("stdlib"), "argparse.py")]
    config = model_config({**SMALL, "compressor_grad": "aux", "aux_loss": aux})
    trainer = Trainer(config, TrainSettings(batch=4, length=64), load_corpus(files, 1000))
    compressor = trainer.model.blocks[0].attention.compressor
    before = [parameter.clone() for parameter in compressor.parameters()]
    history = [trainer.train_step() for _ in range(8)]
    assert all(line["aux_loss"] > 0 for line in history)
    for parameter, old in zip(compressor.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_aux_mode_has_a_loss_by_default():
    assert model_config({"compressor_grad": "aux"}).aux_loss == "reconstruction"
    assert model_config({}).aux_loss is None
