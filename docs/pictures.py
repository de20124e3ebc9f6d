"""The drawn pictures, made of `ctx.Schedule` itself, so that they show what the code does.

    python docs/pictures.py      writes docs/memory.svg, the README's picture

`timeline` is the one of the page on the memory; the site draws it while it is built.
"""

from html import escape
from pathlib import Path

import ctx

SINK, SLOT, WINDOW, GONE = "#5b8c5a", "#d08c3c", "#3f7cac", "#9a9a9a"
FONT = 'font-family="sans-serif"'


def _rect(x, y, width, height, fill, opacity=1.0, title=""):
    said = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" '
        f'fill-opacity="{opacity:g}">{said}</rect>'
    )


def _text(x, y, text, size=11, anchor="middle", fill="currentColor", weight="normal"):
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}" {FONT}>{escape(text)}</text>'
    )


def _svg(width, height, parts, title, background=None):
    back = [f'<rect width="{width:g}" height="{height:g}" fill="{background}"/>'] * bool(background)
    inside = "\n".join([f"<title>{escape(title)}</title>", *back, *parts])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">\n{inside}\n</svg>\n'
    )


def _legend(x, y, entries):
    parts = []
    for fill, text in entries:
        parts += [_rect(x, y - 9, 12, 12, fill), _text(x + 17, y + 1, text, anchor="start")]
        x += 27 + 6.3 * len(text)
    return parts


def seen_by(schedule, t):
    """What the query of token t attends to: (kind, first token, tokens, distance under "slot")."""
    sinks, groups, window = schedule.visible(t)
    begin, n = window.start, groups.stop
    found = [("sink", j, 1, (t - begin) + len(groups) + (schedule.sinks - j)) for j in sinks]
    for g in groups:
        first = schedule.sinks + schedule.ratio * g
        found.append(("slot", first, schedule.ratio, (t - begin) + (n - g)))
    return found + [("window", j, 1, t - j) for j in window]


def timeline(schedule, tokens):
    """A row for every query of a stream, a column for every token: what the query sees of it."""
    size, left, top = 24, 74, 46
    width, height = left + tokens * size + 12, top + tokens * size + 44
    parts = [
        _text(left - 8, top - 20, "token", anchor="end"),
        _text(left - 8, top - 6, "query", anchor="end"),
    ]
    for j in range(tokens):
        parts.append(_text(left + (j + 0.5) * size, top - 6, str(j), 10))
    kinds = {"sink": SINK, "slot": SLOT, "window": WINDOW}
    for t in range(tokens):
        y = top + t * size
        begins = t % schedule.segment == 0
        if begins:
            line = f'<line x1="{left - 60}" x2="{left + tokens * size}" y1="{y:g}" y2="{y:g}" '
            parts.append(
                line + 'stroke="currentColor" stroke-opacity="0.35" stroke-dasharray="3 3"/>'
            )
        parts.append(
            _text(left - 8, y + 16, str(t), 10, "end", weight="bold" if begins else "normal")
        )
        shown = set()
        for kind, first, count, distance in seen_by(schedule, t):
            shown |= set(range(first, first + count))
            what = (
                f"token {first}"
                if count == 1
                else f"one slot of tokens {first} to {first + count - 1}"
            )
            title = f"query {t}: {what}, distance {distance}"
            x = left + first * size
            parts.append(_rect(x + 1, y + 2, count * size - 2, size - 4, kinds[kind], 1, title))
            parts.append(_text(x + count * size / 2, y + 16, str(distance), 9, fill="#ffffff"))
        forgotten = sorted(set(range(t + 1)) - shown)
        for j in forgotten:
            parts.append(
                _rect(left + j * size + 9, y + 9, 6, 6, GONE, 0.5, f"query {t}: forgotten")
            )
    entries = [
        (WINDOW, "exact token"),
        (SLOT, f"slot of {schedule.ratio} tokens"),
    ]
    if forgotten:
        entries.append((GONE, "forgotten"))
    if schedule.sinks:
        entries.insert(0, (SINK, "sink"))
    parts += _legend(left, height - 14, entries)
    return _svg(width, height, parts, f"What each query of {tokens} tokens sees")


def strip(schedule, t):
    """What the query of token t sees, as one strip of tokens."""
    size, left, top = 15.5, 14, 66
    sinks, groups, window = schedule.visible(t)
    width = 2 * left + (t + 1) * size
    parts = []
    kinds = {"sink": SINK, "slot": SLOT, "window": WINDOW}
    for j in range(t + 1):
        parts.append(_rect(left + j * size + 1, top, size - 2, 20, GONE, 0.22))
    for kind, first, count, _ in seen_by(schedule, t):
        x, wide = left + first * size, count * size
        if kind == "slot":
            parts += [
                _rect(left + j * size + 1, top, size - 2, 20, SLOT, 0.4)
                for j in range(first, first + count)
            ]
            middle, high, low = x + wide / 2, top + 23, top + 40
            shape = f"M {x + 2:g} {high} L {x + wide - 2:g} {high} L {middle + 6:g} {low}"
            shape += f" L {middle - 6:g} {low} Z"
            parts.append(f'<path d="{shape}" fill="{SLOT}" fill-opacity="0.35"/>')
            parts.append(_rect(middle - 6.5, low, 13, 20, SLOT))
        else:
            parts.append(_rect(x + 1, top, size - 2, 20, kinds[kind]))
    query = left + (t + 0.5) * size
    labels = [
        (0, len(sinks), SINK, "sinks", "exact for ever"),
        (len(sinks), groups.start * schedule.ratio, "#777777", "forgotten", ""),
        (
            schedule.sinks + groups.start * schedule.ratio,
            schedule.ratio * len(groups),
            SLOT,
            f"compressed: {len(groups)} slots of {schedule.ratio} tokens",
            "oldest leave first",
        ),
        (
            window.start,
            len(window),
            WINDOW,
            f"window: {schedule.window} exact tokens or more",
            "oldest are compressed",
        ),
    ]
    for first, count, fill, text, note in labels:
        middle = left + (first + count / 2) * size
        if text == "sinks":
            parts += [
                _text(left, top - 34, text, 13, "start", fill, "bold"),
                _text(left, top - 18, note, 11, "start", "#777777"),
            ]
        else:
            parts.append(_text(middle, top - 34, text, 13, "middle", fill, "bold"))
            parts.append(_text(middle, top - 18, note, 11, "middle", "#777777"))
    parts.append(f'<path d="M {query:g} {top - 4} l -5 -8 l 10 0 Z" fill="#c0392b"/>')
    said = (
        f"the query of token {t} sees {len(sinks)} + {len(groups)} + {len(window)} entries for "
        f"{t + 1} tokens; no query ever sees more than {schedule.max_slots}"
    )
    parts.append(_text(width / 2, top + 86, said, 12, "middle", "#777777"))
    return _svg(width, top + 100, parts, said, "#ffffff")


#: The README's memory: 2 sinks, 5 slots of 4, a window of 12 in segments of 4.
README = (ctx.Schedule(window=12, compressed=5, ratio=4, sinks=2), 53)
#: The site's: M 8, C 4, c 4, segments of 4.
WORKED = (ctx.Schedule(window=8, compressed=4, ratio=4), 24)


if __name__ == "__main__":
    target = Path(__file__).resolve().parent / "memory.svg"
    target.write_text(strip(*README))
    print(target)
