"""The texts of `ctx train`: order, what is held out, how streams walk, what is refused."""

import math

import pytest
import torch

from ctx.recipes.data import Streams, load_corpus, read_text, standard_library, unigram_entropy
from ctx.recipes.errors import RecipeError


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def test_standard_library_has_one_order_and_no_tests():
    paths = standard_library()
    assert len(paths) > 100
    assert paths == standard_library()
    assert all(path.suffix == ".py" for path in paths)
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-4:]) for path in paths)
    names = [path.name for path in paths]
    assert names.index("argparse.py") < names.index("tempfile.py")


def test_standard_library_is_the_default():
    corpus = load_corpus([], 64 * 1024)
    assert len(corpus.training) > 2_000_000
    assert 64 * 1024 <= len(corpus.held_out) <= 128 * 1024
    assert corpus.digest == load_corpus([], 64 * 1024).digest


class TestHeldOut:
    def test_last_files(self, tmp_path):
        files = [write(tmp_path, f"{i}.txt", bytes([65 + i]) * 99) for i in range(26)]
        corpus = load_corpus(files, 150)
        held_out = bytes(corpus.held_out.tolist())
        assert held_out == b"Y" * 99 + b"\n" + b"Z" * 99 + b"\n"
        assert len(corpus.training) == 2400

    def test_end_of_one_file(self, tmp_path):
        corpus = load_corpus([write(tmp_path, "a", b"ab" * 500)], 64)
        assert (len(corpus.training), len(corpus.held_out)) == (937, 64)

    def test_at_most_a_tenth(self, tmp_path):
        corpus = load_corpus([write(tmp_path, "a", b"a" * 999)], 10**9)
        assert (len(corpus.training), len(corpus.held_out)) == (900, 100)

    def test_digest_knows_text_and_cut(self, tmp_path):
        files = [write(tmp_path, "a", b"a" * 999)]
        digests = {load_corpus(files, 10).digest, load_corpus(files, 20).digest}
        write(tmp_path, "a", b"a" * 998 + b"b")
        assert len(digests | {load_corpus(files, 10).digest}) == 3


class TestStreams:
    text = torch.arange(103, dtype=torch.uint8)

    def test_rows_are_contiguous_and_targets_follow(self):
        streams = Streams(self.text, 2, 10)
        assert streams.chunks == 5
        tokens, targets = zip(*[streams.chunk(i) for i in range(5)], strict=True)
        assert torch.cat(tokens, 1).tolist() == [list(range(50)), list(range(51, 101))]
        assert torch.cat(targets, 1).tolist() == [list(range(1, 51)), list(range(52, 102))]
        assert tokens[0].dtype == torch.int64

    def test_wraps_around_and_says_so(self):
        streams = Streams(self.text, 2, 10)
        assert torch.equal(streams.chunk(7)[0], streams.chunk(2)[0])
        assert [streams.starts(i) for i in range(7)] == [True, *[False] * 4, True, False]

    def test_one_chunk_is_enough_and_less_is_not(self):
        assert Streams(self.text[:22], 2, 10).chunks == 1
        with pytest.raises(RecipeError, match=r"must have at least 22 bytes.* got 21"):
            Streams(self.text[:21], 2, 10)


class TestRefused:
    @pytest.mark.parametrize(
        "data, message",
        [
            (b"", "must be a text file, got an empty one"),
            (b"abc\0def", "must be UTF-8 text, got byte 0x00 at 3"),
            (b"\x7fELF\xff\xfe", "must be UTF-8 text, got byte 0xff at 4"),
            ("naïve".encode("latin-1"), "must be UTF-8 text, got byte 0xef at 2"),
        ],
    )
    def test_content(self, tmp_path, data, message):
        with pytest.raises(RecipeError, match=message):
            read_text(write(tmp_path, "a", data))

    def test_paths(self, tmp_path):
        with pytest.raises(RecipeError, match=r"No such file"):
            load_corpus([tmp_path / "none"], 10)
        with pytest.raises(RecipeError, match=r"directory"):
            load_corpus([tmp_path], 10)


def test_unigram_entropy():
    assert unigram_entropy(torch.tensor([7] * 9, dtype=torch.uint8)) == 0
    assert unigram_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(8)
    mixed = torch.tensor([1, 1, 1, 2], dtype=torch.uint8)
    assert unigram_entropy(mixed) == pytest.approx(2 - 0.75 * math.log2(3))
