"""A process that is killed in the middle of a model's call leaves a memory in shared memory, or in
a mapped file, from which another process continues exactly, or which is refused by name."""

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import ctx

CALLS = {
    "a token": ({}, 1, {}),
    "a few tokens": ({}, 9, {"lengths": torch.tensor([9, 4])}),
    "more than the rings keep": ({"max_rewind": 4}, 23, {}),
    "slots by usage": ({"compressor": "most_used"}, 2, {}),
    "another document": ({}, 3, {"reset_at": torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()}),
}


def model(**changed):
    torch.manual_seed(0)
    sizes = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 4, "num_heads": 2, **sizes}
    return ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))


def mapped(memory, folder):
    """The same memory in files that processes share."""

    def moved(x):
        if not x.numel():
            return x
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        made = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype)
        return made.view(x.shape).copy_(x)

    return pytree.tree_map(moved, memory)


def shared(memory, folder):
    """The same memory in the system's shared memory."""
    return pytree.tree_map(lambda x: x.clone().share_memory_(), memory)


def kill_in_calls(kills, seed):
    """Prints how often the memory continued, and how often it was refused."""
    torch.set_num_threads(1)  # a child has none of its parent's threads
    chance, found = random.Random(seed), {"continued": 0, "refused": 0}
    built = {call: model(**changed) for call, (changed, _, _) in CALLS.items()}
    for kill in range(kills):
        call, place = chance.choice(sorted(CALLS)), chance.choice([mapped, shared])
        _, length, options = CALLS[call]
        run = built[call]
        modules = [module for name, module in run.named_modules() if name]
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(kill)
            _, before = run(torch.randint(0, 11, (2, 17)), run.init_memory(2))
            held, tokens = place(before, folder), torch.randint(0, 11, (2, length))
            child = os.fork()
            if child == 0:
                module = chance.choice(modules)
                die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                chance.choice([
                    module.register_forward_hook, module.register_forward_pre_hook,
                ])(die)  # fmt: skip
                run(tokens, held, **options)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            following = torch.randint(0, 11, (2, 5))
            if not died:  # the module has not been called: the call has happened
                run(tokens, before, **options)
            wanted, _ = run(following, before)
            if int(held.rewindable.min()) < 0:
                assert died and call not in ("a token", "a few tokens"), call
                with pytest.raises(ValueError, match="memory must be what a call left that ended"):
                    run(following, held)
                found["refused"] += 1
            else:
                assert torch.equal(run(following, held)[0], wanted), (kill, call, place.__name__)
                found["continued"] += 1
    print(found["continued"], found["refused"])


def run_kills(kills, seed):
    code = f"import test_memory_kills as it; it.kill_in_calls({kills}, {seed})"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def test_killed_40_times():
    continued, refused = run_kills(40, seed=0)
    assert continued + refused == 40 and continued > 10 and refused > 5


@pytest.mark.slow
def test_killed_500_times():
    continued, refused = run_kills(500, seed=1)
    assert continued + refused == 500
    print(f"{continued} of 500 killed calls had not happened or had ended, {refused} were refused")
