"""The house rules that a compiler does not check: which file may include or import which, what is
listed, and what is written in two places.

Every rule is a function of made-up files too, so that a test shows that it can fail.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import ctx
from ctx import reference

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


def read(folder, *suffixes):
    """{path below the folder: text} of all files with one of the suffixes."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


# --- C++: bindings -> core -> ops <- kernels -> schedule.h ----------------------------------------

# The first pattern that fits is the layer of a file.
LAYERS = {
    "law": r"include/ctx/(schedule|export)\.h",
    "modules": r"include/ctx/(modules|attention_module|transformer)\.h",  # torch::nn's are large
    "api": r"include/ctx/",
    "check": r"ops/check\.h",  # how messages are made; for everyone who checks
    "seam": r"ops/(kernels|plan_layout)\.h",
    "registry": r"ops/registry\.h",
    "core": r"core/",
    "ops": r"ops/",
    "cuh": r"kernels/cuda/.*\.cuh",
    "cpu": r"kernels/cpu/",
    "cuda": r"kernels/cuda/",
    "bindings": r"bindings/",
}
OURS = {
    "law": {"law"},
    "modules": {"modules", "api", "law"},
    "api": {"api", "law"},
    "check": set(),
    "seam": {"law", "seam"},
    "registry": {"law", "seam"},
    "core": {"core", "modules", "api", "law", "check", "ops", "seam", "registry"},
    "ops": {"ops", "law", "check", "seam", "registry"},
    "cuh": {"cuh", "law", "seam"},
    "cpu": {"cpu", "law", "seam"},
    "cuda": {"cuda", "cuh", "law", "seam"},
    "bindings": {"bindings", "api", "law"},
}
# A device's kernels enter themselves: the file that does so sees the registry.
REGISTERS = {"registry", "check"}

# Of other people's headers, the standard library's apart.
CUDA = r"cuda\w*\.h|cuda/|cub/|mma\.h|cooperative_groups"
THEIRS = {
    "law": None,
    "modules": r"ATen/(?!cuda)|c10/(?!cuda)|torch/nn/",
    "api": r"ATen/(?!cuda)|c10/(?!cuda)",
    "check": r"c10/util/",
    "seam": None,
    "registry": r"c10/core/",
    # core writes files whole, and reads archives that may be damaged.
    "core": r"ATen/(?!cuda)|c10/(?!cuda)|torch/|caffe2/serialize/|(fcntl|unistd|sys/mman)\.h",
    "ops": r"ATen/(?!cuda)|c10/(?!cuda)|torch/",
    "cuh": CUDA,
    "cpu": r"ATen/Parallel\.h|ATen/cpu/|c10/util/|immintrin\.h",
    "cuda": rf"{CUDA}|ATen/cuda/|c10/",
    "bindings": r"",
}
PYTHON = r"Python\.h|pybind11/|torch/(extension|python)\.h|torch/csrc/(Exceptions|utils/|.*python)"


def layer_of(path):
    return next((name for name, pattern in LAYERS.items() if re.match(pattern, path)), None)


def against_the_arrows(files):
    """What is wrong with the files of csrc, {path: text}, one line each."""
    wrong = []
    for path, text in files.items():
        layer = layer_of(path)
        if layer is None:
            wrong.append(f"{path}: belongs to no layer")
            continue
        ours = OURS[layer] | (REGISTERS if "register_kernels(" in text else set())
        for quote, name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)', text, re.M):
            if quote == '"':
                target = next((p for p in (name, f"include/{name}") if p in files), None)
                if target is None:
                    wrong.append(f"{path}: {name} is not a file of ours")
                elif layer_of(target) not in ours:
                    wrong.append(f"{path}: {layer} must not include {name}")
            elif re.fullmatch(r"[a-z0-9_]+", name):
                pass  # the standard library
            elif re.match(PYTHON, name) and layer != "bindings":
                wrong.append(f"{path}: only bindings include Python, got {name}")
            elif THEIRS[layer] is None or not re.match(THEIRS[layer], name):
                wrong.append(f"{path}: {layer} must not include {name}")
        if "TORCH_LIBRARY" in text and layer != "ops":
            wrong.append(f"{path}: operators are registered in ops")
        if re.search(r"^\s*#\s*(el)?if.*CUDA", text, re.M) and layer not in ("law", "cuda", "cuh"):
            wrong.append(f"{path}: no #if of CUDA outside its kernels")
    return wrong


def test_arrows_of_csrc():
    files = read(CSRC, ".h", ".cpp", ".cuh", ".cu")
    assert len(files) > 20
    assert against_the_arrows(files) == []


