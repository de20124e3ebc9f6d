"""Generation that ends early: rows that have stopped repeat their last token and read no more."""

import numpy
import pytest
import torch

import ctx

VOCABULARY = 12


def model():
    torch.manual_seed(0)
    sizes = {"window": 6, "compressed": 4, "ratio": 2, "segment": 4}
    settings = {"vocab_size": VOCABULARY, "embed_dim": 16, "num_layers": 2, "num_heads": 2, **sizes}
    built = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**settings))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


def prompts(rows=5, length=9):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def cut(whole, ids):
    """What generation with a stop gives, from one without: [B, n], and how many a row drew."""
    counts = []
    for row in whole.tolist():
        ends = [i for i, token in enumerate(row) if token in ids]
        counts.append(ends[0] + 1 if ends else len(row))
    wanted = whole.clone()
    for row, count in enumerate(counts):
        wanted[row, count:] = whole[row, count - 1]
    return wanted[:, : max(counts)], counts


STOPS = {
    "a token": (3, {3}),
    "a NumPy token": (numpy.int64(3), {3}),
    "several": ([3, 7], {3, 7}),
    "a tuple": ((7,), {7}),
    "a tensor": (torch.tensor([3, 7]), {3, 7}),
    "an array": (numpy.array([3, 7]), {3, 7}),
    "a callable": (lambda drawn: (drawn == 3) | (drawn == 7), {3, 7}),
    "never": (lambda drawn: torch.zeros_like(drawn, dtype=torch.bool), set()),
    "at once": (range(VOCABULARY), set(range(VOCABULARY))),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("name", STOPS)
def test_rows_end_and_the_others_go_on(name, method, padded):
    """Every row is as without a stop up to its own, and its memory holds all but the newest."""
    stop, ids = STOPS[name]
    built, text = model(), prompts()
    lengths = torch.tensor([9, 1, 4, 9, 2]) if padded else None
    # Row by row: numbers of a row do not depend on what others draw. The global draws do.
    for settings in ({"temperature": 0}, {"seed": 5}):
        whole = built.generate(text, 12, lengths=lengths, **settings)
        wanted, counts = cut(whole, ids)
        memory = built.init_memory(5)
        options = {"stop": stop, "memory": memory, "lengths": lengths, **settings}
        drawn = getattr(built, method)(text, 12, **options)
        drawn = drawn if method == "generate" else torch.stack(list(drawn), 1)
        assert torch.equal(drawn, wanted)
        begun = [9] * 5 if lengths is None else lengths.tolist()
        held = [a + b - 1 for a, b in zip(begun, counts, strict=True)]
        for layer in memory:
            assert layer["seen"].tolist() == held
        # The memory of a row is that of the row alone, fed with what it drew.
        for row in (0, 1):
            alone = built.init_memory(1)
            with torch.no_grad():
                built(text[row : row + 1, : begun[row]], alone)
                built(drawn[row : row + 1, : counts[row] - 1], alone)
            for mine, other in zip(memory, alone, strict=True):
                keys = mine["window_keys"][row], other["window_keys"][0]
                torch.testing.assert_close(*keys, atol=1e-5, rtol=1e-5)


def test_the_callable_gets_what_was_drawn_and_may_write_to_it():
    built, seen = model(), []

    def stop(drawn):
        assert drawn.dtype == torch.int64 and drawn.shape == (5,)
        seen.append(drawn.clone())
        drawn.zero_()
        return torch.zeros(5, dtype=torch.bool)

    out = built.generate(prompts(), 4, temperature=0, stop=stop)
    assert torch.equal(torch.stack(seen, 1), out)


@pytest.mark.parametrize(
    "stop, error, message",
    [
        ("x", TypeError, "stop must be a token, a list of tokens or a callable, got 'x'"),
        (1.5, TypeError, "stop must be a token, .* got 1.5"),
        (True, TypeError, "stop must be a token, .* got True"),
        ([1, "x"], TypeError, "stop must be a token, .* got 'x'"),
        (torch.ones(2), TypeError, "stop must be a token, .* got a tensor torch.float32"),
        (-1, ValueError, r"stop must be tokens in \[0, 12\), got -1"),
        ([3, 12], ValueError, r"stop must be tokens in \[0, 12\), got 12"),
        ([], ValueError, "stop must name at least one token, got none"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_wrong_stops_are_refused_at_once(method, stop, error, message):
    built = model()
    memory = built.init_memory(5)
    with pytest.raises(error, match=f"^ctx.CompressiveTransformer.{method}: {message}"):
        getattr(built, method)(prompts(), 2, stop=stop, memory=memory)
    assert memory[0]["seen"].tolist() == [0] * 5


@pytest.mark.parametrize("said", [True, None, torch.zeros(5), torch.zeros(4, dtype=torch.bool)])
def test_a_callable_that_says_something_else(said):
    with pytest.raises(TypeError, match=r"stop must return bool \[B\] = \[5\], got"):
        model().generate(prompts(), 2, stop=lambda drawn: said)


def test_grad_mode_does_not_leak_across_a_yield():
    built = model()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            for token in built.stream(prompts(), 3, stop=lambda x: x < 0, temperature=0):
                assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
                assert token.shape == (5,)
