"""Saving replaces a file at once or not at all: when the process is killed at any moment, when the
disk is full, when the target cannot be replaced, and beside whatever earlier deaths left there."""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch

import ctx
import snapshot_files
from strategies import assert_same_bits

# For each number that it reads, a child that saves 200 states, counted from there, and says so.
WRITER = """
    import os
    import sys
    import torch
    import ctx

    torch.set_num_threads(1)  # a child has none of its parent's threads

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())

    path = sys.argv[1]
    memory = ctx.KVMemory(ctx.Schedule(64, 32, 4), 4, 4, 32, max_rewind=8, compressor="mean")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say("begins", os.getpid())
            for number in range(int(line), int(line) + 200):
                for name, tensor in memory.tensors.items():
                    tensor.fill_(0 if name == "rewindable" else number)
                memory.save(path)
                say("saved", number)
            os._exit(0)
        say("ends", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def memory():
    """What the writer's states belong to."""
    return ctx.KVMemory(ctx.Schedule(64, 32, 4), 4, 4, 32, max_rewind=8, compressor="mean")


def number_of(path):
    """The number of the state in a file; it must be one whole state."""
    held = memory()
    held.load(path)
    number = held.seen[0].item()
    for name, tensor in held.tensors.items():
        assert tensor.eq(0 if name == "rewindable" else number).all(), f"{name} is of two states"
    return number


