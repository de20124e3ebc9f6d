"""`ctx recall`: its data, its table, its command line, and that CMem remembers."""

import importlib.util
import json

import pytest
import torch

from command_line import here
from ctx.compression import COMPRESSORS, Compressor, register
from ctx.recipes.errors import RecipeError
from ctx.recipes.recall import compete
from ctx.recipes.recall_results import RecallResult, as_json, table
from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.recall_task import CHANCE, KEYS, VALUES, RecallTask, Tally, bins
from ctx.recipes.recall_training import measure
from ctx.transformer import CompressiveTransformer

TINY = [
    *["--pairs", "4", "--length", "24", "--window", "4", "--slots", "4", "--ratio", "2"],
    *["--batch", "4", "--threads", "1", "--steps", "3"],
]
SMALL = {"pairs": 4, "length": 24, "window": 4, "slots": 4, "ratio": 2, "batch": 4, "steps": 3}


def draw(pairs=5, length=9, rows=7, seed=0):
    return RecallTask(pairs, length).draw(rows, torch.Generator().manual_seed(seed))


class TestData:
    def test_pairs_come_first_and_keys_alone_follow(self):
        drawn = draw()
        assert drawn.tokens.shape == (7, 19) and drawn.answers.shape == (7, 9)
        shown, queries = drawn.tokens[:, :10], drawn.tokens[:, 10:]
        keys, values = shown[:, ::2], shown[:, 1::2]
        assert (keys >= 0).all() and (keys < KEYS).all()
        assert (values >= KEYS).all() and (values < KEYS + VALUES).all()
        assert all(len(set(row)) == 5 for row in keys.tolist())
        assert (queries < KEYS).all()  # the answers are never shown

    def test_answers_and_distances_are_those_of_the_pair(self):
        drawn = draw()
        for row, answers, distances in zip(
            *(x.tolist() for x in (drawn.tokens, drawn.answers, drawn.distances)), strict=True
        ):
            for i, (answer, distance) in enumerate(zip(answers, distances, strict=True)):
                query = 10 + i
                assert row[query - distance] == answer
                assert row[query - distance - 1] == row[query]

    def test_depends_on_the_seed_only(self):
        one, same, other = draw(seed=3), draw(seed=3), draw(seed=4)
        assert torch.equal(one.tokens, same.tokens) and torch.equal(one.answers, same.answers)
        assert not torch.equal(one.tokens, other.tokens)

    def test_every_distance_occurs_up_to_the_farthest(self):
        seen = draw(pairs=3, length=5, rows=500).distances.unique().tolist()
        assert seen == list(range(1, RecallTask(3, 5).farthest + 1))

    def test_lessons_end_with_the_task_and_are_shorter_before(self):
        task = RecallTask(16, 128)
        assert task.lessons() == [(RecallTask(4, 16), 4), (RecallTask(8, 32), 2), (task, 1)]
        assert all(lesson.pairs and lesson.length for lesson, _ in RecallTask(1, 1).lessons())


class TestTally:
    def test_counts_by_distance(self):
        tally = Tally(3)
        tally.add(torch.tensor([[True, False], [True, True]]), torch.tensor([[1, 1], [3, 3]]))
        both = tally + tally
        assert (both.accuracy(1, 1), both.accuracy(3, 3), both.accuracy(1, 3)) == (0.5, 1, 0.75)
        assert both.asked.tolist() == [0, 4, 0, 4]
        assert tally.accuracy(2, 2) != tally.accuracy(2, 2)  # NaN: nothing was asked

    def test_bins_end_at_the_marks(self):
        assert bins((4, 9), 12, 2) == [[(1, 2), (3, 4)], [(5, 6), (7, 9)], [(10, 10), (11, 12)]]
        assert bins((4, 90), 12, 100) == [[(1, 4)], [(5, 12)]]
        assert bins((0, 3), 3, 1) == [[(1, 1), (2, 2), (3, 3)]]

    @pytest.mark.parametrize("marks", [(47, 128), (3, 200), (50, 50)])
    def test_bins_cover_every_distance_once(self, marks):
        spans = [span for piece in bins(marks, 158, 16) for span in piece]
        covered = [d for first, last in spans for d in range(first, last + 1)]
        assert covered == list(range(1, 159))


def made(**changed):
    settings = RecallSettings(**{**SMALL, **changed})
    tally = Tally(settings.task.farthest)
    distances = torch.arange(1, settings.task.farthest + 1)
    tally.add(distances % 2 == 0, distances)
    names = [contestant.name for contestant in settings.contestants()]
    return settings, [RecallResult(name, tally, 1234, 5.0) for name in names]


def test_table_is_aligned_and_has_the_marks():
    settings, results = made()
    lines = table(results, settings).splitlines()
    assert len({len(line) for line in lines[: 2 + len(results)]}) == 1
    window, exact, reach = settings.marks
    for mark in settings.marks:
        assert f"{mark} |" in lines[0]
    assert "window only" in lines[2] and f"CMem, {[*COMPRESSORS][-1]}" in lines[-2]
    assert "1,234" in lines[2]
    assert f"a window of {window} tokens ends (between evictions: {exact})" in lines[-1]
    assert lines[-1].endswith(f"ends, {reach}; chance 3.1")


def test_json_has_every_distance():
    settings, results = made()
    values = json.loads(json.dumps(as_json(results, settings), allow_nan=False))
    assert values["settings"]["pairs"] == 4 and values["chance"] == CHANCE
    assert len(values["models"][0]["accuracy"]) == settings.task.farthest
    assert values["models"][0]["accuracy"][:4] == [0, 1, 0, 1]


