"""A call happened or it did not: interrupted anywhere, it leaves the memory as it was, or refused;
and a memory whose layers share tensors or disagree is refused by name."""

import copy

import pytest
import torch

import ctx
from ctx.memory_rows import leaves
from ctx.state import TENSORS

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}
BEFORE = 17


class StopError(Exception):
    """What a hook raises here."""


def model(**changed):
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 3, "num_heads": 2, **SIZES}
    torch.manual_seed(0)
    built = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def started(built, rows=2):
    memory = built.init_memory(rows)
    with torch.no_grad():
        built(torch.randint(0, 11, (rows, BEFORE)), memory)
    return memory


def interrupt(built, name, after, error, tokens, memory, options):
    """One call with a hook that raises at a module; whether the module was called at all."""

    def hook(*args):
        raise error()

    module = built.get_submodule(name)
    handle = (module.register_forward_hook if after else module.register_forward_pre_hook)(hook)
    try:
        with torch.no_grad():
            built(tokens, memory, **options)
    except error:
        return True
    finally:
        handle.remove()
    return False


def continued(built, tokens, memory):
    """The logits of the next call, or the message that refuses it."""
    try:
        return built(tokens, memory)[0]
    except ValueError as error:
        return str(error)


def same(first, second):
    return all(map(torch.equal, leaves(first), leaves(second)))


# What is changed of the model, tokens of the call, its other arguments, and what is left of it.
LEFT = torch.tensor([[False, True], [True, True]])
RESETS = torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()
CALLS = {
    "a token": ({}, 1, {}, "untouched"),
    "unequal rows": ({}, 3, {"lengths": torch.tensor([3, 1])}, "untouched"),
    "padding on the left": ({}, 2, {"mask": LEFT}, "untouched"),
    "a row without tokens": ({}, 1, {"lengths": torch.tensor([0, 1])}, "untouched"),
    "more than the rings keep": ({"max_rewind": 4}, 40, {}, "either"),
    "hidden content": ({"memory_content": "hidden", "tied": False}, 2, {}, "untouched"),
    "slots by usage": ({"compressor": "most_used"}, 1, {}, "either"),
    "another document": ({}, 3, {"reset_at": RESETS}, "either"),
    "one layer": ({"num_layers": 1, "max_rewind": 4}, 40, {}, "either"),
    "usage of attention": ({"position": "alibi"}, 1, {"return_region_weights": True}, "untouched"),
}


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_happened_or_did_not(call, error):
    changed, length, options, left = CALLS[call]
    built = model(**changed)
    tokens = torch.randint(0, 11, (2, length))
    following = torch.randint(0, 11, (2, 9))
    called, refused = 0, 0
    places = [name for name, _ in built.named_modules()]
    for name in places:
        for after in (False, True):
            memory = started(built)
            before = copy.deepcopy(memory)
            if not interrupt(built, name, after, error, tokens, memory, options):
                continue
            if name == "" and after:  # a hook of the whole runs behind the call: it has happened
                continue
            called += 1
            with torch.no_grad():
                got = continued(built, following, memory)
                wanted, _ = built(following, before)
            if isinstance(got, str):
                assert left == "either" and "memory must" in got and "interrupted" in got
                refused += 1
                continue
            assert torch.equal(got, wanted), (name, after)
            assert all(
                torch.equal(a[one], b[one])
                for a, b in zip(memory, before, strict=True)
                for one in ("seen", "window_keys", "compressed_keys")
            ), (name, after)
    assert called > 10 * built.config.num_layers
    assert (refused > 0) == (left == "either")


def test_a_call_that_was_refused_has_written_nothing():
    """An error of the arguments is no interruption, be it with a reset."""
    built = model()
    memory = started(built)
    before = copy.deepcopy(memory)
    resets = torch.zeros(2, 3, dtype=torch.bool)
    resets[:, 0] = True
    with torch.no_grad(), pytest.raises(ValueError, match="return_aux must go with an aux_loss"):
        built(torch.zeros(2, 3, dtype=torch.int64), memory, reset_at=resets, return_aux=True)
    assert same(memory, before)


