"""Checkpoints of `ctx train`: continuing bit for bit, written whole, refused by name."""

import copy
import os
import pickle
import zipfile

import pytest
import torch
from torch.utils import _pytree as pytree

from ctx.recipes import checkpoint
from ctx.recipes.data import Corpus
from ctx.recipes.errors import RecipeError
from ctx.recipes.loading import load_model
from ctx.recipes.run_folder import RunFolder
from ctx.recipes.settings import TrainSettings, model_config
from ctx.recipes.trainer import Trainer

PARTS = {"files": [], "digest": "d"}


def trainer(update_every=1, update_every_after=0, **changed):
    settings = {"steps": 30, "batch": 3, "length": 20, "warmup": 4, "threads": 1, "seed": 7,
                "update_every": update_every, "update_every_after": update_every_after}  # fmt: skip
    small = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "window": 8, "compressed": 4,
             "segment": 8, "dropout": 0.1}  # fmt: skip
    text = (torch.arange(700) ** 2 % 251).to(torch.uint8)  # 11 steps long: the streams wrap around
    return Trainer(
        model_config({**small, **changed}), TrainSettings(**settings), Corpus(text, text[:50], "d")
    )


def equal(first, second):
    a, spec_a = pytree.tree_flatten(first)
    b, spec_b = pytree.tree_flatten(second)
    return spec_a == spec_b and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def without_time(tree):
    return {k: v for k, v in tree.items() if k not in ("seconds", "tokens_per_second")}


@pytest.mark.parametrize("stop", [0, 1, 7, 11, 13])
@pytest.mark.parametrize("compressor", ["conv", "gated"])
def test_continues_bit_for_bit(tmp_path, stop, compressor):
    whole = trainer(compressor=compressor)
    expected = [without_time(whole.train_step()) for _ in range(25)]

    first = trainer(compressor=compressor)
    got = [without_time(first.train_step()) for _ in range(stop)]
    checkpoint.save(tmp_path / "c.pt", {**PARTS, **first.state()})
    torch.manual_seed(99)
    second = trainer(compressor=compressor)
    second.load(checkpoint.load(tmp_path / "c.pt"))
    got += [without_time(second.train_step()) for _ in range(25 - stop)]

    assert got == expected
    assert equal(without_time(second.state()), without_time(whole.state()))


@pytest.mark.parametrize("stop", [5, 6, 7, 8, 9, 11])
def test_gathered_gradients_continue_bit_for_bit(tmp_path, stop):
    """Updates of three steps each after the sixth: stopped before, behind and between them."""
    made = {"update_every": 3, "update_every_after": 6}
    whole = trainer(**made)
    expected = [without_time(whole.train_step()) for _ in range(19)]
    first = trainer(**made)
    got = [without_time(first.train_step()) for _ in range(stop)]
    assert bool(first.state()["gradients"]) == (stop in (7, 8, 11))
    checkpoint.save(tmp_path / "c.pt", {**PARTS, **first.state()})
    second = trainer(**made)
    second.load(checkpoint.load(tmp_path / "c.pt"))
    got += [without_time(second.train_step()) for _ in range(19 - stop)]
    assert got == expected
    assert equal(without_time(second.state()), without_time(whole.state()))


def test_gathered_gradients_are_part_of_what_continues():
    whole = trainer(update_every=3)
    for _ in range(2):
        whole.train_step()
    state = copy.deepcopy(whole.state())
    state["gradients"] = {}
    forgetful = trainer(update_every=3)
    expected = whole.train_step()["grad_norm"]
    forgetful.load(state)
    assert forgetful.train_step()["grad_norm"] != expected


def test_a_checkpoint_from_before_gradients_were_gathered(tmp_path):
    old = trainer()
    old.train_step()
    state = {**PARTS, **old.state()}
    del state["gradients"]
    for name in ("update_every", "update_every_after"):
        del state["settings"][name]
    checkpoint.save(tmp_path / "c.pt", state)
    expected = without_time(old.train_step())
    new = trainer()
    new.load(checkpoint.load(tmp_path / "c.pt"))
    assert without_time(new.train_step()) == expected


def test_memory_is_part_of_what_continues():
    whole = trainer()
    for _ in range(5):
        whole.train_step()
    state = copy.deepcopy(whole.state())
    state["memory"] = whole.model.init_memory(3).state_dict()
    forgetful = trainer()
    forgetful.load(state)
    assert forgetful.train_step()["bits_per_byte"] != whole.train_step()["bits_per_byte"]


