"""Find out which heads of a model retrieve, and how long a text it still reads well.

Heads are chosen on needles of one half and kept while needles of other kinds gain (`runtime.retrieve.heads`);
each half chooses once, and the choice that does better on the other is taken. Then texts of growing length
are asked for all of their facts, until the model names fewer than nine in ten.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agentctx.memory.errors import InputError
from agentctx.memory.sentences import sentences
from agentctx.models.calibration import Calibration
from agentctx.reading.needles import Haystack, Needle, haystack
from agentctx.runtime.retrieve.heads import Asked, alone, chosen, middle, together, weighed
from agentctx.runtime.retrieve.spans import smoothed

if TYPE_CHECKING:
    from agentctx.reading.engine import Engine

TOKENS = 900  # of a text in which heads are looked for
TEXTS, QUESTIONS = 6, 10  # texts of each half, questions of each text
SHORTEST = 256  # tokens of the first text that is asked for its facts; each further one is twice as long
RECALL = 0.9
ANSWER = 32  # tokens that an answer may take to name a fact
ROOM = 256  # tokens of the window that are left for what stands around a text, a question and an answer

Say = Callable[[str, int, int | None], None]  # a stage, how far it is, and of how much


def calibrate(
    engine: Engine,
    *,
    data: Path | None = None,
    seed: int = 0,
    texts: int = TEXTS,
    questions: int = QUESTIONS,
    say: Say = lambda *_: None,
) -> Calibration:
    """Calibrate a model. `data`: a folder of .txt files whose sentences stand between the facts.

    `texts` for each half, `questions` of each; `say` is told how far it is. The same arguments give the same
    calibration. Raises InputError for a folder without texts, ModelError as reading and scoring do.
    """
    filler = _sentences_of(data) if data else ()
    tokens = min(TOKENS, engine.weights.context - ROOM)
    halves: list[list[Asked]] = []
    for half in (0, 1):
        asked: list[Asked] = []
        for number in range(texts):
            say("looking for facts", half * texts + number, 2 * texts)
            draw = random.Random(f"{seed} {half} {number}")
            hay = haystack(draw, tokens, engine.count, half=half, filler=filler)
            asked += _asked(engine, hay, draw.sample(hay.needles, min(questions, len(hay.needles))))
        halves.append(asked)
    say("choosing heads", 0, None)
    layers, width = halves[0][0].mass.shape[:2]
    found = []
    for one, other in (halves, halves[::-1]):
        heads = chosen(one, other)
        found.append((*together(other, weighed(heads, layers, width)), heads, other))
    mrr, first, heads, other = max(found, key=lambda each: each[0])
    before = together(other, middle(layers, width))
    _, hits = alone([*halves[0], *halves[1]])
    shares = torch.stack([each.share for half in halves for each in half]).mean(0)
    recall = _recalls(engine, seed, filler, say)
    good = [length for length, share in recall.items() if share >= RECALL]
    return Calibration(
        model=engine.weights.name,
        layers=layers,
        width=width,
        heads=tuple(heads),
        mrr=round(mrr, 4),
        first=round(first, 4),
        mrr_middle=round(before[0], 4),
        first_middle=round(before[1], 4),
        questions=len(other),
        tokens=tokens,
        seed=seed,
        filler=str(data) if data else "generated",
        recall=recall,
        reliable=max(good, default=None),
        hits=_rounded(hits),
        shares=_rounded(shares),
    )


def _asked(engine: Engine, hay: Haystack, needles: Sequence[Needle]) -> list[Asked]:
    """What every head looks at when these needles are asked for."""
    tokens = engine.tokens
    with engine.read(hay.text, keep=False) as reading:
        text = reading.texts[0]
        cut = sentences(hay.text)
        spans = [text.tokens(*pair) for pair in cut]
        between = len(tokens.data(reading.frame.between).ids)
        empty = reading.look(reading.frame.question(tokens, ""), rows=1)
        found = []
        for needle in needles:
            asked = reading.frame.question(tokens, needle.question)
            mass = reading.look(asked, rows=len(asked) - between)
            place = text.tokens(needle.start, needle.end)
            share = mass[..., place.start : place.stop].sum(-1)
            within = range(text.first, text.first + len(text.offsets))
            less = smoothed(mass - empty, [within])[..., within.start : within.stop].half()
            right = next(i for i, (a, b) in enumerate(cut) if a <= needle.start and needle.end <= b)
            shifted = [range(one.start - text.first, one.stop - text.first) for one in spans]
            found.append(Asked(less, shifted, right, share))
    return found


def _recalls(engine: Engine, seed: int, filler: Sequence[str], say: Say) -> dict[int, float]:
    """Tokens of a text, and the share of its facts that the model names; up to the first below `RECALL`."""
    found: dict[int, float] = {}
    length = SHORTEST
    while length <= engine.weights.context - ROOM:
        say(f"asking for facts in {length:,} tokens", 0, None)
        named = [_named(engine, length, half, seed, filler) for half in (0, 1)]
        right = [one for half in named for one in half]
        found[length] = round(sum(right) / len(right), 4)
        if found[length] < RECALL:
            break
        length *= 2
    return found


def _named(engine: Engine, length: int, half: int, seed: int, filler: Sequence[str]) -> list[bool]:
    """Whether each fact about two people is named in the answer to its question."""
    draw = random.Random(f"{seed} {half} {length}")
    hay = haystack(draw, length, engine.count, half=half, people=2, filler=filler)
    with engine.read(hay.text, keep=False) as reading:
        replies = reading.ask_many([needle.question for needle in hay.needles], max_new_tokens=ANSWER)
    both = zip(replies, hay.needles, strict=True)
    return [needle.value.casefold() in reply.text.casefold() for reply, needle in both]


def _sentences_of(folder: Path) -> list[str]:
    found = [
        " ".join(text[start:end].split())
        for file in sorted(folder.rglob("*.txt"))
        for text in [file.read_text(encoding="utf-8", errors="replace")]
        for start, end in sentences(text)
        if 20 <= end - start <= 300
    ]
    if not found:
        raise InputError(
            f"no sentences in .txt files under {folder}", code="empty", hint="name a folder of texts"
        )
    return found


def _rounded(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(float(value), 4) for value in row) for row in table)
