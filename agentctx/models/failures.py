"""Errors of a running model that more than one of its kinds raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.exceptions import ContextOverflowError

from agentctx.memory.errors import ModelError
from agentctx.runtime.memory import is_out_of_memory


class ContextOverflow(ModelError, ContextOverflowError):
    """The prompt and the requested answer do not fit the window; both trees of errors know it."""

    code = "overflow"


def overflow(prompt: int, answer: int, context: int) -> ContextOverflow:
    """The error for `prompt` and `answer` tokens in a window of `context`."""
    return ContextOverflow(
        f"a prompt of {prompt} tokens and an answer of up to {answer} exceed the window of {context} tokens",
        hint="split the text, ask for a shorter answer, or choose a model with a larger window",
    )


def out_of_memory(name: str) -> ModelError:
    return ModelError(
        f"not enough memory for the model {name}",
        code="out_of_memory",
        hint="close other programs, shorten the prompt, or choose a smaller model",
    )


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """What the allocators raise, as the error above."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(name) from error
        raise