def test_loads_as_a_model(tmp_path):
    trained = trainer()
    trained.train_step()
    checkpoint.save(tmp_path / checkpoint.FILE_NAME, {**PARTS, **trained.state()})
    text = torch.randint(0, 256, (1, 30))
    trained.model.eval()
    for path in (tmp_path, tmp_path / checkpoint.FILE_NAME):
        loaded = load_model(path)
        assert loaded.config == trained.model.config and not loaded.training
        assert torch.equal(loaded(text)[0], trained.model(text)[0])


class TestAtomic:
    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "c.pt"
        state = {**PARTS, **trainer().state()}
        checkpoint.save(path, state)
        before = path.read_bytes()

        def full_disk(value, file):
            file.write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full_disk)
        with pytest.raises(RecipeError, match=r"cannot write .*: No space left on device"):
            checkpoint.save(path, state)
        assert path.read_bytes() == before

    def test_is_synced_before_it_is_renamed(self, tmp_path, monkeypatch):
        calls = []
        for name in ("fsync", "replace"):
            original = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1]
            )
        checkpoint.save(tmp_path / "c.pt", {**PARTS, **trainer().state()})
        assert calls[:2] == ["fsync", "replace"]
        assert os.listdir(tmp_path) == ["c.pt"]


class TestRefused:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "c.pt"
        checkpoint.save(path, {**PARTS, **trainer().state()})
        return path

    def rewrite(self, path, **changed):
        state = {**torch.load(path, weights_only=True), **changed}
        torch.save({k: v for k, v in state.items() if v is not ...}, path)

    def test_none(self, tmp_path):
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(RecipeError, match=r"must be a run folder with a checkpoint.pt"):
                checkpoint.find(path)

    def test_another_version(self, path):
        self.rewrite(path, version=2)
        with pytest.raises(RecipeError, match=r"must be a checkpoint of version 1, got version 2"):
            checkpoint.load(path)

    def test_another_kind_of_file(self, path):
        self.rewrite(path, format="something")
        with pytest.raises(RecipeError, match=r"got another kind of file"):
            checkpoint.load(path)
        torch.save([1, 2], path)
        with pytest.raises(RecipeError, match=r"got another kind of file"):
            checkpoint.load(path)

    @pytest.mark.parametrize("part", ["config", "weights", "memory", "rng", "step"])
    def test_a_missing_part(self, path, part):
        self.rewrite(path, **{part: ...})
        with pytest.raises(RecipeError, match=f"got one without {part}"):
            checkpoint.load(path)

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, path, share):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(RecipeError, match=r"damaged or foreign"):
            checkpoint.load(path)

    def test_text(self, path):
        path.write_text("not a checkpoint\n")
        with pytest.raises(RecipeError, match=r"damaged or foreign"):
            checkpoint.load(path)

    def test_code_is_never_run(self, path, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)

        torch.save({"format": "ctx-checkpoint", "version": 1, "config": Evil()}, path)
        with pytest.raises(RecipeError, match=r"damaged or foreign"):
            checkpoint.load(path)
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(RecipeError, match=r"damaged or foreign"):
            checkpoint.load(path)
        assert not (tmp_path / "evil").exists()

    def test_a_foreign_archive(self, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "hello")
        with pytest.raises(RecipeError, match=r"damaged or foreign"):
            checkpoint.load(path)

    def test_settings_or_weights_that_do_not_fit(self, path):
        state = torch.load(path, weights_only=True)
        self.rewrite(path, config={**state["config"], "unheard_of": 1})
        with pytest.raises(RecipeError, match=r"settings are not of this version.*unheard_of"):
            load_model(path)
        self.rewrite(path, config={**state["config"], "num_layers": 3})
        with pytest.raises(RecipeError, match=r"weights .* are not those of its configuration"):
            load_model(path)


class TestRunFolder:
    def test_metrics_of_lost_work_are_dropped(self, tmp_path):
        folder = RunFolder(tmp_path / "run")
        for step in range(1, 8):
            folder.log({"step": step, "bits_per_byte": 1 / step})
        folder.close()
        with open(folder.metrics, "a") as file:
            file.write('{"step": 8, "bits')  # the crash came in the middle of a line
        folder = RunFolder(tmp_path / "run", resumed=5)
        folder.log({"step": 6, "bits_per_byte": 0.5})
        folder.close()
        history = folder.history()
        assert [line["step"] for line in history] == [1, 2, 3, 4, 5, 6]
        assert history[2]["bits_per_byte"] == 1 / 3

    def test_another_run_is_never_overwritten(self, tmp_path):
        RunFolder(tmp_path).close()
        (tmp_path / checkpoint.FILE_NAME).touch()
        with pytest.raises(RecipeError, match=r"already holds a run: continue it with `resume`"):
            RunFolder(tmp_path)

    def test_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(RecipeError, match=r"cannot write"):
            RunFolder(tmp_path / "file" / "run")
