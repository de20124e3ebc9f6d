"""A model's call with `update=False` reads its memory, and with `last_only` gives what generation
needs: the same numbers as without."""

import contextlib
import copy

import pytest
import torch

import ctx
from pairwise import pairwise

MODELS = {
    "rotary": {},
    "relative, gated": {"position": "relative", "compressor": "gated"},
    "alibi, by token": {"position": "alibi", "distance": "token", "compressor": "mean"},
    "by usage": {"compressor": "most_used", "position": None},
    "hidden, untied": {"memory_content": "hidden", "tied": False, "compressor_grad": "aux"},
    "no slots": {"compressed": [0, 3], "norm": "layer"},
}
ROWS = {
    "all": {},
    "lengths": {"lengths": torch.tensor([11, 0, 7])},
    "mask": {"mask": torch.arange(11) >= torch.tensor([[0], [11], [4]])},
    "resets": {"reset_at": torch.arange(11).expand(3, 11) == torch.tensor([[3], [0], [10]])},
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def model(changed, **more):
    torch.manual_seed(0)
    sizes = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2, **sizes}
    settings = {**settings, **changed, **more}
    built = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**settings)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


@pytest.mark.parametrize("changed, rows, mode", pairwise(MODELS, ROWS, MODES))
def test_reading_is_writing_without_the_writing(changed, rows, mode):
    aux = {} if changed == "by usage" else {"aux_loss": "reconstruction"}
    built = model(MODELS[changed], **aux)
    asked = {"return_region_weights": True, "return_aux": bool(aux) and rows != "resets"}
    with torch.no_grad():
        _, memory = built(torch.randint(0, 11, (3, 23)))
    tokens, before = torch.randint(0, 11, (3, 11)), copy.deepcopy(memory)
    with MODES[mode]():
        got, returned, *more = built(tokens, memory, update=False, **asked, **ROWS[rows])
        assert returned is memory
        for layer, old in zip(memory, before, strict=True):
            assert layer.spec == old.spec
            assert all(torch.equal(layer[name], old[name]) for name in old.tensors)
        wanted, _, *others = built(tokens, copy.deepcopy(before), **asked, **ROWS[rows])
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    for mine, other in zip(more, others, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)
    if mode == "grad":
        weights = torch.randn_like(got)
        mine, other = (
            torch.autograd.grad((x * weights).sum(), [*built.parameters()], allow_unused=True)
            for x in (got, wanted)
        )
        for a, b in zip(mine, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_without_a_memory_there_is_none(mode):
    built, tokens = model({}), torch.randint(0, 11, (3, 11))
    with MODES[mode]():
        got, memory = built(tokens, update=False)
        assert memory is None
        torch.testing.assert_close(got, built(tokens)[0])


@pytest.mark.parametrize("changed, rows, length", pairwise(MODELS, ROWS, [0, 1, 11]))
def test_last_only_is_the_last_of_all(changed, rows, length):
    built = model(MODELS[changed])
    tokens = torch.randint(0, 11, (3, length))
    options = dict(ROWS[rows])
    for name in ("mask", "reset_at"):
        if name in options:
            options[name] = options[name][:, 11 - length :]
    if "lengths" in options:
        options["lengths"] = options["lengths"].clamp_max(length)
    counts = options["mask"].sum(1) if "mask" in options else options.get("lengths")
    counts = torch.full((3,), length) if counts is None else counts
    place = torch.arange(length).expand(3, length)
    tokens_at = options.get("mask", place < counts[:, None])
    for update in (True, False):
        every, _ = built(tokens, update=update, **options)
        last, memory = built(tokens, last_only=True, update=update, **options)
        assert last.shape == (3, 11) and (memory is None) == (not update)
        for row in range(3):
            at = tokens_at[row].nonzero()
            wanted = every[row, at[-1, 0]] if len(at) else torch.zeros(11, dtype=last.dtype)
            torch.testing.assert_close(last[row], wanted)
    grads = torch.autograd.grad(last.sum(), [*built.parameters()], allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in grads)


@pytest.mark.parametrize("name", ["update", "last_only"])
def test_what_is_no_flag_is_refused(name):
    message = rf"^ctx.CompressiveTransformer.forward: {name} must be a bool, got 1"
    with pytest.raises(TypeError, match=message):
        model({})(torch.zeros(1, 1, dtype=torch.int64), **{name: 1})


def test_what_was_checked_is_trusted_for_one_call_only():
    """A layer checks what a call of the model that was given up, or never ran, left behind."""
    built, tokens = model({}), torch.zeros(2, 3, dtype=torch.int64)
    x = torch.zeros(2, 1, 16, dtype=torch.float64)
    ways = {
        "stream": lambda memory: built.stream(tokens, 2, memory=memory),
        "an error": lambda memory: built(tokens, memory, return_aux=True),
        "a hook": lambda memory: built(tokens, memory),
    }
    for name, way in ways.items():
        memory = built.init_memory(2)
        hook = built.embedding.register_forward_hook(lambda *_: 1 / 0)
        with torch.no_grad(), contextlib.suppress(ValueError, ZeroDivisionError):
            way(memory)
        hook.remove()
        memory[0]["rewindable"].fill_(5)
        with torch.no_grad(), pytest.raises(ValueError, match="rewindable must be between 0 and"):
            built.layers[0](x, memory[0])
        assert not memory[0]["seen"].any(), name
