"""The C++ modules against Python's: weights saved here are loaded there, and outputs, memories,
losses and trained weights are compared. One program, tests/cpp_modules, runs all cases.
"""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ctx
from programs import run
from strategies import assert_same_bits

safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).resolve().parent / "cpp_modules"
SIZES = {"window": 5, "compressed": 3, "ratio": 2, "segment": 4, "sinks": 1}
LAYER = {"embed_dim": 24, "num_heads": 4, "num_kv_heads": 2, "max_rewind": 7, **SIZES}
MODEL = {"vocab_size": 19, "num_layers": 2, **LAYER}
SETTINGS = {name: f.default for name, f in ctx.AttentionSettings.__dataclass_fields__.items()}

# Every compressor with everything else as usual; then what else there is to choose, one by one.
CASES = {
    **{f"model-{name}": {**MODEL, "compressor": name} for name in ctx.compression.COMPRESSORS},
    **{f"layer-{name}": {**LAYER, "compressor": name} for name in ctx.compression.COMPRESSORS},
    "relative": {**MODEL, "position": "relative", "relative_dim": 6},
    "alibi": {**MODEL, "position": "alibi", "compressed_bias": "log_ratio", "num_heads": 6},
    "no-position": {**MODEL, "position": None, "compressed_bias": "none"},
    "token-distance": {**MODEL, "distance": "token", "rotary_dim": 4, "rotary_interleaved": True},
    "most_used-token": {**MODEL, "compressor": "most_used", "distance": "token"},
    "constant-slots": {**MODEL, "compressor_grad": "aux", "rotary_base": 500.0},
    "kernel": {**MODEL, "compressor_kernel": 3, "compressed_bias_init": -1.0},
    "by-layer": {**MODEL, "window": [5, 0], "compressed": [3, 6], "ratio": [2, 4], "sinks": [0, 2]},
    "untied": {**MODEL, "tied": False, "norm": "layer", "mlp": "gelu", "bias": True},
    "inner-width": {**MODEL, "mlp_dim": 20, "norm": "layer", "num_kv_heads": None},
    "dropout": {**MODEL, "dropout": 0.2},
    "usual-segment": {
        **LAYER,
        "segment": None,
        "bias": True,
        "dropout": 0.1,
        "compressor": "gated",
    },
    "mass": {**LAYER, "slot_mass": True, "compressor": "gated", "logit_softcap": 3.0},
    "mass-most_used": {**LAYER, "slot_mass": True, "compressor": "most_used"},
    "frequencies": {**LAYER, "inv_freq": (0.5, 0.1, 0.01), "attention_factor": 1.25, "scale": 0.3},
}
STEPS, STEP_SIZE, ROWS, TOKENS = 10, 0.1, 3, 60


def in_settings(options):
    """The options of a layer, those of `ctx.AttentionSettings` as one where some are its alone."""
    alone = {"slot_mass", "logit_softcap", "inv_freq", "attention_factor", "scale"}
    if not alone & options.keys():
        return options
    sizes = {name: options[name] for name in SIZES}
    within = {name: x for name, x in options.items() if name in SETTINGS}
    settings = ctx.AttentionSettings(
        **{"schedule": ctx.Schedule(**sizes), "compressed_bias": "learned", **within}
    )
    others = {name: x for name, x in options.items() if name not in {*sizes, *within}}
    return {"settings": settings, **others}


def build(options, seed):
    torch.manual_seed(seed)
    if "num_layers" in options:
        config = ctx.CompressiveTransformerConfig(**options)
        return ctx.CompressiveTransformer(config)
    return ctx.CompressiveAttention(**in_settings(options))


def as_plain(options):
    """Settings as a snapshot holds them, without those that are left to their defaults."""
    plain = {"position": "none"} if options.get("position", "") is None else {}
    for name, value in options.items():
        if isinstance(value, bool):
            plain[name] = int(value)
        elif isinstance(value, (list, tuple)):
            dtype = torch.float64 if isinstance(value[0], float) else torch.int64
            plain[name] = torch.tensor(value, dtype=dtype)
        elif value is not None:
            plain[name] = value
    return plain


