"""What the compiler made of the CUDA kernels: registers, stack, wide loads, tensor-core products.

    python tests/gpu/kernels.py LIBRARY [OUT.md]

LIBRARY is libctx.so of a build with CUDA, for one architecture or several. Needs cuobjdump and
nvdisasm (of the CUDA toolkit; triton's package has them, too) and c++filt.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# What is counted in the machine code, by the names of instructions.
COUNTED = {
    "16-byte loads": r"LDG(STS)?\.E(\.\w+)*\.128",
    "16-byte stores": r"STG\.E(\.\w+)*\.128",
    "mma": r"HMMA\.16816\S*",
    "loads of spilled": r"LDL\S*",
}


def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architecture_of(line, before):
    """The architecture that a line of cuobjdump announces, else the one before."""
    found = re.search(r"\b(?:arch = |sm_)(?:sm_)?(\d+\w?)", line)
    return found[1] if found and ("arch =" in line or "EF_CUDA_SM" not in line) else before


def resources(library):
    """{(architecture, kernel): (registers, stack)}"""
    found, architecture, name = {}, "", ""
    for line in said("cuobjdump", "-res-usage", library).splitlines():
        if "Function" in line:
            name = re.search(r"Function (\S+):", line)[1]
        elif usage := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[architecture, name] = (int(usage[1]), int(usage[2]))
        else:
            architecture = architecture_of(line, architecture)
    return found


def instructions(library):
    """{(architecture, kernel): how often each counted instruction stands in it}"""
    found, architecture, counts = {}, "", Counter()
    for line in said("cuobjdump", "-sass", library).splitlines():
        if "Function :" in line:
            counts = found[architecture, line.split("Function :")[1].strip()] = Counter()
        elif "/*" in line:
            for what, pattern in COUNTED.items():
                counts[what] += bool(re.search(rf"\s{pattern}\b", line))
        else:
            architecture = architecture_of(line, architecture)
    return found


def plain(name):
    """A kernel's name for people: without the namespaces and the parameters."""
    name = re.sub(r"^void |ctx::cuda::|\(.*", "", said("c++filt", name).strip())
    return name.replace("(int)", "").replace("(bool)", "")


def table(library):
    counted, used = instructions(library), resources(library)
    heads = ["kernel", "architecture", "registers", "stack bytes", *COUNTED]
    rows = [
        [f"`{plain(name)}`", f"sm_{architecture}", *map(str, used[architecture, name])]
        + [str(counted[architecture, name][what]) for what in COUNTED]
        for architecture, name in used
    ]
    lines = [heads, ["---"] * len(heads), *sorted(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main():
    library, *out = sys.argv[1:]
    made = table(library)
    if out:
        Path(out[0]).write_text(made)
    else:
        print(made, end="")


if __name__ == "__main__":
    main()