MADE_UP = dict.fromkeys(
    [
        *("include/ctx/schedule.h", "include/ctx/memory.h", "ops/check.h", "ops/kernels.h"),
        *("ops/registry.h", "ops/memory.h", "kernels/cpu/vec.h", "kernels/cuda/tile.cuh"),
        "include/ctx/transformer.h",
    ],
    "",
)


@pytest.mark.parametrize(
    "path, line",
    [
        ("bindings/module.cpp", '#include "ops/memory.h"'),
        ("core/memory.cpp", '#include "kernels/cpu/vec.h"'),
        ("core/memory.cpp", "#include <pybind11/pybind11.h>"),
        ("core/memory.cpp", "#include <ATen/cuda/CUDAContext.h>"),
        ("core/memory.cpp", "TORCH_LIBRARY_FRAGMENT(ctx, m) {}"),
        ("include/ctx/memory.h", '#include "ops/kernels.h"'),
        ("include/ctx/memory.h", "#include <torch/library.h>"),
        ("include/ctx/memory.h", '#include "ctx/transformer.h"'),
        ("include/ctx/transformer.h", "#include <torch/torch.h>"),
        ("include/ctx/transformer.h", '#include "ops/memory.h"'),
        ("include/ctx/schedule.h", '#include "ctx/memory.h"'),
        ("include/ctx/schedule.h", "#include <ATen/ATen.h>"),
        ("kernels/cpu/attend.cpp", '#include "ops/memory.h"'),
        ("kernels/cpu/attend.cpp", '#include "ops/registry.h"'),
        ("kernels/cpu/attend.cpp", '#include "ops/check.h"'),
        ("kernels/cpu/attend.cpp", '#include "kernels/cuda/tile.cuh"'),
        ("kernels/cpu/attend.cpp", "#include <ATen/ATen.h>"),
        ("kernels/cuda/attend.cu", '#include "kernels/cpu/vec.h"'),
        ("kernels/cuda/attend.cu", "#include <torch/library.h>"),
        ("kernels/cuda/attend.cuh", "#include <c10/util/Half.h>"),
        ("kernels/metal/attend.cpp", ""),
        ("ops/kernels.h", "  #  include <ATen/ATen.h>"),
        ("ops/memory.cpp", '#include "ctx/memory.h"'),
        ("ops/memory.cpp", '#include "kernels/cpu/vec.h"'),
        ("ops/memory.cpp", '#include "memory.h"'),
        ("ops/memory.cpp", "#include <torch/extension.h>"),
        ("ops/memory.cpp", "#ifdef CTX_HAVE_CUDA"),
    ],
)
def test_arrows_can_fail(path, line):
    assert len(against_the_arrows({**MADE_UP, path: f"#include <vector>\n{line}\n"})) == 1


def test_arrows_allow_what_is_meant():
    good = {
        "bindings/module.cpp": '#include <Python.h>\n#include "ctx/memory.h"\n',
        "core/memory.cpp": '#include "ctx/memory.h"\n#include "ops/memory.h"\n',
        "core/transformer.cpp": '#include "ctx/transformer.h"\n#include <torch/nn/init.h>\n',
        "include/ctx/transformer.h": '#include <torch/nn/module.h>\n#include "ctx/memory.h"\n',
        "kernels/cuda/tile.cuh": '#include <cuda_bf16.h>\n#include "ctx/schedule.h"\n',
        "kernels/cuda/tile.cu": "#include <c10/cuda/CUDAStream.h>\n#ifdef __CUDA_ARCH__\n#endif\n",
        "kernels/cpu/enter.cpp": '#include "ops/registry.h"\nops::register_kernels(kCPU);\n',
    }
    assert against_the_arrows({**MADE_UP, **good}) == []


# --- Python: cli -> recipes, hf -> the library; reference -> torch --------------------------------

# Packages beside the library, and which of them each folder may import; the library imports none.
BESIDE = {"cli", "hf", "recipes", "reference"}
MAY_IMPORT = {
    "__init__.py": {"reference"},
    "__main__.py": {"cli"},
    "cli": {"cli", "hf", "recipes"},
    "hf": {"hf"},
    "recipes": {"recipes"},
}


def imports(path, tree):
    """(full name, whether at the top level) of everything that the module at `path` imports."""
    package = ["ctx", *Path(path).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, node in tree.body) for name in names)


def inside(name, package):
    return name == package or name.startswith(f"{package}.")


