"""Writes `llms.txt` (https://llmstxt.org): what the site is, and its pages with their first
sentences, each with the address of its plain source.
"""

import re
from pathlib import Path

from docutils import nodes

SUMMARY = (
    "A bounded memory for transformers (Compressive Transformer, Rae et al. 2019): recent "
    "key/value pairs are kept exactly, older ones are compressed c into one. C++/LibTorch engine, "
    "Python front end, modules that train and stream, a cache for Hugging Face models."
)


def _first_sentence(doctree):
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        apart = (nodes.list_item, nodes.entry, nodes.Admonition)
        if text and not isinstance(paragraph.parent, apart):
            return re.split(r"(?<!et al)\. ", text)[0].rstrip(".:") + "."
    return ""


def write(app, error):
    if error or app.builder.name not in ("html", "dirhtml"):
        return
    env = app.env
    sections, order = {}, []
    for page in [env.config.root_doc, *_in_order(env, env.config.root_doc)]:
        if page in order:
            continue
        order.append(page)
        title = env.titles[page].astext()
        source = f"_sources/{env.doc2path(page, base=False)}.txt"
        said = _first_sentence(env.get_doctree(page))
        folder = page.split("/")[0].capitalize() if "/" in page else "Pages"
        line = f"- [{title}]({app.builder.get_target_uri(page)}): {said} Source: {source}"
        sections.setdefault(folder, []).append(line)
    text = [f"# {env.config.project} {env.config.release}", "", f"> {SUMMARY}", ""]
    for folder, lines in sections.items():
        text += [f"## {folder}", "", *lines, ""]
    Path(app.outdir, "llms.txt").write_text("\n".join(text))


def _in_order(env, page):
    for child in env.toctree_includes.get(page, []):
        yield child
        yield from _in_order(env, child)


def setup(app):
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
