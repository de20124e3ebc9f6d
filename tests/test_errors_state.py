"""Bad input of what is stored: states of another memory, of another version, damaged ones; files
that are no snapshots; and places where none can be written."""

import contextlib
import errno
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from bad_input import Bad
from ctx.memory_files import save
from strategies import assert_same_bits
from test_errors_rows import memory

LOAD = "ctx.KVMemory.load_state_dict"

# A part of a state, another value of it, and what the message says it was.
SETTINGS = {
    "batch_size": (3, "3"),
    "kv_heads": (1, "1"),
    "head_dim": (8, "8"),
    "value_dim": (6, "6"),
    "window": (5, "5"),
    "compressed": (2, "2"),
    "ratio": (1, "1"),
    "segment": (2, "2"),
    "sinks": (0, "0"),
    "overlap": (1, "1"),
    "max_rewind": (6, "6"),
    "position": ("alibi", '"alibi"'),
    "rotary_dim": (4, "4"),
    "rotary_base": (10000.000001, r"10000\.000001"),
    "rotary_interleaved": (1, "1"),
    "attention_factor": (1.5, r"1\.5"),
    "keys": ("rotated", '"rotated"'),
    "mass": ("slots", '"slots"'),
    "inv_freq": (torch.ones(2, dtype=torch.float64), r"a tensor \[2\]"),
    "distance": ("token", '"token"'),
    "compressor": ("mean", '"mean"'),
    "format": ("ctx.Other", "ctx.Other"),
    "version": (1, "1"),
}
TENSORS = (
    "window_keys",
    "window_values",
    "compressed_keys",
    "compressed_values",
    "sink_keys",
    "sink_values",
    "seen",
    "rewindable",
    "attention_received",
    "slot_positions",
)


def load(argument, error, change, got=""):
    """Loading the memory's own state, changed."""
    return Bad(
        LOAD, argument, error, lambda m: m.load_state_dict(change(dict(m.state_dict()))), got
    )


def part(name, error, make, got=""):
    """Loading the memory's own state with another tensor."""
    return load(name, error, lambda state: {**state, name: make(state[name])}, got)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def state_table():
    """Every entry of this file that is about a state."""
    for name, (value, got) in SETTINGS.items():
        yield f"another {name}", part(name, ValueError, lambda _, value=value: value, got)
        yield f"no {name}", load(name, ValueError, without(name), "none")
        yield f"{name} is None", part(name, TypeError, lambda _: None, "NoneType")
        as_tensor = lambda _: torch.zeros(2)  # noqa: E731
        yield f"{name} is a tensor", part(name, ValueError, as_tensor, "a tensor")
    for name in TENSORS:
        count = name in ("seen", "rewindable", "slot_positions")
        yield f"no {name}", load(name, ValueError, without(name), "none")
        yield f"{name} is a list", part(name, TypeError, lambda x: x.tolist(), "list")
        yield f"{name} is a number", part(name, TypeError, lambda x: 3, "3")
        yield f"{name} of more rows", part(name, ValueError, lambda x: torch.cat([x, x]), r"\[4")
        yield f"{name} of a rank more", part(name, ValueError, lambda x: x[None], r"\[1, 2")
        yield f"{name} of no rank", part(name, ValueError, lambda x: x.sum(), r"\[\]")
        dtype = torch.int32 if count else torch.int64
        kind = "Int" if count else "Long"
        yield f"{name} {kind}", part(name, TypeError, lambda x, to=dtype: x.to(to), kind)
        bits = lambda x: x.to(torch.complex64)  # noqa: E731
        yield f"{name} complex", part(name, TypeError, bits, "Complex")
        yield f"{name} on meta", part(name, ValueError, lambda x: x.to("meta"), "meta")
        yield f"{name} sparse", part(name, ValueError, lambda x: x.to_sparse(), "Sparse")
    one = torch.tensor
    yield "seen negative", part("seen", ValueError, lambda x: one([23, -1]), "-1 in row 1")
    yield "seen huge", part("seen", ValueError, lambda x: one([2**62, 23]), r"\d+ in row 0")
    spare = "rewindable"
    yield "rewindable negative", part(spare, ValueError, lambda x: one([0, -1]), "-1 in row 1")
    yield "beyond the max_rewind", part(spare, ValueError, lambda x: one([6, 0]), "6 in row 0")
    before = lambda state: {**state, "seen": one([2, 23]), spare: one([3, 0])}  # noqa: E731
    yield "before the stream", load(spare, ValueError, before, "3 in row 0")
    yield "version 0", part("version", ValueError, lambda _: 0, "0")
    yield "version as a name", part("version", ValueError, lambda _: "1", '"1"')
    yield "version as a float", part("version", ValueError, lambda _: 1.0, r"1\.0")
    yield "a size as a float", part("kv_heads", ValueError, lambda x: float(x), r"2\.0")
    yield "a size beyond 64 bits", part("kv_heads", ValueError, lambda _: 2**70, str(2**70))
    yield "a part too many", load("snapshot", ValueError, lambda s: {**s, "extra": 1}, "extra")
    yield "a number for a name", load("names", TypeError, lambda s: {**s, 1: 2}, "1")
    for wrong in (None, 3, "ctx.KVMemory", [1], [("format", 1)], torch.zeros(2)):
        kind = type(wrong).__name__
        yield f"a {kind} {wrong}", load("state", TypeError, lambda _, w=wrong: w, kind)
    empty = lambda _: {}  # noqa: E731
    yield "nothing", load("format", ValueError, empty, "none")


