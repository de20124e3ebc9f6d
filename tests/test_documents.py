"""README and the site's pages: their code runs, their commands parse, their links lead somewhere,
their pictures are those that the code draws."""

import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctx
from command_line import here
from ctx.cli.main import command_parsers
from ctx.compression import COMPRESSORS
from documents import ROOT, Block, blocks_of, documents, names

PAGES = documents()


def having(*languages):
    """Parameters: the pages that have blocks of these languages."""
    found = [page for page in PAGES if blocks_of(page.read_text(), *languages)]
    return pytest.mark.parametrize("page", found, ids=names(found))


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n- b\n  ```cpp\n  int x;\n  ```\n```text\nno\n```\n"
    assert blocks_of(text, "python", "cpp") == [
        Block("python", "x = 1\n", 3),
        Block("cpp", "int x;\n", 7),
    ]
    assert len(PAGES) > 30


@having("python")
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page in their order, as one program; the README's prints what it says."""
    text = page.read_text()
    if "transformers" in text or "ctx.hf" in text:
        pytest.importorskip("transformers", minversion="5.17", reason="needs transformers")
    if "torch.distributed" in text and not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    monkeypatch.chdir(tmp_path)
    known, space = set(COMPRESSORS), {"__name__": "__page__"}
    try:
        for block in blocks_of(text, "python"):
            needs = re.match(r"# needs (\w+)\n", block.text)
            if needs and importlib.util.find_spec(needs[1]) is None:
                continue
            code = "\n" * (block.line - 1) + block.text
            exec(compile(code, str(page), "exec"), space)
    finally:
        for name in COMPRESSORS.keys() - known:
            del COMPRESSORS[name]
    if page.name == "README.md":
        assert capsys.readouterr().out.startswith("3139 ")