def against_the_imports(files):
    """What is wrong with the files of python/ctx, {path: text}, one line each."""
    wrong = []
    for path, text in files.items():
        folder = Path(path).parts[0]
        for name, at_top in imports(path, ast.parse(text)):
            ours, root = inside(name, "ctx"), name.split(".")[0]
            theirs = not ours and root != "torch" and root not in sys.stdlib_module_names
            if folder == "reference":
                if theirs or (ours and not inside(name, "ctx.reference")):
                    wrong.append(f"{path}: the reference must import torch alone, got {name}")
            elif theirs and at_top:
                wrong.append(f"{path}: {name} must be imported where it is used")
            elif any(inside(name, f"ctx.{p}") for p in BESIDE - MAY_IMPORT.get(folder, set())):
                wrong.append(f"{path}: must not import {name}")
        for library in re.findall(r"torch\.ops\.(\w+)", text):
            if folder == "reference" or library not in ("ctx", "aten"):
                wrong.append(f"{path}: operators must be ours, got torch.ops.{library}")
    return wrong


def test_imports_of_the_package():
    files = read(ROOT / "python" / "ctx", ".py")
    assert len(files) > 20
    assert against_the_imports(files) == []


@pytest.mark.parametrize(
    "path, line",
    [
        ("memory.py", "import numpy as np"),
        ("memory.py", "from ctx import reference"),
        ("memory.py", "from .reference.memory import KVMemory"),
        ("memory.py", "def late(): from ctx.cli.main import main"),
        ("memory.py", "def late(): from ctx.recipes.data import read_text"),
        ("compression/mean.py", "from .. import recipes"),
        ("attention.py", "from ctx.hf import cache"),
        ("hf/cache.py", "from ctx.recipes import data"),
        ("recipes/data.py", "from ctx.cli.options import sizes"),
        ("recipes/data.py", "from ..cli import main"),
        ("recipes/trainer.py", "import ctx.hf"),
        ("__init__.py", "from ctx import recipes"),
        ("memory.py", "torch.ops.other.attend(q)"),
        ("recipes/curves.py", "from matplotlib.figure import Figure"),
        ("cli/train.py", "from ..reference import mean"),
        ("reference/memory.py", "from ctx import _C"),
        ("reference/memory.py", "from ..schedule import Schedule"),
        ("reference/memory.py", "def late(): import numpy"),
        ("reference/memory.py", "torch.ops.ctx.attend(q)"),
    ],
)
def test_imports_can_fail(path, line):
    assert len(against_the_imports({path: f"import math\nimport torch\n{line}\n"})) == 1


def test_imports_allow_what_is_meant():
    good = {
        "__init__.py": "from ctx import _load, reference\n",
        "__main__.py": "from ctx.cli.main import main\n",
        "cli/train.py": "from ctx.recipes import checkpoint\n",
        "cli/stream.py": "from ctx.hf.loading import load_model\n",
        "recipes/curves.py": "def draw():\n    from matplotlib.figure import Figure\n",
        "recipes/trainer.py": "from ctx.transformer import CompressiveTransformer\n",
        "memory.py": "from ctx import _C\ntorch.ops.ctx.step_(q)\n",
        "reference/memory.py": "from .schedule import Schedule\nfrom torch import Tensor\n",
    }
    assert against_the_imports(good) == []


# --- small files ----------------------------------------------------------------------------------

MOST_LINES = 350


def too_long(files):
    """Which of the files, {path: text}, have more lines than one subject needs."""
    counts = {path: len(text.splitlines()) for path, text in files.items()}
    return [f"{path}: {count} lines" for path, count in counts.items() if count > MOST_LINES]


def test_no_file_is_long():
    sources = read(CSRC, ".h", ".cpp", ".cuh", ".cu")
    package = read(ROOT / "python" / "ctx", ".py", ".pyi")
    assert len(sources) > 20 and len(package) > 20
    assert too_long(sources | package) == []


def test_length_can_fail():
    files = {"a.cpp": "\n" * MOST_LINES, "b.py": "pass\n" * (MOST_LINES + 1)}
    assert too_long(files) == [f"b.py: {MOST_LINES + 1} lines"]


# --- lists ----------------------------------------------------------------------------------------


def unlisted(cmake, present):
    """Sources that are listed and not there, there and not listed, or listed twice."""
    listed = re.findall(r"[\w/]+\.(?:cpp|cu)\b", re.sub(r"#.*", "", cmake))
    twice = {name for name in listed if listed.count(name) > 1}
    return sorted((set(listed) ^ set(present)) | twice)


