"""Every error agentctx raises on purpose.

AgentctxError
├── ConfigError      a setting is out of range, a name is unknown, a choice cannot work
├── InputError       something to read cannot be read (missing, binary, encrypted, too large, …)
├── BudgetExceeded   a run reached a limit the caller set; carries the partial answer
├── ModelError       the model or its endpoint failed (absent, overflow, timeout, out of memory)
├── StoreError       something kept on disk is corrupt, locked, or of another version
└── WorkspaceError   a path points outside its workspace

The kernels raise `ValueError` and `TypeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentctx.memory.types import Answer


class AgentctxError(Exception):
    """Base of all. `code` is stable and machine-readable, `hint` says what to do about it."""

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.hint = hint


class ConfigError(AgentctxError):
    """A setting is out of range, a name is unknown, or a choice cannot work."""

    code = "config"


class InputError(AgentctxError):
    """A source cannot be read.

    `code` is one of: not_found, permission, binary, empty, unsupported, missing_extra, too_large,
    encrypted, corrupt, timeout, outside.
    """

    code = "unsupported"

    def __init__(self, message: str, *, code: str, source: str = "", hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.source = source


class BudgetExceeded(AgentctxError):
    """A run would pass a limit. `partial` is what was found until then, if anything was."""

    code = "budget"

    def __init__(self, message: str, *, partial: Answer | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.partial = partial


class ModelError(AgentctxError):
    """The model or its endpoint failed.

    `code` is one of: not_fetched, unavailable, auth, overflow, rate_limit, timeout, malformed,
    truncated_by_endpoint, wrong_hash, no_space, out_of_memory, refused, unsupported.
    `retry_after` is the wait in seconds that the endpoint asked for.
    """

    code = "unavailable"

    def __init__(
        self, message: str, *, code: str | None = None, hint: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after = retry_after


class StoreError(AgentctxError):
    """Something kept on disk is corrupt, locked, or written by another version."""

    code = "store"


class WorkspaceError(AgentctxError):
    """A path points outside its workspace."""

    code = "outside"
