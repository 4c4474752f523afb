"""What the processes of the kill tests do: run to the end, die hard at an event, or resume."""

import os
import signal

from conformance_cases import Case, haystack, paths_in

from agentctx.api import Context
from agentctx.memory.types import Document

TEXT = haystack(260)


def opened_at(url, folder, window):
    """The same text behind a real endpoint, with real files in `folder`."""
    return Context.open(
        [Document.of(TEXT, "hay.txt")],
        model="openai:scripted",
        base_url=url,
        window=window,
        paths=paths_in(folder),
    )


def run(strategy, kind, url, folder, window, place):
    """`place` is (event, node, which occurrence): the process is gone before that node goes on."""
    event, node, count = place
    met = 0

    def listen(happened):
        nonlocal met
        if (happened.event, happened.node) == (event, node):
            met += 1
            if met == count:
                os.kill(os.getpid(), signal.SIGKILL)

    Case(strategy, kind).run(opened_at(url, folder, window), run_id="r", on_event=listen)


def resume(folder):
    Context.resume("r", paths=paths_in(folder))
