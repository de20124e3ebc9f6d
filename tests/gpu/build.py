"""Compiles the CUDA kernels with nvcc, and the emulator's parity tests for a real GPU.

    python tests/gpu/build.py OUT [--arch 90] [--jobs 16] [--tests]

Writes OUT/registers.md: registers, stack and spills of every kernel. Needs no torch; exits with 1
if nvcc warned.
"""

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
TESTS = ROOT / "tests" / "cuda_emulator"
PROGRAMS = ("test_memory", "test_attend", "test_spans", "bench_attend")


def nvcc(arch, *arguments):
    """What nvcc said; its error ends the program."""
    command = (
        *("nvcc", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xcompiler", "-Wall,-Wextra"),
        *("-I", ROOT / "csrc", "-I", ROOT / "csrc" / "include", "-I", TESTS),
        *arguments,
    )
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}")
    return done.stdout


def kernels_in(said):
    """(mangled name, stack, spilled bytes, registers) of every kernel that ptxas spoke of."""
    found, name, stack, spilled = [], "", 0, 0
    for line in said.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name, stack, spilled = entry[1], 0, 0
        elif sizes := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            if not stack and not spilled:
                stack, spilled = int(sizes[1]), int(sizes[2])
        elif (used := re.search(r"Used (\d+) registers", line)) and name:
            found.append((name, stack, spilled, int(used[1])))
            name = ""
    return found


def plain(names):
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.splitlines() if done.returncode == 0 else names
    return [re.sub(r"^void |ctx::cuda::|\(.*", "", line) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="90")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        kind = ("-x", "cu") if source.suffix == ".cpp" else ("-Xptxas", "-v")
        to = args.out / f"{source.stem}.o"
        return source, nvcc(args.arch, *kind, "-c", source, "-o", to)

    sources = sorted(KERNELS.glob("*.cu"), key=lambda path: "attend_" not in path.name)
    tests = [TESTS / f"{name}.cpp" for name in PROGRAMS] if args.tests else []
    with ThreadPoolExecutor(args.jobs) as pool:
        said = dict(pool.map(compile_one, [*sources, *tests]))
    warned = [line for text in said.values() for line in text.splitlines() if "warning" in line]
    rows = [row for source in sources for row in kernels_in(said[source])]
    names = plain([row[0] for row in rows])
    lines = [f"| kernel (sm_{args.arch}) | registers | stack | spilled |", "|---|---|---|---|"]
    lines += sorted(
        f"| {name} | {registers} | {stack} | {spilled} |"
        for name, (_, stack, spilled, registers) in zip(names, rows, strict=True)
    )
    (args.out / "registers.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, *warned]))
    objects = [args.out / f"{source.stem}.o" for source in sources]
    for test in tests:
        nvcc(args.arch, args.out / f"{test.stem}.o", *objects, "-o", args.out / test.stem)
    sys.exit(1 if warned else 0)


if __name__ == "__main__":
    main()
