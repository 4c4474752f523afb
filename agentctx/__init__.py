"""agentctx: answers over text far larger than a model's window, with citations checked by code."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentctx.api import Context as Context
    from agentctx.memory.types import Answer as Answer
    from agentctx.memory.types import Budget as Budget
    from agentctx.memory.types import Document as Document
    from agentctx.reading.engine import Engine as Engine
    from agentctx.workflows.registry import build as build

_HOME = {
    "Answer": "agentctx.memory.types",
    "Budget": "agentctx.memory.types",
    "Context": "agentctx.api",
    "Document": "agentctx.memory.types",
    "Engine": "agentctx.reading.engine",
    "build": "agentctx.workflows.registry",
}
__all__ = ["Answer", "Budget", "Context", "Document", "Engine", "build"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import public names on first use: `import agentctx.kernels` must not cost LangGraph."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