def test_every_source_is_listed():
    present = [f"csrc/{name}" for name in read(CSRC, ".cpp", ".cu")]
    present += [f"tests/cpp/{name}" for name in read(ROOT / "tests" / "cpp", ".cpp", ".cu")]
    assert unlisted((ROOT / "cmake" / "CtxSources.cmake").read_text(), present) == []


def test_lists_can_fail():
    cmake = "set(A\n    a/b.cpp\n    c.cu)\nset(B a/b.cpp # d.cpp\n)"
    assert unlisted(cmake, ["a/b.cpp", "c.cu"]) == ["a/b.cpp"]
    assert unlisted(cmake, ["a/b.cpp", "d.cpp"]) == ["a/b.cpp", "c.cu", "d.cpp"]


# --- the law is computed in one place -------------------------------------------------------------

# The law for numbers, for tensors of C++, and for those of Python.
LAW = {
    "csrc": {"include/ctx/schedule.h", "ops/rings.h"},
    "python/ctx": {"schedule.py"},
}
# A schedule's ratio or segment beside an operator that cuts a stream into groups or segments.
_SIZE = r"[\w.]*\.(?:ratio|segment)\b"
BEYOND_THE_LAW = re.compile(rf"[*/%] ?{_SIZE}|{_SIZE} ?[*/%]|(?:div|mul|remainder)\({_SIZE}")


def computed_again(files, law):
    """Lines that compute what the law says, in files that are not the law."""
    return [
        f"{path}: {line.strip()}"
        for path, text in files.items()
        if path not in law
        for line in text.splitlines()
        if BEYOND_THE_LAW.search(re.sub(r"\s*(//|#).*", "", line) if path[-2:] != "py" else line)
    ]


@pytest.mark.parametrize("folder", LAW)
def test_the_law_is_computed_in_one_place(folder):
    files = read(ROOT / folder, ".h", ".cpp", ".cuh", ".cu", ".py")
    apart = ("reference/", "recipes/", "cli/")  # the law again; and users of the library
    files = {path: text for path, text in files.items() if not path.startswith(apart)}
    assert LAW[folder] <= files.keys()
    assert computed_again(files, LAW[folder]) == []


@pytest.mark.parametrize(
    "line",
    [
        "const int64_t first = s.sinks + s.ratio * g;",
        "return t / schedule.segment;",
        "t % clock.schedule.segment",
        'x.div(s.ratio, "floor")',
        "begun = schedule.ratio * number",
    ],
)
def test_the_law_elsewhere_is_found(line):
    assert len(computed_again({"ops/plan.cpp": line, "law.h": line}, {"law.h"})) == 1
    assert computed_again({"ops/plan.cpp": "s.ratio + s.overlap, x * y.ratio_of"}, set()) == []


# --- written twice, and therefore compared --------------------------------------------------------


def cpp_defaults(text, struct):
    """{name: default} of the members of a C++ struct that have a plain one."""
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.M | re.S)[1]
    body = re.sub(r"//.*", "", body)
    members = re.findall(r"^  (?!static)[\w:<>]+ (\w+) =\s+([^;{}()]+);", body, re.M)
    literals = {"false": "False", "true": "True"}
    return {
        name: ast.literal_eval(literals.get(value, value))
        for name, value in members
        if "::" not in value
    }


def header(name):
    return (CSRC / "include" / "ctx" / name).read_text()


def test_schedules_agree():
    law = cpp_defaults(header("schedule.h"), "Schedule")
    assert law.pop("overlap") == 0  # a compressor's
    assert law == {"window": 0, "compressed": 0, "ratio": 1, "segment": 1, "sinks": 0}
    for schedule in (ctx.Schedule, reference.Schedule):
        parameters = inspect.signature(schedule).parameters
        assert list(parameters) == list(law)
        assert parameters["sinks"].default == law["sinks"]
    source = (CSRC / "core/schedule.cpp").read_text()
    checks = re.findall(r'check_size\("ctx.Schedule", "(\w+)", \1, (\d+)\)', source)
    least = {name: int(number) for name, number in checks}
    assert least == {**reference.schedule.LEAST, "overlap": 0}


@pytest.mark.parametrize("name", reference.schedule.LEAST)
def test_limit_of_a_schedule(name):
    limit = 1 << int(re.search(r"kLimit = int64_t\{1\} << (\d+)", header("schedule.h"))[1])
    good = {"window": 4, "compressed": 2, "ratio": 2, "segment": 2, "sinks": 1}
    assert getattr(ctx.Schedule(**{**good, name: limit}), name) == limit
    with pytest.raises(ValueError, match=f"{name}.*{limit}, got {limit + 1}"):
        ctx.Schedule(**{**good, name: limit + 1})


