"""LangChain uploads every run, document text included, when one of its tracing variables is set."""

from __future__ import annotations

import os

from agentctx.memory.types import Notice

TRACING = ("LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2")


def tracing_notices(*, offline: bool) -> tuple[Notice, ...]:
    """A notice for each variable that sends text away. `offline` turns them off in this process."""
    active = [name for name in TRACING if os.environ.get(name, "").lower() == "true"]
    if offline:
        for name in active:
            os.environ[name] = "false"
        return ()
    return tuple(
        Notice("tracing", f"{name}=true: document text leaves this machine; unset it, or use --offline")
        for name in active
    )