STATE_TABLE = dict(state_table())


@pytest.mark.parametrize("name", STATE_TABLE)
def test_state(name):
    used = memory()
    STATE_TABLE[name].refused(used, memory=used.tensors)


SAVED = [name for name in STATE_TABLE if name.startswith("another ")]


@pytest.mark.parametrize("writer", [torch.save, lambda state, path: save(state, path, "test")])
@pytest.mark.parametrize("name", SAVED)
def test_state_in_a_file(name, writer, tmp_path):
    """The same by way of a file, of format 1 and of today's."""
    used, state, path = memory(), dict(memory().state_dict()), tmp_path / "memory.ctx"
    setting = name.removeprefix("another ")
    writer({**state, setting: SETTINGS[setting][0]}, path)
    entry = STATE_TABLE[name]
    Bad(entry.where, entry.argument, entry.error, lambda: used.load(path), entry.got).refused(
        memory=used.tensors
    )


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.txt", "not a pickle")


def pickled(path):
    path.write_bytes(pickle.dumps(dict(memory().state_dict())))


def saved(thing, **options):
    return lambda path: torch.save(thing, path, **options)


class Foreign(dict):
    """A class that weights-only readers know nothing of."""


# what is in the file: a function that writes it
FILES = {
    "nothing": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"P"),
    "a zip's first letters": lambda path: path.write_bytes(b"PK\x03\x04"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 64),
    "text": lambda path: path.write_text("ctx.KVMemory\n" * 100),
    "another zip": zipped,
    "a plain pickle": pickled,
    "a tensor": saved(torch.zeros(3)),
    "a list": saved([1, 2]),
    "a number": saved(3),
    "None": saved(None),
    "a dict of numbers": saved({1: 2}),
    "a nested dict": saved({"format": {"version": 1}}),
    "a list in a dict": saved({"format": "ctx.KVMemory", "version": [1]}),
    "None in a dict": saved({"format": "ctx.KVMemory", "version": None}),
    "an OrderedDict": saved(OrderedDict(memory().state_dict())),
    "a module": saved(torch.nn.Linear(2, 2)),
    "a module's state": saved(torch.nn.Linear(2, 2).state_dict()),
    "another class": saved(Foreign(memory().state_dict())),
    "the format before zip": saved(
        dict(memory().state_dict()), _use_new_zipfile_serialization=False
    ),
}
NO_SNAPSHOT = ("ctx.KVMemory.load", "path", ValueError)


