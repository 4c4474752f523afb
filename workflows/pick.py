"""Pick the sentences to show: the verbatim spans of a few passages that answer the question.

Four signals, none a judgement that a small model would have to write down:

- how well the sentence, read under its heading, predicts the question (the Reader's query likelihood);
- the words it shares with the question (BM25);
- its length, because a short sentence seldom holds both what is asked about and the answer;
- how much of a short answer, given from these passages, stands in it. Asked for a few words, a small model
  often names the right place though it words the answer badly.

Without a Reader the other three decide. Within one passage no signal is strong, since all its sentences are
about the matter, and where the question shares words with its passage the Reader adds nothing that could be
measured; it is there for questions in other words. The short answer is worth most. The weights were set on
278 questions; `benchmarks/reading.py` measures on others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from agentctx.memory.lexical import Lexical
from agentctx.memory.sentences import sentences
from agentctx.workflows.grounding import supported_share
from agentctx.workflows.ports import Reader

# In nats per question token, the unit of likelihood.
LEXICAL_WEIGHT = 1.0  # what the sentence that shares most words gets
LENGTH_WEIGHT = 0.3  # per natural logarithm of the length in characters
ANSWER_WEIGHT = 2.0  # what a sentence that holds the whole short answer gets
_LENGTHS = (40, 240)  # characters; outside, length makes no difference
_HEADING = 80  # characters; a longer line is text


@dataclass(frozen=True, slots=True)
class Pick:
    """`passages[passage][start:end]`, one sentence or neighbouring ones; a higher score is better."""

    passage: int
    start: int
    end: int
    score: float
    heading: tuple[int, int] | None = None  # where the line stands that heads it, in the same passage


@dataclass(frozen=True, slots=True)
class Picked:
    """Picks, best first, and the Reader tokens they cost."""

    picks: tuple[Pick, ...]
    computed_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Candidate:
    passage: int
    start: int
    end: int
    ordinal: int  # among the passage's sentences
    text: str  # the sentence
    read: str  # the sentence as the Reader sees it, under its heading
    heading: tuple[int, int] | None


async def pick(
    question: str,
    passages: Sequence[str],
    *,
    reader: Reader | None,
    answer: str = "",
    limit: int = 2,
) -> Picked:
    """The best `limit` sentences of all passages; chosen neighbours become one pick.

    `answer` is a short answer given from these passages, or "". Without a reader, words and length decide.
    """
    candidates, scores = await asyncio.to_thread(_prepare, question, passages)
    computed = reused = 0
    if reader is not None and candidates:
        found = await reader.likelihood(question, [candidate.read for candidate in candidates])
        scores = [score + value for score, value in zip(scores, found.values, strict=True)]
        computed, reused = found.computed_tokens, found.reused_tokens
    scores = [
        score + ANSWER_WEIGHT * supported_share(answer, candidate.text, question)
        for candidate, score in zip(candidates, scores, strict=True)
    ]
    best = sorted(range(len(candidates)), key=lambda position: -scores[position])[:limit]
    picks = _joined([(candidates[position], scores[position]) for position in best])
    return Picked(tuple(picks), computed, reused)


def excerpt(passages: Sequence[str], picks: Sequence[Pick]) -> str:
    """The picks as one text for a model to read: in the order of the passages, each heading once."""
    lines: list[str] = []
    headed: tuple[int, tuple[int, int] | None] | None = None
    for found in sorted(picks, key=lambda found: (found.passage, found.start)):
        passage = passages[found.passage]
        if found.heading and headed != (found.passage, found.heading):
            lines.append(passage[slice(*found.heading)])
        headed = (found.passage, found.heading)
        lines.append(passage[found.start : found.end])
    return "\n".join(lines)


def pick_cost(question: str, passages: Sequence[str], *, reader: Reader | None) -> int:
    """The most Reader tokens `pick` can compute for these passages; additive over passages."""
    if reader is None:
        return 0
    return reader.likelihood_cost(question, [candidate.read for candidate in _candidates(passages)])


def _prepare(question: str, passages: Sequence[str]) -> tuple[list[_Candidate], list[float]]:
    """All candidates, and their scores by words and length."""
    candidates = _candidates(passages)
    words = Lexical([candidate.read for candidate in candidates]).scores(question)
    most = max(words, default=0.0) or 1.0
    shortest, longest = _LENGTHS
    return candidates, [
        LEXICAL_WEIGHT * shared / most
        + LENGTH_WEIGHT * math.log(min(max(len(candidate.text), shortest), longest))
        for candidate, shared in zip(candidates, words, strict=True)
    ]


def _candidates(passages: Sequence[str]) -> list[_Candidate]:
    found: list[_Candidate] = []
    for number, passage in enumerate(passages):
        spans = sentences(passage)
        heading: tuple[int, int] | None = None
        for ordinal, (start, end) in enumerate(spans):
            text = passage[start:end]
            following = spans[ordinal + 1] if ordinal + 1 < len(spans) else None
            if following and _heads(passage, (start, end), following):
                heading = (start, end)
            elif any(map(str.isalnum, text)):  # not a rule or a lone bracket
                read = f"{passage[slice(*heading)]}: {text}" if heading else text
                found.append(_Candidate(number, start, end, ordinal, text, read, heading))
    return found


def _heads(passage: str, line: tuple[int, int], following: tuple[int, int]) -> bool:
    """True if a line is a heading of what follows: short, unpunctuated, on its own, above a longer text."""
    start, end = line
    before, after = passage[:start].rstrip(" \t"), passage[end : following[0]]
    return (
        end - start <= _HEADING < following[1] - following[0]
        and (passage[end - 1].isalnum() or passage[end - 1] in ")]#*")
        and (not before or before.endswith("\n\n"))
        and "\n" in after
    )


def _joined(chosen: Sequence[tuple[_Candidate, float]]) -> list[Pick]:
    """Make one pick of sentences that follow each other in a passage."""
    picks: list[tuple[int, Pick]] = []  # with the ordinal of the pick's last sentence
    for candidate, score in sorted(chosen, key=lambda item: (item[0].passage, item[0].ordinal)):
        new = Pick(candidate.passage, candidate.start, candidate.end, score, candidate.heading)
        if picks and picks[-1][1].passage == new.passage and picks[-1][0] + 1 == candidate.ordinal:
            last = picks.pop()[1]
            new = Pick(new.passage, last.start, new.end, max(last.score, score), last.heading)
        picks.append((candidate.ordinal, new))
    return sorted((found for _, found in picks), key=lambda found: -found.score)
