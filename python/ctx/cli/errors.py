"""The one exception that becomes one line on stderr and exit code 2."""

__all__ = ["CliError"]


class CliError(Exception):
    """Something the user can put right; the message says what must be and what was found."""