def in_pieces(module, x, sizes, memory):
    made = []
    for piece in x.split(sizes, 1):
        y, memory = module(piece, memory)
        made.append(y.detach())
    return torch.cat(made, 1), memory


def loss_of(output, piece):
    if piece.is_floating_point():
        return (output - piece.roll(1, 1)).square().mean()
    return F.cross_entropy(output.flatten(0, 1), piece.roll(-1, 1).flatten())


def train(module, x):
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), STEP_SIZE, momentum=0.9)
    memory, losses = None, []
    for piece in x.chunk(STEPS, 1):
        y, memory = module(piece, memory)
        loss = loss_of(y, piece)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), memory


def everything(module, given):
    """What tests/cpp_modules/main.cpp does, of a module with its weights."""
    module.eval()
    x, out = given["x"], {"names": "".join(f"{name}\n" for name in module.state_dict())}

    def keep(name, memory):
        tensors = [*(ring for rings in memory.rings for ring in rings), *memory.clock]
        out.update({f"{name}.{i}": tensor.clone() for i, tensor in enumerate(tensors)})

    with torch.no_grad():
        memory = module.init_memory(len(x))
        out["streamed"], memory = in_pieces(module, x, given["cuts"].tolist(), memory)
        keep("streamed", memory)
        rows = {"lengths": given["lengths"], "reset_at": given["reset_at"]}
        out["packed"], memory = module(x, memory, **rows)
        keep("packed", memory)
        out["read"], _ = module(x, memory, **rows, update=False)
    out["differentiable"], memory = in_pieces(module, x, [TOKENS // 2, TOKENS // 2], None)
    keep("differentiable", memory)
    torch.manual_seed(given["seed"])
    out["losses"], memory = train(module, x)
    keep("trained", memory)
    return out


def saved(module, number):
    """A state dict in the ways in which weights are saved."""
    state = module.state_dict()
    checkpoint = {
        "format": "ctx-checkpoint",
        "settings": {"steps": 70_000, "rate": 1e-3, "files": ["a", "b"], "compare": False},
        "weights": state,
        "version": 1,  # a name that state dicts have, too
        "optimizer": {"state": {0: {"step": torch.ones(2)}}, "groups": [{"params": [0, 1]}]},
        "memory": None,
    }
    return (state, dict(state), checkpoint)[number % 4]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    folder = tmp_path_factory.mktemp("cpp_modules")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", SOURCE, "-B", folder, *ninja, f"-DCMAKE_PREFIX_PATH={ctx.cmake_prefix_path}")
    run("cmake", "--build", folder)
    return folder / "cpp_modules"


@pytest.fixture(scope="module")
def results(program, tmp_path_factory):
    """{case: (what Python gives, what C++ gives)}, both with `first` and `weights`, state dicts."""
    folder, here = tmp_path_factory.mktemp("cases"), {}
    for number, (name, options) in enumerate(CASES.items()):
        path, module = folder / str(number), build(options, seed=number)
        first = {key: x.clone() for key, x in module.state_dict().items()}
        with torch.no_grad():  # random everywhere, also what starts as zeros
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        if number % 4 == 3:
            safetensors.save_file(module.state_dict(), f"{path}.weights")
        else:
            torch.save(saved(module, number), f"{path}.weights")
        if "num_layers" in options:
            x = torch.randint(options["vocab_size"], (ROWS, TOKENS))
        else:
            x = torch.randn(ROWS, TOKENS, options["embed_dim"])
        given = {
            "x": x,
            "cuts": torch.tensor([1, 9, 4, 0, 23, 23]),
            "lengths": torch.tensor([TOKENS, 11, 0]),
            "reset_at": torch.rand(ROWS, TOKENS) < 0.05,
            "seed": number,
            "step_size": STEP_SIZE,
        }
        torch.save({**as_plain(options), **given}, f"{path}.case")
        here[name] = {"first": first, **everything(module, given)}
        here[name]["weights"] = module.state_dict()
    run(program, folder, len(CASES), env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = {}
    for number, name in enumerate(CASES):
        there = torch.load(folder / f"{number}.out", weights_only=True)
        there["names"] = (folder / f"{number}.names").read_text()
        there["first"] = torch.load(folder / f"{number}.first", weights_only=True)
        there["weights"] = torch.load(folder / f"{number}.trained", weights_only=True)
        found[name] = here[name], there
    return found


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_names_and_first_values(results, case):
    """Parameters are called alike, in the same order, and start alike from the same seed."""
    here, there = results[case]
    assert there["names"] == here["names"]
    assert there["first"].keys() == here["first"].keys()
    for name, want in here["first"].items():
        assert_same_bits(there["first"][name], want)


@every_case
@pytest.mark.parametrize("way", ["streamed", "packed", "read", "differentiable"])
def test_outputs(results, case, way):
    here, there = results[case]
    torch.testing.assert_close(there[way], here[way], rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize("way", ["streamed", "packed", "differentiable", "trained"])
def test_memories(results, case, way):
    """What is counted is the same bit for bit: the clock, and which tokens slots are."""
    here, there = results[case]
    names = sorted(name for name in here if name.startswith(f"{way}."))
    assert names == sorted(name for name in there if name.startswith(f"{way}."))
    for name in names:
        if here[name].dtype == torch.int64:
            assert_same_bits(there[name], here[name])
        else:
            torch.testing.assert_close(there[name], here[name], rtol=0, atol=1e-6)
    assert here[f"{way}.{len(names) - 2}"].dtype == torch.int64  # seen


@every_case
def test_training(results, case):
    """Ten steps: losses and weights."""
    here, there = results[case]
    assert there["losses"].shape == (STEPS,)
    torch.testing.assert_close(there["losses"], here["losses"], rtol=0, atol=1e-6)
    assert there["weights"].keys() == here["weights"].keys()
    for name, want in here["weights"].items():
        torch.testing.assert_close(there["weights"][name], want, rtol=0, atol=1e-6)


def test_streaming_is_the_differentiable_function(results):
    """The comparison above is not one of two wrong answers: ways that must agree do."""
    for here, there in results.values():
        for one in (here, there):
            torch.testing.assert_close(one["streamed"], one["differentiable"], rtol=0, atol=1e-5)


def test_state_dicts_of_all_kinds(program, tmp_path):
    """Views, other dtypes, tensors that share a storage, none at all."""
    whole = torch.arange(24.0).view(4, 6)
    state = {
        "bfloat16": whole.bfloat16(),
        "empty": torch.zeros(0, 3),
        "int64": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "view": whole[1:, ::2],
        "whole": whole,
    }
    torch.save(state, tmp_path / "weights")
    lines = run(program, "read", tmp_path / "weights").splitlines()
    want = [f"{name} {[*x.shape]} {x.double().sum():g}" for name, x in state.items()]
    assert lines == want


def with_records(path, change):
    """An archive of torch.save with other records of whole checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


DAMAGES = {
    "data that are too short": lambda name, x: x[:-8] if name.endswith("data/0") else x,
    "another class": lambda name, x: x.replace(b"OrderedDict", b"OrderedSets"),
    "another attribute": lambda name, x: x.replace(b"_metadata", b"_elsewhat"),
    "a pickle that ends": lambda name, x: x[:-30] if name.endswith("data.pkl") else x,
    "an empty pickle": lambda name, x: b"" if name.endswith("data.pkl") else x,
    "a length beyond the end": lambda name, x: x.replace(b"\6\0\0\0weight", b"\6\0\0\xffweight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_foreign_archives_are_refused(program, tmp_path, damage):
    path = tmp_path / "weights"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    assert run(program, "read", path).splitlines()[1].startswith("weight [2, 3] ")
    before = path.read_bytes()
    with_records(path, DAMAGES[damage])
    assert path.read_bytes() != before
    said = run(program, "read", path)
    assert said == (
        f"ctx.read_state_dict: path must be a state dict, got a damaged or foreign file: {path}\n"
    )