def file_table():
    """Every entry of this file that is about reading a file."""
    for name in FILES:
        call = lambda m, path: m.load(path)  # noqa: E731
        yield name, Bad(*NO_SNAPSHOT, call, "a damaged or foreign file")


FILE_TABLE = dict(file_table())


@pytest.mark.parametrize("name", FILE_TABLE)
def test_file(name, tmp_path):
    used, path = memory(), tmp_path / "memory.ctx"
    FILES[name](path)
    FILE_TABLE[name].refused(used, path, memory=used.tensors)


def test_file_cut_anywhere(tmp_path):
    """No beginning of a snapshot is one."""
    used, path = memory(), tmp_path / "memory.ctx"
    used.save(path)
    whole = path.read_bytes()
    entry = Bad(*NO_SNAPSHOT, lambda: used.load(path), "a damaged or foreign file")
    for size in {*range(0, len(whole), 97), *range(len(whole) - 300, len(whole), 7)}:
        path.write_bytes(whole[:size])
        entry.refused(memory=used.tensors)
    path.write_bytes(whole)
    used.load(path)


def test_file_with_a_damaged_byte(tmp_path):
    """A changed byte is noticed, or stands where it does not matter: there is a checksum."""
    used, path = memory(seen=17), tmp_path / "memory.ctx"
    used.save(path)
    whole, before = path.read_bytes(), {n: x.clone() for n, x in used.tensors.items()}
    for place in range(0, len(whole), 7):
        flipped = whole[place] ^ (1 + place % 255)
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            used.load(path)
        for name, tensor in used.tensors.items():
            assert_same_bits(tensor, before[name])


def at(*parts):
    return lambda folder: os.fspath(folder.joinpath(*parts))


# where it is: (path, function of the KVMemory, number of the system's error)
PLACES = {
    "load: missing": (at("missing"), "load", errno.ENOENT),
    "load: a folder": (at(), "load", errno.EISDIR),
    "load: inside a file": (at("file", "memory.ctx"), "load", errno.ENOTDIR),
    "load: no name": (lambda folder: "", "load", errno.ENOENT),
    "load: a long name": (at("x" * 300), "load", errno.ENAMETOOLONG),
    "save: in no folder": (at("missing", "memory.ctx"), "save", errno.ENOENT),
    "save: over a folder": (at(), "save", errno.EISDIR),
    "save: inside a file": (at("file", "memory.ctx"), "save", errno.ENOTDIR),
    "save: no name": (lambda folder: "", "save", errno.ENOENT),
    "save: a long name": (at("x" * 300), "save", errno.ENAMETOOLONG),
}


@pytest.mark.parametrize("name", PLACES)
def test_place(name, tmp_path):
    place, function, number = PLACES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("content")
    used, path = memory(), place(folder)
    before = {n: x.clone() for n, x in used.tensors.items()}
    with pytest.raises(OSError) as caught:  # noqa: PT011
        getattr(used, function)(path)
    assert caught.value.errno == number and caught.value.filename == path
    assert os.strerror(number) in str(caught.value)
    for key, tensor in used.tensors.items():
        assert_same_bits(tensor, before[key])
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert [entry.name for entry in folder.iterdir()] == ["file"]


# no names of files
PATHS = {
    "None": (None, TypeError, "NoneType"),
    "a number": (3, TypeError, "int"),
    "a list": (["memory.ctx"], TypeError, "list"),
    "a null character": ("memory\0.ctx", ValueError, "memory"),
}


def path_table():
    """Every entry of this file that is about names of files."""
    for name, (path, error, got) in PATHS.items():
        for function in ("save", "load"):

            def call(m, function=function, path=path):
                return getattr(m, function)(path)

            entry = Bad(f"ctx.KVMemory.{function}", "path", error, call, got)
            yield f"{function}: {name}", entry


PATH_TABLE = dict(path_table())


@pytest.mark.parametrize("name", PATH_TABLE)
def test_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used = memory()
    PATH_TABLE[name].refused(used, memory=used.tensors)
    assert not list(tmp_path.iterdir())
