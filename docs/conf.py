"""The site: `pip install -e ".[docs]" && python -m sphinx -W docs build/site`."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

import ctx  # noqa: E402

project = "ctx"
copyright = "the authors of ctx"
release = version = ctx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
    "breathe",
    "site_cpp",
    "site_commands",
    "site_operators",
    "site_pictures",
    "site_llms",
]
exclude_patterns = ["_ext", "tutorials/*.ipynb", "tutorials/*.md5", "tutorials/*.py"]
nitpicky = False
default_role = "code"
highlight_language = "text"  # of what does not say it: tables in comments of headers
smartquotes = False  # options begin with two dashes
suppress_warnings = ["config.cache"]  # settings of the gallery are no plain values

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "substitution"]
myst_heading_anchors = 3
myst_fence_as_directive = ["ctx-timeline", "ctx-commands", "ctx-operators"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

sphinx_gallery_conf = {
    "examples_dirs": [str(HERE.parent / "examples" / "tutorials")],
    "gallery_dirs": ["tutorials"],
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "capture_repr": (),
    "write_computation_times": False,
    "show_signature": False,
    "within_subsection_order": "FileNameSortKey",
    "plot_gallery": "True",
}

html_theme = "furo"
html_title = f"ctx {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = True
html_show_sphinx = False
pygments_style = "default"
