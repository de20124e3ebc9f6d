"""The directive `ctx-timeline`: what every query of a stream sees, drawn from `ctx.Schedule`.

Its argument names the sizes, `window=8 compressed=4 ratio=4`, and `tokens=24`.
"""

import importlib.util
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import ctx

_spec = importlib.util.spec_from_file_location(
    "site_drawings", Path(__file__).resolve().parents[1] / "pictures.py"
)
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)


class Timeline(SphinxDirective):
    """An inline picture, so that it takes the page's colours."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        sizes = {
            name: int(n) for name, n in (part.split("=") for part in self.arguments[0].split())
        }
        tokens = sizes.pop("tokens")
        drawn = pictures.timeline(ctx.Schedule(**sizes), tokens)
        self.env.note_dependency(pictures.__file__)
        return [nodes.raw("", f'<div class="ctx-picture">{drawn}</div>', format="html")]


def setup(app):
    app.add_directive("ctx-timeline", Timeline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