def test_a_block_can_fail(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failed:
        test_python_runs(page, tmp_path, monkeypatch, capsys)
    assert failed.traceback[-1].lineno == 5  # from 0


@pytest.mark.slow
@having("cpp")
def test_cpp_compiles(page, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    torch_include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    includes = ["-I", ROOT / "csrc" / "include", "-isystem", torch_include,
                "-isystem", torch_include / "torch" / "csrc" / "api" / "include"]  # fmt: skip
    for number, block in enumerate(blocks_of(page.read_text(), "cpp")):
        source = tmp_path / f"block{number}.cpp"
        source.write_text(f'#line {block.line} "{page}"\n{block.text}')
        done = subprocess.run(
            [compiler, *flags, *includes, source], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def commands_of(text):
    """The arguments of every `python -m ...` in the shell blocks of a page, as lists of words."""
    found = []
    for block in blocks_of(text, "sh"):
        joined = block.text.replace("\\\n", " ")
        for part in re.split(r"\n|&&|\|", joined):
            words = shlex.split(re.sub(r'"?\$[({].*?[)}]"?', "X", part), comments=True)
            if "-m" in words and words[0].endswith("python"):
                found.append(words[words.index("-m") + 1 :])
    return found


def parses(words, tmp_path):
    """Whether a command of ours is one: its options are taken, its module is there."""
    module, *arguments = words
    if module == "ctx" and arguments and not arguments[0].startswith("-"):
        command_parsers()[arguments[0]].parse_args([word for word in arguments[1:] if word != "X"])
    elif module.startswith("benchmarks."):
        assert importlib.util.find_spec(module) is not None, module


@having("sh")
def test_commands_parse(page, tmp_path):
    for words in commands_of(page.read_text()):
        parses(words, tmp_path)


@pytest.mark.parametrize(
    "line", ["python -m ctx train --no-such", "python -m ctx nothing", "python -m benchmarks.none"]
)
def test_commands_can_fail(line, tmp_path, capsys):
    (words,) = commands_of(f"```sh\n{line}\n```\n")
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        parses(words, tmp_path)


def test_the_calculators_output_is_what_it_prints():
    """The table in the page on costs."""
    text = (ROOT / "docs" / "concepts" / "costs.md").read_text()
    command = next(words for words in commands_of(text) if "--streams" in words)
    code, out, _ = here(*command[1:], cwd=".")
    assert code == 0
    assert blocks_of(text, "text")[0].text == out


def dead_links(path, text):
    """Links of a document to files that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S))
    targets += re.findall(r"^```\{image\} (\S+)", text, re.M)
    dead = []
    for target in targets:
        name = target.split("#")[0]
        if name and not re.match(r"\w+:", name) and not (path.parent / name).exists():
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links(page):
    assert dead_links(page, page.read_text()) == []


def test_links_can_fail():
    text = "[a](docs/start.md#x) [b](docs/none.md) [c](https://x.y) ![d](no.png)"
    assert dead_links(ROOT / "README.md", text) == ["docs/none.md", "no.png"]


def test_every_page_is_in_the_contents():
    """Pages stand in the table of contents of the site once; others would have no way back."""
    index = (ROOT / "docs" / "index.md").read_text()
    listed = [
        name
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
        for name in tree.splitlines()
        if name and not name.startswith(":")
    ]
    assert len(listed) == len(set(listed))
    pages = {name.removeprefix("docs/").removesuffix(".md") for name in names(PAGES[1:])}
    assert set(listed) - {"tutorials/index"} == pages - {"index"}


def test_readme_fits_three_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 170 or any(line.startswith("python3") for line in lines)


def module_of(path):
    """A file of the site, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures():
    return module_of(ROOT / "docs" / "pictures.py")


def test_comments_of_headers_as_doxygen_reads_them():
    documented = module_of(ROOT / "docs" / "_ext" / "comments.py").documented
    header = (
        "// A file.\n#pragma once\n\n// `f` of x < 3:\n//   x  a table\n//\n// More.\nint f();\n"
    )
    assert documented(header).split("\n") == [
        *("/** \\file", "A file.", "*/", "", "#pragma once", ""),
        *("/**", "<code>f</code> of x \\< 3:", "\\verbatim", "  x  a table", "\\endverbatim"),
        *("More.", "*/", "int f();", ""),
    ]
    assert documented("int x = 0;  // behind\n") == "int x = 0;  ///< behind\n"


def undocumented(text, public):
    """Public names that a reference does not have."""
    return [name for name in public if not re.search(rf"{re.escape(name)}(?![\w.])", text)]


def test_references_have_every_public_name():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    public = [
        f"ctx.{name}"
        for name in ctx.__all__
        if inspect.isclass(getattr(ctx, name)) or inspect.isfunction(getattr(ctx, name))
    ]
    public += [f"ctx.compression.{kind.__name__}" for kind in COMPRESSORS.values()]
    public += [f"ctx.hf.{name}" for name in importlib.import_module("ctx.hf").__all__]
    headers = (ROOT / "csrc" / "include" / "ctx").glob("*.h")
    declared = re.compile(
        r"^(?:CTX_API [\w:<>, ]+ (\w+)\(|(?:struct|class)(?: CTX_API)? (\w+) {)", re.M
    )
    inner = {"rows.h", "export.h", *re.findall(r"\{doxygenfile\} (\S+)\n```", text)}
    for header in headers:
        if header.name not in inner:
            found = declared.findall(header.read_text())
            public += [f"ctx::{one or other}" for one, other in found]
    assert len(public) > 30
    assert undocumented(text, public) == []
    assert undocumented("ctx.Memory, ctx.hf.fit", ["ctx.Memory", "ctx.hf.fits"]) == ["ctx.hf.fits"]


def test_the_readmes_picture_is_drawn_from_the_law():
    """`python docs/pictures.py` writes it."""
    drawn = pictures()
    assert (ROOT / "docs" / "memory.svg").read_text() == drawn.strip(*drawn.README)


def test_distances_in_pictures_are_the_librarys():
    """Under "slot" a distance is what ALiBi takes from the score, here with a slope of one."""
    drawn = pictures()
    schedule = ctx.Schedule(window=4, compressed=2, ratio=2, segment=3, sinks=1)
    settings = ctx.AttentionSettings(schedule=schedule, position="alibi")
    tokens = 25
    memory = ctx.KVMemory(
        settings, 1, 1, tokens, compressor="mean", alibi_slopes=[1.0], dtype=torch.float64
    )
    zeros = torch.zeros(1, 1, tokens, tokens, dtype=torch.float64)
    values = torch.eye(tokens, dtype=torch.float64)[None, None]
    out = memory.step(zeros, zeros, values)[0, 0]
    for t in range(tokens):
        wanted = torch.zeros(tokens, dtype=torch.float64)
        for _, first, count, distance in drawn.seen_by(schedule, t):
            share = torch.tensor(-float(distance), dtype=torch.float64).exp()
            wanted[first : first + count] += share / count
        torch.testing.assert_close(out[t], wanted / wanted.sum())


def modules():
    """All modules of the package that can be imported without what is not installed."""
    found = ["ctx"]
    for module in pkgutil.walk_packages(ctx.__path__, "ctx."):
        if not module.name.startswith(("ctx.hf", "ctx.__main__", "ctx._C", "ctx.lib")):
            found.append(module.name)
    return found


def test_examples_of_docstrings():
    attempted = 0
    for name in modules():
        result = doctest.testmod(
            importlib.import_module(name), extraglobs={"ctx": ctx, "torch": torch}
        )
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted > 0


def test_operators_are_described():
    """Every registered operator and argument has a text in the reference, and no other."""
    pytest.importorskip("sphinx")
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        operators = importlib.import_module("site_operators")
    finally:
        sys.path.pop(0)
    found = operators.schemas()
    assert operators.check(found, operators.ABOUT) == []
    about = {**operators.ABOUT, "none": ("", {})}
    assert operators.check(found, about) == ["operator none"]
