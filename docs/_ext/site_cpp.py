"""Runs doxygen over the public headers, and tells breathe where it wrote."""

import shutil
import subprocess
import sys
from pathlib import Path

from sphinx.errors import ExtensionError

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[1] / "csrc" / "include" / "ctx"

OPTIONS = {
    "PROJECT_NAME": "ctx",
    "GENERATE_HTML": "NO",
    "GENERATE_LATEX": "NO",
    "GENERATE_XML": "YES",
    "XML_PROGRAMLISTING": "NO",
    "MARKDOWN_SUPPORT": "NO",
    "EXTRACT_ALL": "NO",
    "MACRO_EXPANSION": "YES",
    "EXPAND_ONLY_PREDEF": "YES",
    "PREDEFINED": '"CTX_API=" "CTX_HOST_DEVICE=" "TORCH_MODULE(x)="',
    "EXCLUDE_SYMBOLS": "ctx::examples",
    "FILE_PATTERNS": "*.h",
    "QUIET": "YES",
    "WARN_IF_UNDOCUMENTED": "NO",
    "WARN_IF_INCOMPLETE_DOC": "NO",
}


def run_doxygen(app, config):
    if shutil.which("doxygen") is None:
        raise ExtensionError("site_cpp: doxygen must be installed, got none on PATH")
    out = Path(app.doctreedir) / "doxygen"
    out.mkdir(parents=True, exist_ok=True)
    options = {
        **OPTIONS,
        "INPUT": f'"{HEADERS}"',
        "STRIP_FROM_PATH": f'"{HEADERS.parent}"',
        "OUTPUT_DIRECTORY": f'"{out}"',
        "INPUT_FILTER": f'"{sys.executable} {HERE / "comments.py"}"',
    }
    text = "".join(f"{name} = {value}\n" for name, value in options.items())
    done = subprocess.run(
        ["doxygen", "-"], input=text, capture_output=True, text=True, cwd=out, check=False
    )
    wrong = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode or wrong:
        raise ExtensionError("site_cpp: doxygen: " + "\n".join(wrong or ["failed"]))
    config.breathe_projects = {"ctx": str(out / "xml")}
    config.breathe_default_project = "ctx"


def setup(app):
    app.connect("config-inited", run_doxygen, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
