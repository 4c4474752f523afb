"""The question as a small model answers it best: one passage, one line, nothing to decide.

A model of 135M parameters cannot be trusted with JSON, passage numbers or yes and no. It is asked for a few
words, and code does the rest: `clean_short_answer` takes the first sentence out of what it wrote, and
`grounding.supported_part` decides how much of it may be shown. On sixty development questions six wordings,
with and without a forced beginning, did not differ beyond chance (0.48 to 0.55 right); worked
examples cost tokens and gave 0.30 to 0.47. So this is the shortest that keeps the passage between delimiters.
"""

from __future__ import annotations

import re

from langchain_core.messages import BaseMessage, HumanMessage

from agentctx.memory.errors import ConfigError
from agentctx.memory.sentences import sentences

VERSION = 1  # part of the cache key: change it with the wording
MAX_TOKENS = 32  # of the reply; what a small model says after that is invented

_PROMPT = """\
<{fence}>
{passage}
</{fence}>

Answer in a few words, using only the text above.
Question: {question}"""

_PREAMBLE = re.compile(
    r"(?:(?:based on|according to|in) the (?:given |provided )?(?:text|passage)(?: above)?,\s+"
    r"|(?:the )?(?:short )?answer(?: to (?:your|the|this) question)?\s*(?:is\b\s*:?|:)\s*"
    r"|[aA]:\s*)",
    re.IGNORECASE,
)
_QUOTES = "\"'“”‘’«»`*"


def short_answer_messages(question: str, passage: str, *, fence: str) -> list[BaseMessage]:
    """The prompt: the passage between delimiters it cannot know, the question last.

    `fence` is the tag of the delimiters, drawn at random by the caller. Raises `ConfigError` if the passage
    contains it.
    """
    if fence in passage:
        raise ConfigError(f"the passage contains the delimiter {fence!r}", hint="draw another")
    asked = question.strip()
    if asked[-1:].isalnum():  # without its mark, a small model goes on writing the question
        asked += "?"
    return [HumanMessage(_PROMPT.format(fence=fence, passage=passage.strip(), question=asked))]


def clean_short_answer(text: str) -> str:
    """The first sentence of a reply without the words that announce it; "" if nothing usable is left."""
    line = text.strip().split("\n", 1)[0]
    while preamble := _PREAMBLE.match(line):
        line = line[preamble.end() :]
    if not line.strip():
        return ""
    start, end = sentences(line)[0]
    answer = line[start:end].strip()
    if answer[:1] in _QUOTES and answer.rstrip(".")[-1:] in _QUOTES:
        answer = answer.rstrip(".").strip(_QUOTES)
    return "" if _loops(answer) else answer


def _loops(answer: str) -> bool:
    """True for the small model's way of failing: the same words over and over."""
    words = answer.casefold().split()
    return len(words) >= 8 and len(set(words)) <= len(words) // 2
