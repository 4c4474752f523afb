"""LangChain uploads every run, document text included, when one of its tracing variables is set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from agentctx.memory.types import Notice

RETIRED = "LANGCHAIN_TRACING"
TRACING = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", RETIRED, "LANGCHAIN_TRACING_V2")


def tracing_notices(*, offline: bool) -> tuple[Notice, ...]:
    """A notice for each variable that sends text away; `offline` runs heed none (see `kept_here`)."""
    active = [name for name in TRACING if os.environ.get(name, "").lower() == "true"]
    return tuple(
        Notice("tracing", f"{name}=true: document text leaves this machine; unset it, or use --offline")
        for name in active
        if not offline
    )


@contextmanager
def kept_here(offline: bool) -> Iterator[None]:
    """If `offline`, what runs inside uploads nothing, whatever the environment says.

    Changing the variables would not do: langsmith remembers how it found them first.
    """
    if not offline:
        yield
        return
    from langsmith import tracing_context

    if os.environ.get(RETIRED):
        os.environ[RETIRED] = "false"  # with it langchain refuses to run where tracing is off
    with tracing_context(enabled=False):
        yield
