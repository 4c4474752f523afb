"""The one error of this floor beside ValueError, TypeError and IndexError."""


class KernelUnavailable(RuntimeError):
    """An implementation that was asked for by name cannot run; the message says why."""


class Uncovered(Exception):
    """An implementation does not serve these arguments. Raised before any work; the dispatcher catches it."""
