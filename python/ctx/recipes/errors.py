"""The error of a recipe: the command line shows it as one line and exits with code 2."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["RecipeError", "setting_error"]


class RecipeError(Exception):
    """Something the user can correct; the message says what must be and what was found.

    Names of settings stand in backticks, so that the command line can show its options instead.
    """


def setting_error(error: Exception, names: Iterable[str]) -> RecipeError:
    """An error of the library without its prefix, and with the settings' names in backticks."""
    known = set(names)
    message = str(error).partition(": ")[2]
    return RecipeError(
        re.sub(r"\w+", lambda word: f"`{word[0]}`" if word[0] in known else word[0], message)
    )
