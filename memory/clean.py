"""Make foreign text safe to show on a terminal. For display only: offsets are those of the original.

A document can carry bytes that move the cursor, retitle the window, write to the clipboard, or reorder what a
person reads. Escape sequences go as a whole, then every control that is left, so that no two harmless pieces
can close up to a harmful one.
"""

from __future__ import annotations

import re

ESCAPES = re.compile(
    r"(?:\x1b\[[0-?]{0,256}|\x9b[0-?]{1,256})[ -/]{0,16}[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_][^\x07\x1b\x9c\n]{0,65536}(?:\x07|\x1b\\|\x9c)"  # titles, links, clipboard
    r"|\x1b[ -/]{0,16}[0-~]"  # character sets, reset
)
# C0 and C1 controls except tab and newline; overrides, embeddings and isolates of text direction
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without escape sequences, control characters and bidirectional overrides."""
    return CONTROLS.sub("", ESCAPES.sub("", text))


def one_line(text: str) -> str:
    """`text` printable and without line ends: a name that goes on below could pass for what stands there."""
    return " ".join(printable(text).split())