def test_reading_and_training_leave_the_memory_alone():
    built = model()
    memory = started(built)
    before = copy.deepcopy(memory)
    tokens = torch.randint(0, 11, (2, 40))
    handle = built.blocks[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built(tokens, memory)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        built(tokens, memory, update=False)
    handle.remove()
    assert same(memory, before)


def test_generation_that_is_interrupted_goes_on():
    """Whatever was drawn before, the memory holds it, and nothing of the call that failed."""
    built = model()
    prompt = torch.randint(0, 11, (1, 9))
    whole = built.generate(prompt, 8, temperature=0)
    memory = built.init_memory(1)
    stream = built.stream(prompt, 8, temperature=0, memory=memory)
    drawn = [next(stream) for _ in range(3)]
    handle = built.blocks[2].mlp.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    handle.remove()
    assert memory.seen.item() == 9 + 2
    rest = built.generate(drawn[-1][:, None], 5, temperature=0, memory=memory)
    assert torch.equal(torch.cat([*(one[:, None] for one in drawn), rest], 1), whole)


@pytest.mark.parametrize("grad", [True, False])
class TestRefused:
    def call(self, grad, built, memory, message, error=ValueError):
        before = copy.deepcopy(memory)
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message) as caught:
            built(torch.zeros(2, 1, dtype=torch.int64), memory)
        assert str(caught.value).startswith("ctx.CompressiveTransformer.forward: ")
        assert same(memory, before)

    def spoiled(self, memory, rings):
        """The same with other tensors."""
        return ctx.Memory(memory.spec, memory.seen, memory.rewindable, rings)

    def test_one_layer_for_several(self, grad):
        built = model()
        memory = started(built)
        rings = [memory.rings[0], memory.rings[1], memory.rings[0]]
        message = "got window_keys of layer 0 as window_keys of layer 2"
        self.call(grad, built, self.spoiled(memory, rings), message)

    @pytest.mark.parametrize("name", ["window_values", "compressed_keys"])
    def test_one_tensor_for_several_layers(self, grad, name):
        built = model()
        memory = started(built)
        for shared in (memory[1][name], memory[1][name].view_as(memory[1][name])):  # one storage
            rings = [list(ring) for ring in memory.rings]
            rings[2][TENSORS.index(name)] = shared
            message = f"got {name} of layer 1 as {name} of layer 2"
            self.call(grad, built, self.spoiled(memory, rings), message)

    def test_one_tensor_twice_in_a_layer(self, grad):
        built = model()
        memory = started(built)
        rings = [list(ring) for ring in memory.rings]
        rings[1][1] = rings[1][0]
        message = "got window_keys of layer 1 as window_values of layer 1"
        self.call(grad, built, self.spoiled(memory, rings), message)

    def test_one_tensor_as_both_counters(self, grad):
        built = model()
        memory = started(built)
        twice = ctx.Memory(memory.spec, memory.seen, memory.seen, memory.rings)
        self.call(grad, built, twice, "got seen.* as rewindable")

    def test_tensors_without_elements_may_be_shared(self, grad):
        built = model(compressed=0)
        memory = built.init_memory(2)
        rings = [list(ring) for ring in memory.rings]
        for name in ("compressed_keys", "attention_received"):
            rings[1][TENSORS.index(name)] = rings[0][TENSORS.index(name)]
        with torch.set_grad_enabled(grad):
            built(torch.zeros(2, 1, dtype=torch.int64), self.spoiled(memory, rings))

    def test_an_open_memory(self, grad):
        """Until it is reset; rows are reset one by one."""
        built = model()
        memory = started(built)
        memory.rewindable[1] = -1
        self.call(grad, built, memory, "memory must be what a call left that ended")
        memory.reset(0)
        self.call(grad, built, memory, "memory must be what a call left that ended")
        with pytest.raises(ValueError, match="take back = -1"):
            memory.rewind(torch.tensor([0, 1]))
        memory.reset(1)
        with torch.set_grad_enabled(grad):
            built(torch.zeros(2, 1, dtype=torch.int64), memory)

    def test_a_list_of_memories(self, grad):
        built = model()
        memory = started(built)
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=r"must be a ctx\.Memory"):
            built(torch.zeros(2, 1, dtype=torch.int64), list(memory))


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_generation_refuses_at_once(method):
    built = model()
    with pytest.raises(TypeError, match=f"{method}: memory must be a ctx.Memory or None, got list"):
        getattr(built, method)(
            torch.zeros(1, 1, dtype=torch.int64), 2, memory=[built.init_memory(1)] * 3
        )