def test_all_models_may_hold_as_many_slots():
    settings = RecallSettings(compressor="mean,max,conv,gated")
    without, *others = [one.config.schedule() for one in settings.contestants()]
    assert {schedule.max_slots for schedule in others} == {without.max_slots}
    assert settings.marks == (44, 47, 16 + 4 * 28)


@pytest.mark.parametrize("window, ratio", [(16, 4), (17, 4), (0, 3), (16, 1), (2, 7)])
def test_marks_are_those_of_the_schedules(window, ratio):
    settings = RecallSettings(window=window, ratio=ratio, length=200, compressor="conv")
    without, conv = (one.config.schedule() for one in settings.contestants())
    seen = [t - without.window_begin(t) for t in range(300)]
    assert settings.marks == (without.reach, max(seen), conv.reach)
    assert min(seen[200:]) >= without.reach


def test_measured_as_a_stream_like_one_parallel_call():
    settings = RecallSettings(**SMALL)
    config = settings.contestants()[1].config
    model = CompressiveTransformer(config)
    tally = measure(model, settings.task, 20, torch.Generator().manual_seed(5))
    drawn = settings.task.draw(20, torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, _ = model(drawn.tokens)
    expected = Tally(settings.task.farthest)
    right = logits[:, -settings.task.length :].argmax(-1) == drawn.answers
    expected.add(right, drawn.distances)
    assert torch.equal(tally.asked, expected.asked) and torch.equal(tally.right, expected.right)


def test_the_same_seed_gives_the_same_answers():
    settings = RecallSettings(**SMALL)
    one, same = (compete(settings.contestants()[1], settings) for _ in range(2))
    assert torch.equal(one.tally.right, same.tally.right)


class TestCommand:
    def test_writes_both_files(self, tmp_path):
        code, out, err = here("recall", *TINY, "--compressor", "max,gated", cwd=tmp_path)
        assert code == 0, err
        folder = tmp_path / "runs" / "recall-1"
        drawn = {"recall.png"} if importlib.util.find_spec("matplotlib") else set()
        assert {path.name for path in folder.iterdir()} == {"recall.json"} | drawn
        for picture in drawn:
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        values = json.loads((folder / "recall.json").read_text())
        names = ["window only", "CMem, max", "CMem, gated"]
        assert [model["name"] for model in values["models"]] == names
        assert all(name in out for name in names) and "runs/recall-1" in out
        assert {model["steps"] for model in values["models"]} == {3}
        assert "CMem, max 3/3 lesson 3, loss" in err

    def test_keeps_an_older_run(self, tmp_path):
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "recall.json").write_text("{}")
        code, _, err = here("recall", *TINY, "--run", "old", cwd=tmp_path)
        assert (code, err) == (2, "ctx recall: old already holds a run: name another with --run\n")

    @pytest.mark.parametrize(
        "given, message",
        [
            (("--steps", "0"), "--steps must be at least 1, got 0"),
            (("--seed", "-1"), "--seed must be at least 0, got -1"),
            (("--pairs", "33"), "--pairs must be at most 32, the number of keys, got 33"),
            (("--lr", "nan"), "--lr must be positive and finite, got nan"),
            (("--batch", str(2**62)), "--batch must be below 2**62, got"),
            (("--batch", str(10**12)), "these sizes do not fit"),
            (("--compressor", "mean,no"), "--compressor must be all or some of mean, max, conv"),
            (("--compressor", ""), "--compressor must be all or some of mean, max, conv"),
            (("--compressor", "max,max"), "--compressor must be all or some of"),
            (("--length", "3"), "--length must be at least 18, so that queries lie more than 47"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path, given, message):
        code, out, err = here("recall", *given, cwd=tmp_path)
        assert code == 2 and out == ""
        assert err.startswith(f"ctx recall: {message}") and err.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("")
        code, _, err = here("recall", *TINY, "--run", "file/run", cwd=tmp_path)
        assert code == 2 and err.startswith("ctx recall: cannot write file/run: ")


def test_every_compressor_competes():
    """Also one that is registered at run time; --compressor picks some, in its own order."""

    @register
    class First(Compressor):
        name = "first"

        def forward(self, keys, values):
            return keys[..., 0, :], values[..., 0, :]

    try:
        names = [one.name for one in RecallSettings().contestants()]
        assert names == ["window only", *(f"CMem, {name}" for name in COMPRESSORS)]
        assert names[-1] == "CMem, first"
        some = RecallSettings(compressor="first, mean").contestants()
        assert [one.name for one in some] == ["window only", "CMem, first", "CMem, mean"]
    finally:
        del COMPRESSORS["first"]


def test_a_length_that_is_just_enough():
    RecallSettings(length=18)
    with pytest.raises(RecipeError, match="`length` must be at least 18"):
        RecallSettings(length=17)


@pytest.mark.slow
def test_cmem_remembers_what_the_window_forgets():
    """Minutes of training: conv answers to at least 80 % of the reach, the window guesses."""
    settings = RecallSettings(compressor="conv")
    _, exact, reach = settings.marks
    without, conv = (compete(one, settings).tally for one in settings.contestants())
    for first in range(1, int(0.8 * reach) - 7):
        assert conv.accuracy(first, first + 7) > 0.9, first
    assert without.accuracy(1, settings.marks[0]) > 0.9
    assert without.accuracy(exact + 1, reach) < 1.6 * CHANCE  # it may know which values there are
