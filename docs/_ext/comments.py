"""Doxygen's input filter: plain `//` comments of the headers as documentation comments.

    python comments.py FILE      prints it

A comment belongs to what follows it, one behind a member to that member, the first one of a file to
the file. Indented lines, which are tables of shapes, stay as they are written.
"""

import re
import sys

_COMMENT = re.compile(r"^(\s*)//(?!/)(.*)$")
_BEHIND = re.compile(r"^(\s*[\w:<>,~&*()= {}.+\[\]\"-]*[;,{]\s+)//\s(.*)$")
_TABLE = re.compile(r"^ {3,}\S")


def _escaped(text):
    plain = re.sub(r"([\\@<>&#%])", r"\\\1", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", plain)


def _block(indent, lines, first):
    """A block of comment lines, without their slashes."""
    said = ["/**" + (r" \file" if first else "")]
    table = []

    def close():
        if table:
            said.extend([r"\verbatim", *table, r"\endverbatim"])
            table.clear()

    for line in lines:
        if _TABLE.match(line):
            table.append(line[1:])
        elif not line.strip() and table:
            table.append("")
        else:
            while table and not table[-1]:
                table.pop()
            close()
            said.append(_escaped(line.removeprefix(" ")))
    while table and not table[-1]:
        table.pop()
    close()
    # A block, as doxygen would leave slashes in what is verbatim.
    return [f"{indent}{line}".rstrip() for line in [*said, "*/"]]


def documented(text):
    out, block, indent, first = [], [], "", True
    for line in [*text.splitlines(), ""]:
        found = _COMMENT.match(line)
        if found:
            block.append(found[2])
            indent = found[1]
            continue
        if block:
            out += _block(indent, block, first)
            if first or not line.strip():
                out.append("")
            block, first = [], False
        behind = _BEHIND.match(line)
        out.append(f"{behind[1]}///< {_escaped(behind[2])}" if behind else line)
    return "\n".join(out)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(documented(file.read()))
