"""The parser of `python -m ctx`, and the place where errors become one line and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import ctx
from ctx.cli import ablation, eval, export, fit, generate, info, plan, recall, stream, train
from ctx.cli.options import in_options
from ctx.recipes.errors import RecipeError

__all__ = ["command_parsers", "main", "plain"]

_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line; --help has the rest, without markup."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if options.get("description") is not None:
            options["description"] = plain(options["description"])
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_name(self.prog)}: {message} (see --help)\n")


def plain(text: str) -> str:
    """A docstring as a terminal shows it: no roles, no backticks."""
    return re.sub(r":\w+:(?=`)", "", text).replace("`", "")


def _name(prog: str) -> str:
    return prog.removeprefix("python -m ")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ctx", description=ctx.cli.__doc__)
    parser.add_argument("--version", action="version", version=f"ctx {ctx.__version__}")
    parser.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print where C++ projects find ctx: cmake -DCMAKE_PREFIX_PATH=…",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (train, eval, generate, export, fit, stream, plan, recall, ablation, info):
        module.add_parser(commands)
    return parser


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its name, in the order of ``--help``."""
    (commands,) = (
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.cmake_prefix_path:
        print(ctx.cmake_prefix_path)
        return 0
    if args.command is None:
        parser.error(
            "a command is missing: train, eval, generate, export, fit, stream, plan, recall, "
            "ablation or info"
        )
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except RecipeError as error:
        message = " ".join(in_options(str(error)).split())
    except KeyboardInterrupt:
        print(f"ctx {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: nobody reads on; Python must not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(x in str(error) for x in _MEMORY):
            raise
        message = "these sizes do not fit: the machine's memory is used up"
    print(f"ctx {args.command}: {message}", file=sys.stderr)
    return 2
