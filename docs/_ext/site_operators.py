"""The directive `ctx-operators`: every operator of `torch.ops.ctx` with its schema and what each
argument is. An argument without a text, or a text without an argument, is an error.
"""

import torch
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import ctx  # noqa: F401  # registers the operators

SETTINGS = {
    "settings": "what attention is, packed: `ctx.engine.law_of` (C++ `ctx::packed`) makes both "
    "lists of `ctx.AttentionSettings`; the order of the entries is the engine's own",
    "numbers": "the second half of it: frequencies, scale, cap",
}
PAIRS = {
    "q": "queries [B, H, T, D], un-rotated",
    "k": "keys [B, Hkv, T, D], un-rotated unless the settings say that they are given rotated",
    "v": "values [B, Hkv, T, Dv]",
}
PLAN = {"plan": "of this call, from `ctx::plan`: where tokens stand, what queries may see"}
SCORES = {
    "bias": "[H], added to the scores of compressed slots",
    "slopes": "[H], of ALiBi",
    "relative": "none, or the five tensors of `ctx.positions.Relative` in their order",
}
RINGS = "the nine rings of a layer's memory in the order of `ctx.state.TENSORS`"
ATTEND = {
    **PAIRS,
    **PLAN,
    "memory": RINGS + "; none: every row begins here",
    "slots": "slots of the groups that may fall due in the call: keys [B, Hkv, G, D], values "
    "[B, Hkv, G, Dv], and where they count their log-mass and the tokens that they are",
    **SCORES,
    **SETTINGS,
}

ABOUT = {
    "plan": (
        "Where the tokens of a call stand in the streams of their rows, what each query may see, "
        "and which groups may fall due: int64 [B, columns], made once per call and schedule and "
        "shared by all layers that have it.",
        {
            "seen": "int64 [B], tokens that each row has seen",
            "lengths": "int64 [B]: row b brings its first `lengths[b]` tokens; none: all bring T",
            "reset_at": "bool [B, T], true where a token is the first of a new stream",
            "tokens": "T",
            "settings": SETTINGS["settings"],
            "carried": "whether the call goes on from a memory",
            "rows": "int64 [N]: the rows of the memory that the call works on, if not on all",
        },
    ),
    "advance_": (
        "Counts a call at its end, once for all layers.",
        {
            "seen": "the clock; written",
            "rewindable": "how many tokens can be taken back; written",
            **PLAN,
            "max_rewind": "spare entries of the window's rings",
        },
    ),
    "step_": (
        "Streaming: writes the call's pairs into the rings, makes the slots that fall due, and "
        "returns what the queries attend to. Without tokens in `k` and `v` the queries are those "
        "of the last T tokens of the memory, and nothing is written.",
        {
            **PAIRS,
            **PLAN,
            "memory": RINGS + "; written in place",
            "operands": "of the compressor: its parameters, or what it made of the evicted groups",
            **SCORES,
            **SETTINGS,
            "with_region_weights": "also return the share of attention of sinks, slots and window",
        },
    ),
    "append_": (
        "The first half of `step_`: writes pairs and makes slots, without queries.",
        {
            "k": PAIRS["k"],
            "v": PAIRS["v"],
            **PLAN,
            "memory": RINGS + "; written in place",
            "operands": "of the compressor: its parameters, or what it made of the evicted groups",
            **SETTINGS,
        },
    ),
    "evicted_groups": (
        "The un-rotated pairs of the groups that may fall due in a call, [B, Hkv, G, overlap + "
        "c, D]; differentiable in `k` and `v`.",
        {
            "k": PAIRS["k"],
            "v": PAIRS["v"],
            **PLAN,
            "memory": RINGS + "; none: every row begins here",
            **SETTINGS,
        },
    ),
    "evicted_groups_backward": (
        "The gradient of `evicted_groups`.",
        {
            "grad_keys": "of the groups' keys",
            "grad_values": "of the groups' values",
            **PLAN,
            "tokens": "T of the call",
            "dtype": "of the gradients",
            **SETTINGS,
        },
    ),
    "compress": (
        "Slots of groups by one of the engine's compressors; differentiable in everything.",
        {
            "keys": "un-rotated keys of groups [B, Hkv, G, overlap + c, D]",
            "values": "their values [B, Hkv, G, overlap + c, Dv]",
            "parameters": "of the compressor, in the order of `ctx/compressor.h`",
            "compressor": "its name",
            "mass_ratio": "c, where the log-mass of slots is asked for; 0: it is not",
        },
    ),
    "attend": (
        "Attention of T new tokens to a memory and to themselves as a pure function: writes "
        "nothing, differentiable. Also returns the logarithm of the sum of exponentials, [B, H, "
        "T].",
        {
            **ATTEND,
            "with_region_weights": "also return the share of attention of sinks, slots and window",
        },
    ),
    "attend_backward": (
        "The gradient of `attend`.",
        {
            "grad_out": "of the output",
            "grad_logsumexp": "of the second output",
            "out": "what `attend` returned",
            "logsumexp": "its second output",
            **ATTEND,
            "memory_grads": 'also return gradients of the rings (`memory_content="hidden"`)',
        },
    ),
    "rotary": (
        "Rotates the first channels of every head to positions; differentiable in `x`.",
        {
            "x": "[B, heads, T, D]",
            "position": "[B, T], int64 or float64",
            **SETTINGS,
        },
    ),
}


def schemas():
    """{name without namespace: schema} of what is registered."""
    found = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("ctx::")]
    return {schema.name.removeprefix("ctx::"): schema for schema in found}


def check(found, about):
    """What the texts lack and what they have too much, one line each."""
    wrong = [f"operator {name}" for name in sorted(found.keys() ^ about.keys())]
    for name in found.keys() & about.keys():
        taken = {argument.name for argument in found[name].arguments}
        wrong += [
            f"{name}: argument {argument}" for argument in sorted(taken ^ about[name][1].keys())
        ]
    return wrong


def inline(text):
    """A paragraph in which what stands in backticks is code."""
    paragraph = nodes.paragraph()
    for place, part in enumerate(text.split("`")):
        paragraph += nodes.literal(part, part) if place % 2 else nodes.Text(part)
    return paragraph


class Operators(SphinxDirective):
    """A section for each operator."""

    def run(self):
        found = schemas()
        if wrong := check(found, ABOUT):
            raise ExtensionError(
                "site_operators: registered or described, not both: " + "; ".join(wrong)
            )
        return [self.section(name, found[name]) for name in ABOUT]

    def section(self, name, schema):
        about, arguments = ABOUT[name]
        section = nodes.section(ids=[f"operator-{name.rstrip('_')}"], names=[f"operator {name}"])
        section += nodes.title("", f"ctx::{name}")
        section += inline(about)
        text = str(schema)
        section += nodes.literal_block(text, text, language="text", classes=["ctx-schema"])
        items = nodes.definition_list()
        for argument in schema.arguments:
            said = f"{argument.name}: {argument.type}"
            item = nodes.definition_list_item()
            item += nodes.term("", "", nodes.literal(said, said))
            item += nodes.definition("", inline(arguments[argument.name]))
            items += item
        section += items
        self.state.document.note_explicit_target(section, section)
        return section


def setup(app):
    app.add_directive("ctx-operators", Operators)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