@pytest.mark.parametrize("module", [ctx.KVMemory, ctx.CompressiveAttention])
def test_defaults_agree(module):
    options = cpp_defaults(header("memory.h"), "MemoryOptions")
    options |= cpp_defaults(header("settings.h"), "AttentionSettings")
    parameters = inspect.signature(module).parameters
    shared = {
        name: parameters[name].default
        for name in options.keys() & parameters.keys()
        if parameters[name].default not in (None, inspect.Parameter.empty)
    }
    assert {"distance", "rotary_base", "max_rewind"} & parameters.keys() <= shared.keys()
    assert shared == {name: options[name] for name in shared}


@pytest.mark.parametrize(
    "name, struct, python",
    [
        ("attention_module.h", "CompressiveAttentionOptions", ctx.CompressiveAttention),
        ("transformer.h", "CompressiveTransformerConfig", ctx.CompressiveTransformerConfig),
    ],
)
def test_options_of_modules_agree(name, struct, python):
    """Those of C++ have the names of Python's, and the same defaults; absent is None."""
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", header(name), re.M | re.S)[1]
    optional = re.findall(r"^  std::optional<[\w:]+> (\w+) = {};", body, re.M)
    options = {**cpp_defaults(header(name), struct), **dict.fromkeys(optional)}
    parameters = dict(inspect.signature(python).parameters)
    settings = {"inv_freq", "attention_factor", "scale", "slot_mass", "logit_softcap"}
    assert options.keys() - settings <= parameters.keys()
    left = parameters.keys() - options.keys() - {"settings", "device", "dtype"}
    assert left == set()
    for option, parameter in parameters.items():
        required = ("embed_dim", "num_heads", "vocab_size", "num_layers")
        if option in options and option not in (*required, "window", "compressed", "ratio"):
            assert options[option] == parameter.default, option


def test_cpp_defaults_are_read():
    members = '  int64_t a = 3;  // b = 4;\n  std::string c =\n      "x";\n  bool d = false;\n'
    text = f"struct A {{\n{members}}};\n"
    assert cpp_defaults(text, "A") == {"a": 3, "c": "x", "d": False}


def test_compressors_agree():
    tables = re.findall(r'^//   "(\w+)"', header("compressor.h"), re.M)
    documented = list(dict.fromkeys(tables))  # what each computes, then what parameters it has
    documented.remove("custom")  # everyone's own
    assert documented == list(ctx.compression.COMPRESSORS)
    by_usage = [name for name, kind in ctx.compression.COMPRESSORS.items() if kind.by_usage]
    assert sorted(documented) == sorted([*reference.COMPRESSORS, *by_usage])


def test_versions_of_formatters_agree():
    dev = re.search(r"^dev = .*", (ROOT / "pyproject.toml").read_text(), re.M)[0]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = [set(re.findall(r'"([\w-]+==[^"]+)"', text)) for text in (dev, hooks)]
    assert pins[0] == pins[1] != set()


def missing_paths(text):
    """Paths of this repository that a document names in backquotes and that are not there."""
    tops = "benchmarks|cmake|csrc|examples|python|tests"
    named = re.findall(rf"`((?:{tops})/[\w./*-]*|[\w-]+\.(?:md|toml|txt|py))`", text)
    return [name for name in named if not list(ROOT.glob(name.rstrip("/")))]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_files_that_exist(name):
    text = (ROOT / name).read_text()
    assert "`csrc/" in text
    assert missing_paths(text) == []


def test_documents_can_fail():
    assert missing_paths("`csrc/ops` `csrc/*/check.h` `csrc/nothing.h` `setup.py` `no.md`") == [
        "csrc/nothing.h",
        "no.md",
    ]


def names_of(tree):
    """{class or "": its public names} of a stub."""
    found = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found[""].add(node.name)
            found[node.name] = {part.name for part in node.body if part.name != "__init__"}
        elif isinstance(node, ast.FunctionDef):
            found[""].add(node.name)
        elif isinstance(node, ast.AnnAssign):
            found[""].add(ast.unparse(node.target))
    return found


def test_stub_of_the_compiled_module():
    """python/ctx/_C.pyi names what csrc/bindings binds, no more and no less."""
    from ctx import _C

    stub = names_of(ast.parse((ROOT / "python" / "ctx" / "_C.pyi").read_text()))
    for name, members in stub.items():
        bound = vars(getattr(_C, name)) if name else vars(_C)
        assert members == {member for member in bound if not member.startswith("_")}, name
