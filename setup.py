"""Drives CMake and puts its install tree into the wheel. Flags and source lists are CMake's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))
import build_backend  # noqa: E402

TORCH = build_backend.locate_torch()
OPTIONS = ("CTX_CUDA", "CTX_SANITIZE", "CTX_UNITY", "CTX_WERROR")  # also read from the environment


def jobs() -> int:
    """Torch's headers want up to 4 GB for each compiler at work."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // 4_000_000_000))


class CMakeBuild(build_ext):
    """An editable install uses the build tree in place (see python/ctx/_load.py), a wheel what
    CMake installs."""

    def run(self) -> None:
        if TORCH is None:
            sys.exit(
                "ctx: no torch found to build against. "
                "Install it (pip install torch), or set CTX_TORCH_ROOT."
            )
        tree = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{TORCH.minor}"
        self.configure(tree, TORCH)
        self.cmake("--build", tree, "--parallel", jobs())
        if not (self.editable_mode or self.inplace):
            for component in ("ctx", "python"):
                prefix = Path(self.build_lib).resolve() / "ctx"
                self.cmake("--install", tree, "--prefix", prefix, "--component", component)

    def configure(self, tree: Path, torch: build_backend.Torch) -> None:
        # A cache would keep paths into pip's isolated environment, which is gone after each build.
        # The objects stay.
        (tree / "CMakeCache.txt").unlink(missing_ok=True)
        ninja = shutil.which("ninja")
        self.cmake(
            *("-S", ROOT, "-B", tree),
            *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCTX_TORCH_ROOT={torch.root}",
            f"-DCTX_UNITY={'OFF' if self.editable_mode or self.inplace else 'ON'}",
            *(f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ),
            *os.environ.get("CMAKE_ARGS", "").split(),
        )

    def cmake(self, *args: object) -> None:
        command = [shutil.which("cmake") or "cmake", *map(str, args)]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            sys.exit("ctx: CMake is missing: pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            sys.exit(f"ctx: this command failed ({error.returncode}): {' '.join(command)}")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuildPy(build_py):
    """A module that was deleted from the sources must not return from the folder of an earlier
    build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    version=re.search(r"project\(ctx VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())[1],
    install_requires=[f"torch=={TORCH.minor}.*" if TORCH else build_backend.TORCH],
    ext_modules=[Extension("ctx._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
