"""The process that reads what can hang or eat memory: PDF, office files, EPUB, HTML.

It takes one JSON line per job on stdin and answers with a JSON line per part and one at the end, so that the
parts before a crash have arrived. `isolation.py` starts it and ends it. Nothing of a file is ever unpickled.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, astuple
from typing import Any

from agentctx.memory.errors import InputError
from agentctx.memory.loaders.table import reader_of

ORPHAN_SECONDS = 30  # how long after its time a worker lives on whose parent was killed


def main() -> None:
    """Serve jobs until stdin closes. Arguments: seconds, bytes of address space, characters, each per job."""
    seconds, memory_bytes, characters = map(int, sys.argv[1:])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    for line in sys.stdin.buffer:
        signal.alarm(seconds + ORPHAN_SECONDS)
        for reply in _answer(json.loads(line), characters):
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
        signal.alarm(0)


def _answer(job: dict[str, Any], characters: int) -> Iterator[dict[str, Any]]:
    """The parts, then `end` with the error that stopped the reader, if one did.

    Of more than `characters` the part that goes beyond is the first that is left out.
    """
    error: InputError | None = None
    told = 0
    try:
        with open(job["path"], "rb") as file:
            for part in reader_of(job["reader"])(file, job["encoding"]):
                told += len(part.text)
                if told > characters:
                    hint = "split the file, or name the parts that matter"
                    message = f"more than {characters:,} characters of text"
                    raise InputError(message, code="too_large", hint=hint)
                yield {
                    "text": part.text,
                    "locators": [astuple(at) for at in part.locators],
                    "notices": [asdict(notice) for notice in part.notices],
                }
    except InputError as stopped:
        error = stopped
    except MemoryError:
        hint = "split the file, or name the parts that matter"
        error = InputError("needs more memory than a reader may use", code="too_large", hint=hint)
    yield {"end": error and {"message": error.message, "code": error.code, "hint": error.hint}}


if __name__ == "__main__":
    main()
