"""Which torch a build uses, what a wheel holds, and what an import says where it cannot work."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import ctx
from ctx import _load

ROOT = Path(__file__).resolve().parents[1]
MINOR = ".".join(torch.__version__.split(".")[:2])
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def run(*command, **environment):
    """Output and exit code of a command; a value of None takes a variable out."""
    variables = {**os.environ, **environment}
    variables = {name: str(value) for name, value in variables.items() if value is not None}
    done = subprocess.run(
        [*map(str, command)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout, done.returncode


# --- the backend: which torch ---------------------------------------------------------------------


def load_backend():
    spec = importlib.util.spec_from_file_location("backend", ROOT / "cmake" / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(monkeypatch):
    """cmake/build_backend.py where no torch is in sight."""
    module = load_backend()
    monkeypatch.delenv("CTX_TORCH_ROOT", raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_site_folders", list)
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(module.build_meta, hook, lambda settings=None: ["wheel"])
    return module


def fake_torch(folder, version="2.14.1+cu130"):
    (folder / "torch" / "include" / "ATen").mkdir(parents=True)
    (folder / "torch" / "include" / "ATen" / "ATen.h").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda = None\n")
    return folder / "torch"


HOOKS = ["get_requires_for_build_wheel", "get_requires_for_build_editable"]


@pytest.mark.parametrize("hook", HOOKS)
def test_torch_is_required_where_there_is_none(backend, hook):
    assert backend.locate_torch() is None
    assert getattr(backend, hook)() == ["wheel", backend.TORCH]


@pytest.mark.parametrize("hook", HOOKS)
def test_torch_is_not_required_where_there_is_one(backend, hook, monkeypatch, tmp_path):
    fake_torch(tmp_path)
    monkeypatch.setattr(backend, "_site_folders", lambda: ["/nowhere", str(tmp_path)])
    assert getattr(backend, hook)({}) == ["wheel"]


def test_torch_root_is_obeyed(backend, monkeypatch, tmp_path):
    fake_torch(tmp_path / "other", "2.9.0")
    monkeypatch.setattr(backend, "_site_folders", lambda: [str(tmp_path / "other")])
    monkeypatch.setenv("CTX_TORCH_ROOT", str(fake_torch(tmp_path / "named", "2.14.1+cu130")))
    found = backend.locate_torch()
    assert found == (tmp_path / "named" / "torch", "2.14.1+cu130")
    assert found.minor == "2.14"


def test_wrong_torch_root_ends_the_build(backend, monkeypatch, tmp_path):
    fake_torch(tmp_path)
    monkeypatch.setattr(backend, "_site_folders", lambda: [str(tmp_path)])
    monkeypatch.setenv("CTX_TORCH_ROOT", str(tmp_path))  # one folder too high
    with pytest.raises(SystemExit, match=f"CTX_TORCH_ROOT must be .*, got {tmp_path}$"):
        backend.locate_torch()


def test_importable_torch_comes_first(backend, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_loader("torch", None)
    spec.submodule_search_locations = [str(fake_torch(tmp_path / "first", "2.10.0"))]
    fake_torch(tmp_path / "second")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(backend, "_site_folders", lambda: [str(tmp_path / "second")])
    assert backend.locate_torch().version == "2.10.0"


@pytest.mark.parametrize("lost", ["version.py", "include/ATen/ATen.h"])
def test_remains_of_a_torch_are_none(backend, monkeypatch, tmp_path, lost):
    (fake_torch(tmp_path) / lost).unlink()
    monkeypatch.setattr(backend, "_site_folders", lambda: [str(tmp_path)])
    assert backend.locate_torch() is None


@pytest.mark.parametrize("shared", [True, False])
def test_a_virtual_environment_may_see_the_system(monkeypatch, tmp_path, shared):
    module = load_backend()
    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(shared).lower()}\n")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/base")
    folders = module._site_folders()
    assert any(folder.startswith("/base") for folder in folders) == shared


# --- what is installed ----------------------------------------------------------------------------


def test_build_info_is_of_this_build():
    version = re.search(r"project\(ctx VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert _load.build_info["torch_minor"] == MINOR
    assert _load.build_info["version"] == version == ctx.__version__


def test_metadata_pins_the_minor_version_of_torch():
    try:
        requires = importlib.metadata.requires("ctx-memory")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ctx is used from a build tree, it is not installed")
    assert f"torch=={MINOR}.*" in requires


def test_cmake_finds_the_package():
    prefix = Path(ctx.cmake_prefix_path)
    assert (prefix / "share" / "cmake" / "ctx" / "ctxConfig.cmake").is_file()
    assert list((prefix / "lib").glob("libctx.*"))


# --- what an import says --------------------------------------------------------------------------


def fake_build(folder, minor):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODULE).touch()  # cannot be loaded
    info = {"version": "0.1.0", "torch": f"{minor}.0", "torch_minor": minor}
    (folder / "_build_info.py").write_text("".join(f"{k} = {v!r}\n" for k, v in info.items()))


@pytest.fixture
def fake_import(tmp_path):
    """Imports ctx._load as ctx would, beside a torch of any version, and returns the last line."""

    def load(torch_version):
        package = tmp_path / "python" / "ctx"
        package.mkdir(parents=True, exist_ok=True)
        shutil.copy(_load.__file__, package)
        (package / "__init__.py").write_text("from ctx import _load\n")
        (tmp_path / "python" / "torch.py").write_text(f"__version__ = {torch_version!r}\n")
        output, code = run(sys.executable, "-c", "import ctx", PYTHONPATH=package.parent)
        assert code == 1
        return output.splitlines()[-1]

    return load


def test_another_torch_is_refused(fake_import, tmp_path):
    fake_build(tmp_path / "python" / "ctx", "2.13")
    message = fake_import("2.14.1+cu130")
    assert message.startswith("ImportError: ctx: ")
    assert "built against torch 2.13.0, but torch 2.14.1+cu130 is installed" in message
    assert "pip install --force-reinstall --no-deps --no-cache-dir ." in message


def test_nothing_built_is_explained(fake_import, tmp_path):
    message = fake_import("2.14.1")
    assert message.startswith("ImportError: ctx: ")
    assert f"{MODULE} is missing beside {tmp_path / 'python' / 'ctx'}" in message
    assert "pip install --force-reinstall" in message


def test_what_does_not_load_is_explained(fake_import, tmp_path):
    fake_build(tmp_path / "python" / "ctx", "2.14")
    message = fake_import("2.14.9+cpu")  # any patch, any build of the minor version may try
    assert message.startswith("ImportError: ctx: the compiled part does not load")
    assert "built against torch 2.14.0" in message
    assert "pip install --force-reinstall" in message


def test_a_source_tree_takes_the_build_that_fits(fake_import, tmp_path):
    (tmp_path / "CMakeLists.txt").touch()
    fake_build(tmp_path / "build" / "a" / "ctx", "2.13")
    fake_build(tmp_path / "build" / "b" / "ctx", "2.12")
    assert "does not load; it was built against torch 2.13.0" in fake_import("2.13.1")
    assert "does not load; it was built against torch 2.12.0" in fake_import("2.12.1")
    message = fake_import("2.14.0")
    assert "but torch 2.14.0 is installed" in message
    assert f"cd {tmp_path} && pip install --no-build-isolation --no-deps -e ." in message


def test_the_installed_package_refuses_another_torch():
    code = "import torch; torch.__version__ = '2.1.0'; import ctx"
    message = run(sys.executable, "-c", code)[0].splitlines()[-1]
    assert message.startswith("ImportError: ctx: ")
    assert torch.__version__ in message
    assert "torch 2.1.0 is installed" in message


# --- pip wheel ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel(tmp_path):
    """`pip wheel .` with build isolation: no second torch, all of the package, usable."""

    def skip(folder, names):
        built = ("build", "dist", "runs", ".git", ".venv")
        return [name for name in names if Path(folder) == ROOT and name.startswith(built)]

    shutil.copytree(ROOT, tmp_path / "ctx", ignore=skip)
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "wheel", "-v", "--no-deps", "-w", tmp_path, tmp_path / "ctx"]
    log, code = run(*command, CTX_TORCH_ROOT=None)
    assert code == 0, log[-5000:]
    assert (
        f"ctx: building against torch {torch.__version__} at {Path(torch.__file__).parent}" in log
    )
    assert len(re.findall(r"ctx: CUDA (on|off|toolkit)", log)) == 1
    assert not re.search(r"Collecting torch\b|\btorch-\d", log)

    (wheel,) = tmp_path.glob("ctx_memory-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        requires = re.findall(r"^Requires-Dist: (torch.*)", archive.read(metadata).decode(), re.M)
    assert requires == [f"torch=={MINOR}.*"]
    headers = [path.name for path in (ROOT / "csrc" / "include" / "ctx").glob("*.h")]
    modules = [path.relative_to(ROOT / "python") for path in (ROOT / "python/ctx").rglob("*.py")]
    expected = {
        *(f"ctx/include/ctx/{name}" for name in headers),
        *(path.as_posix() for path in modules),
        *(f"ctx/{name}" for name in (MODULE, "_build_info.py", "py.typed", "lib/libctx.so")),
        *(
            f"ctx/share/cmake/ctx/{name}.cmake"
            for name in ("ctxConfig", "ctxConfigVersion", "ctxTargets", "CtxFindTorch")
        ),
    }
    assert len(headers) > 3
    assert expected - names == set()
    assert not [name for name in names if re.search(r"lib(torch|c10|gomp)|\.(cpp|o)$|tests/", name)]

    site = tmp_path / "site"
    output, code = run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    assert code == 0, output
    use = "import ctx; print(ctx.__file__, ctx.KVMemory(ctx.Schedule(4, 2, 2), 1, 1, 8).nbytes)"
    output, code = run(sys.executable, "-c", use, PYTHONPATH=site)
    assert (code, output.split()[0]) == (0, str(site / "ctx" / "__init__.py")), output
