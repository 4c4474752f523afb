"""Counting tokens: exactly for a local model, by estimate for an endpoint whose tokenizer we do not have."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from langchain_core.messages import BaseMessage, SystemMessage

from agentctx.models.template import ChatTemplate

_MESSAGE = 8  # tokens of a template around one message, generously
_PROMPT = 24  # and around the whole: a default system prompt, the opening of the answer

# One match is one token of the estimate: the first letters of a word, then pairs (long words are rare ones),
# a digit, a few blanks, a tab, a blank before a digit, a mark up to four times, any other character. Checked
# on fifteen kinds of text against a small vocabulary; a large one needs fewer.
_TOKEN = re.compile(
    r"(?<![a-zA-Z])(?:[A-Z]?[a-z]{1,5}|[A-Z]{1,4})|[A-Z]?[a-z]{1,2}|[A-Z]"
    r"|\d|\n+|[^\S\n]{2,4}|\t|[^\S\n](?=\d)|([\x21-\x2f:-@\[-`{-~])\1{0,3}|[^\x00-\x7f]"
)
_WIDE = re.compile(r"[\u2e80-\uffff]")  # East Asian: up to two tokens
_ASTRAL = re.compile(r"[\U00010000-\U0010ffff]")  # emoji and rare scripts: up to three
_BLOB = re.compile(r"[a-zA-Z0-9]{24}")  # base64, hashes: pieces of a character or two
_WEIGHTS = ((_TOKEN, 1), (_WIDE, 1), (_ASTRAL, 2), (_BLOB, 8))


class TemplateCounter:
    """The number of ids that `LocalChat` sends."""

    exact = True

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def count_text(self, text: str) -> int:
        """Tokens of the bare text."""
        return len(self._template.encode_text(text))

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens of the finished prompt."""
        return len(self._template.encode(messages))


class EstimateCounter:
    """An estimate from characters and words that rather counts too many: a plan must be a ceiling."""

    exact = False

    def count_text(self, text: str) -> int:
        """Tokens of the bare text, estimated."""
        return _estimate(text)

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens of the finished prompt, estimated."""
        return _PROMPT + sum(_MESSAGE + self._of(message) for message in messages)

    def _of(self, message: BaseMessage) -> int:
        text = str(message.text)
        return _instructions(text) if isinstance(message, SystemMessage) else _estimate(text)


def _estimate(text: str) -> int:
    return sum(weight * len(kind.findall(text)) for kind, weight in _WEIGHTS)


# Ten thousand reads are sent with the same instructions, which are longer than a short chunk.
_instructions = functools.lru_cache(maxsize=32)(_estimate)


def least_tokens(messages: Sequence[BaseMessage]) -> int:
    """Tokens that no usual tokenizer goes below: one per word, because merges do not cross blanks."""
    return sum(len(str(message.text).split()) for message in messages)
