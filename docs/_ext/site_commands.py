"""The directive `ctx-commands`: the command line as argparse knows it, a section a command."""

import argparse

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from ctx.cli.main import command_parsers, plain


def _called(action):
    """How an option or an argument is written."""
    if not action.option_strings:
        return action.metavar or action.dest
    value = ""
    if action.nargs != 0:
        value = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}"
            if action.choices
            else action.dest.upper()
        )
        value = " " + (" ".join(value) if isinstance(value, tuple) else value)
        if action.nargs in ("+", "*"):
            value += "..."
    return ", ".join(action.option_strings) + value


def _meaning(action):
    text = action.help or ""
    if action.choices and action.metavar:
        text += f" ({', '.join(map(str, action.choices))})"
    if action.required and action.option_strings:
        text = f"required; {text}" if text else "required"
    return plain(text % {"default": action.default} if "%(" in text else text)


class Commands(SphinxDirective):
    """Sections of all commands, with what `--help` says."""

    def run(self):
        return [self.section(name, parser) for name, parser in command_parsers().items()]

    def section(self, name, parser):
        section = nodes.section(ids=[f"command-{name}"], names=[f"command {name}"])
        section += nodes.title(name, name)
        section += nodes.paragraph("", plain(parser.description or ""))
        usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        section += nodes.literal_block(usage, usage, language="text", classes=["ctx-schema"])
        items = nodes.definition_list()
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            item = nodes.definition_list_item()
            said = _called(action)
            item += nodes.term("", "", nodes.literal(said, said))
            item += nodes.definition("", nodes.paragraph("", _meaning(action)))
            items += item
        if len(items):
            section += items
        self.state.document.note_explicit_target(section, section)
        return section


def setup(app):
    app.add_directive("ctx-commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