def kill_while_saving(folder, kills, seed):
    """Kills a process that saves at random moments, again and again.

    Returns how many left a part file behind.
    """
    chance, path, script = random.Random(seed), folder / "memory.ctx", folder / "writer.py"
    script.write_text(textwrap.dedent(WRITER))
    memory().save(path)
    held = 0
    with subprocess.Popen(
        [sys.executable, script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:

        def heard():
            word, number = parent.stdout.readline().split()
            return word, int(number)

        for _ in range(kills):
            parent.stdin.write(f"{held + 1}\n")
            begins, child = heard()
            assert begins == "begins"
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            said = held
            while (event := heard())[0] == "saved":
                said = event[1]
            assert event == ("ends", -signal.SIGKILL)
            # The last one that it said, or the next, which it had no time to say.
            held = number_of(path)
            assert held in (said, said + 1)
        parent.stdin.close()
    assert held > 0
    return len(list(folder.glob("*.part")))


def test_killed_20_times(tmp_path):
    kill_while_saving(tmp_path, kills=20, seed=0)


@pytest.mark.slow
def test_killed_200_times(tmp_path):
    halfway = kill_while_saving(tmp_path, kills=200, seed=1)
    print(f"{halfway} of 200 kills left a part file behind")
    assert 0 < halfway <= 200


# --- streams of a session -------------------------------------------------------------------------

STREAMS = 4

# For each number that it reads, a child that takes up the streams from their files; in turns from
# that number on, 400 times, it brings one a token and saves it, and says so.
SERVER = """
    import os
    import sys

    sys.path.insert(0, sys.argv[2])
    import torch
    import test_snapshot_kills as kills

    torch.set_num_threads(1)  # a child has none of its parent's threads
    session = kills.session()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            paths = [os.path.join(sys.argv[1], str(i)) for i in range(kills.STREAMS)]
            ids = [session.load(path) for path in paths]
            os.write(1, f"begins {os.getpid()} 0\\n".encode())
            for turn in range(int(line), int(line) + 400):
                stream = turn % kills.STREAMS
                kills.bring(session, ids[stream], stream)
                session.save(ids[stream], paths[stream])
                os.write(1, f"saved {stream} {session.seen(ids[stream])}\\n".encode())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"ends {status} 0\\n".encode())
"""


def session():
    """Two layers, which compress soon; room for the streams."""
    layer = ctx.KVMemory(ctx.Schedule(8, 4, 2), 1, 2, 16, max_rewind=4, compressor="gated")
    return ctx.Session([layer] * 2, rows=STREAMS)


def bring(session, id, stream):
    """The next token of a stream, the same whenever it comes."""
    made = torch.Generator().manual_seed(1000 * session.seen(id) + stream)
    for layer in range(session.layers):
        session.step([id], layer, *torch.randn(3, 1, 2, 1, 16, generator=made))


def kill_while_saving_streams(folder, kills, seed):
    """Kills a process that saves the streams of a session at random moments, again and again. Each
    must come back bit for bit as it was when it was saved last, or in the save that was cut off.

    Returns how many kills left a part file behind, and how many streams came back in a newer state
    than was said.
    """
    chance, script = random.Random(seed), folder / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    twins, paths = session(), [folder / str(stream) for stream in range(STREAMS)]
    ids = [twins.join() for _ in range(STREAMS)]
    for id, path in zip(ids, paths, strict=True):
        twins.save(id, path)
    newer, reader = 0, session()
    with subprocess.Popen(
        [sys.executable, script, folder, Path(__file__).parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:

        def heard():
            word, *numbers = parent.stdout.readline().split()
            return word, *map(int, numbers)

        for kill in range(kills):
            parent.stdin.write(f"{kill}\n")
            begins, child, _ = heard()
            assert begins == "begins"
            time.sleep(chance.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            said = [twins.seen(id) for id in ids]
            while (event := heard())[0] == "saved":
                said[event[1]] = event[2]
            assert event == ("ends", -signal.SIGKILL, 0)
            for stream, (id, path) in enumerate(zip(ids, paths, strict=True)):
                read = reader.load(path)
                held = reader.seen(read)
                reader.leave(read)
                assert held in (said[stream], said[stream] + 1)
                newer += held - said[stream]
                while twins.seen(id) < held:
                    bring(twins, id, stream)
                assert path.read_bytes() == twins.snapshot(id)
        parent.stdin.close()
    assert sum(map(twins.seen, ids)) > 0
    return len(list(folder.glob("*.part"))), newer


def test_streams_killed_20_times(tmp_path):
    kill_while_saving_streams(tmp_path, kills=20, seed=0)


@pytest.mark.slow
def test_streams_killed_200_times(tmp_path):
    halfway, newer = kill_while_saving_streams(tmp_path, kills=200, seed=1)
    print(f"{halfway} of 200 kills left a part file behind, {newer} streams were newer than said")
    assert 0 < halfway <= 200 and newer <= 200


# --- other ways to fail ---------------------------------------------------------------------------


def fill(number):
    """A memory that holds this number everywhere."""
    made = memory()
    for name, tensor in made.tensors.items():
        tensor.fill_(0 if name == "rewindable" else number)
    return made


def test_left_over_part_files_do_not_matter(tmp_path):
    """Not those of this process's own name, either; they are neither used nor touched."""
    path = tmp_path / "memory.ctx"
    left = [tmp_path / f"memory.ctx.{os.getpid()}.{i}.part" for i in range(2000)]
    for part in left:
        part.write_text("half a state")
    (tmp_path / "memory.ctx.part").mkdir()
    fill(1).save(path)
    fill(2).save(path)
    assert number_of(path) == 2
    assert {part.read_text() for part in left} == {"half a state"}
    assert len(list(tmp_path.iterdir())) == len(left) + 2


def test_full_disk(tmp_path):
    """The old file stays, and nothing is left of the new one."""
    path = tmp_path / "memory.ctx"
    fill(1).save(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, 1000, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match=r"memory\.ctx"):
                fill(2).save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    fill(2).save(path)
    assert number_of(path) == 2


def test_target_that_cannot_be_replaced(tmp_path):
    """A folder in its place stays; what is in it, too."""
    path = tmp_path / "memory.ctx"
    path.mkdir()
    (path / "file").write_text("content")
    with pytest.raises(IsADirectoryError):
        fill(1).save(path)
    assert (path / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def open_folder():
    """A folder that other users may enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody else")
def test_folder_of_somebody_else(open_folder):
    """Where it may not write, it says so; where it may write but not list, it saves."""
    closed, drop = open_folder / "closed", open_folder / "drop"
    for folder, mode in ((closed, 0o755), (drop, 0o733)):
        folder.mkdir()
        fill(1).save(folder / "memory.ctx")
        folder.chmod(mode)
    changed, nobody = fill(2), 65534
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.setgroups([])
            os.setgid(nobody)
            os.setuid(nobody)
            changed.save(drop / "memory.ctx")
            status = 1
            changed.save(closed / "memory.ctx")
        except PermissionError:
            status = 0 if status == 1 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert number_of(drop / "memory.ctx") == 2 and number_of(closed / "memory.ctx") == 1
    assert [entry.name for entry in closed.iterdir()] == ["memory.ctx"]


def test_path_of_every_kind(tmp_path, monkeypatch):
    """Text, bytes and objects; relative, with odd letters, through a link; with fresh content."""
    monkeypatch.chdir(tmp_path)
    link = tmp_path / "link"
    link.symlink_to("memory.ctx")
    for number, path in enumerate(
        ["memory.ctx", b"memory.ctx", tmp_path / "memory.ctx", "ü \udcff\n", "./a'\" b", link], 1
    ):
        fill(number).save(path)
        assert number_of(path) == number
    memory().save("memory.ctx")
    held = snapshot_files.state(Path("memory.ctx").read_bytes())
    assert_same_bits(held["seen"], torch.zeros(4, dtype=torch.int64))
