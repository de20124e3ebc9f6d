"""Programs of others that use the C++ library: built with its sources, against an installed one
beside a LibTorch without Python, and against the Python package; and what the library exports."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ctx
from cpp_builds import CONSUMER, ROOT, TORCH, compile_all, configure
from programs import run

MINOR = ".".join(torch.__version__.split(".")[:2])
HEADERS = ROOT / "csrc" / "include" / "ctx"
LIBRARY = Path(ctx.cmake_prefix_path) / "lib" / "libctx.so"


# --- three ways to a program ----------------------------------------------------------------------


def check(program):
    said = run(program)
    version = re.escape(ctx.__version__)
    assert re.match(rf"ctx {version} \(headers {version}\), torch {MINOR}\.\d+, \w+\n", said), said
    assert re.search(r"^100 tokens seen, \d+ bytes$", said, re.M)
    libraries = run("ldd", program)
    names = [line.split()[0] for line in libraries.splitlines()]
    assert "libtorch_cpu.so" in names and "not found" not in libraries
    assert [name for name in names if "python" in Path(name).name] == []


def build(folder, *options):
    """Configures and builds the consumer in a folder of its own; what CMake said."""
    shutil.copytree(CONSUMER, folder / "source")
    said = configure(folder / "source", folder / "build", *options)
    compile_all(folder / "build")
    return said


def libtorch(folder, version=None):
    """The layout of a LibTorch archive: no Python, the version in a file."""
    (folder / "lib").mkdir(parents=True)
    for name in ("include", "share"):
        (folder / name).symlink_to(TORCH / name)
    for library in (TORCH / "lib").iterdir():
        if "python" not in library.name:
            (folder / "lib" / library.name).symlink_to(library)
    (folder / "build-version").write_text(f"{version or torch.__version__}\n")
    return folder


@pytest.fixture(scope="module")
def installed(consumer_with_sources, tmp_path_factory):
    """Where `cmake --install` put the library."""
    prefix = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", consumer_with_sources / "ctx", "--prefix", prefix)
    return prefix


@pytest.mark.slow
def test_add_subdirectory(consumer_with_sources):
    check(consumer_with_sources / "consumer")


@pytest.mark.slow
def test_python_package(tmp_path):
    said = build(tmp_path, f"CMAKE_PREFIX_PATH={ctx.cmake_prefix_path}")
    assert f"ctx: building against torch {torch.__version__} at {TORCH}" in said
    check(tmp_path / "build" / "consumer")


@pytest.mark.slow
def test_installed_beside_libtorch(installed, tmp_path):
    """Found by find_package(Torch) before ctx, as LibTorch's own documentation has it."""
    torch_folder = libtorch(tmp_path / "libtorch")
    prefixes = f"CMAKE_PREFIX_PATH={installed};{torch_folder}"
    said = build(tmp_path, prefixes, "CONSUMER_USES_TORCH=ON")
    assert f"ctx: building against torch {torch.__version__} at {torch_folder}" in said
    check(tmp_path / "build" / "consumer")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["installed", "package"])
def test_another_minor_version_is_refused(request, tmp_path, way):
    """Of torch, before anything is compiled."""
    other = f"{int(MINOR.split('.')[0])}.{int(MINOR.split('.')[1]) + 1}.0"
    folder = libtorch(tmp_path / "libtorch", other)
    prefix = request.getfixturevalue("installed") if way == "installed" else ctx.cmake_prefix_path
    command = ["cmake", "-S", CONSUMER, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(
        [*map(str, command), f"-DCTX_TORCH_ROOT={folder}"], capture_output=True, text=True
    )
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert f"ctx: built against torch {torch.__version__}, but the torch found is {other}" in said


@pytest.mark.slow
def test_another_version_of_ctx_is_refused(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(consumer CXX)\n"
        "find_package(ctx 99.1 CONFIG REQUIRED)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build"]
    command += [f"-DCMAKE_PREFIX_PATH={ctx.cmake_prefix_path}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'compatible with requested version "99.1"' in " ".join(done.stderr.split())


# --- the library ----------------------------------------------------------------------------------


def test_no_python_in_the_library():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", LIBRARY))
    assert any(name.startswith("libtorch_cpu") for name in needed)
    assert [name for name in needed if "python" in name] == []


#: By which kernels in a library of their own enter themselves (csrc/ops/registry.h).
SEAM = "ctx::ops::register_kernels("
LINKERS = ("__bss_start", "_edata", "_end")  # some linkers export these of every library


def beyond_the_api(symbols, headers):
    """Exported symbols, lines of `nm -DC`, that the headers do not declare.

    Weak ones of torch and of the standard library are inline functions and templates whose headers
    make them visible, and which programs and libraries share.
    """
    code = re.sub(r"//.*", "", headers)
    wrong = []
    for line in symbols.splitlines():
        kind, name = re.match(r"\s*[0-9a-f]* (\w) (.*)", line).groups()
        if name.startswith(SEAM):
            continue
        if not re.match(r"(\w+ for )?ctx::", name):
            if kind not in "WVu" and name not in LINKERS:
                wrong.append(name)
            continue
        path = re.match(r"(?:\w+ for )?([\w:]+)", name)[1].split("::")
        if any(not re.search(rf"\b{word}\b", code) for word in path):
            wrong.append(name)
    return wrong


def test_only_the_api_is_exported():
    headers = "".join(path.read_text() for path in sorted(HEADERS.glob("*.h")))
    symbols = run("nm", "-DC", "--defined-only", LIBRARY)
    assert " T ctx::Session::tick(" in symbols and " T ctx::init()" in symbols
    assert beyond_the_api(symbols, headers) == []


@pytest.mark.parametrize(
    "line, good",
    [
        ("00a1 T ctx::KVMemory::step(at::Tensor const&)", True),
        ("00a1 V typeinfo for ctx::KVMemory", True),
        ("00a1 W std::vector<long>::~vector()", True),
        ("00a1 T ctx::ops::register_kernels(c10::DeviceType)", True),
        ("00a1 T ctx::ops::kernels_for(c10::DeviceType)", False),
        ("00a1 T ctx::KVMemory::hidden()", False),
        ("00a1 W ctx::ops::check()", False),
        ("00a1 T main", False),
        ("00a1 B std::cout", False),
    ],
)
def test_exports_can_fail(line, good):
    headers = "namespace ctx { class KVMemory { void step(); }; } // ops"
    assert (beyond_the_api(line, headers) == []) == good


def test_version_of_the_headers():
    text = (HEADERS / "version.h").read_text()
    numbers = re.findall(r"#define CTX_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text)
    assert ".".join(numbers) == ctx.__version__
