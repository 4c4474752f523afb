"""Tasks with one right answer, in the manner of RULER: files of its generator, or texts made here.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654.
Scored as there: the share of the answers that the reply holds, or, for questions of reading, whether it holds
any. Ours: several keys, several values of one key, and chains of variables, over nonsense sentences.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from agentctx.memory.errors import InputError

Count = Callable[[str], int]
REPLY = 48  # tokens of a reply, unless its answers are longer
KEYS = 8
_PLACES = (
    "harbour",
    "mill",
    "quarry",
    "chapel",
    "orchard",
    "foundry",
    "lighthouse",
    "market",
    "tannery",
    "bridge",
    "archive",
    "stable",
)
_PEOPLE = (
    "baker",
    "clerk",
    "pilot",
    "mason",
    "weaver",
    "doctor",
    "farmer",
    "sailor",
    "teacher",
    "painter",
    "miner",
    "gardener",
)
_DEEDS = ("visited", "left", "described", "painted", "measured", "bought", "guarded", "passed")
_KINDS = ("old", "grey", "narrow", "quiet", "distant", "crooked", "wooden", "damp", "famous", "empty")


@dataclass(frozen=True, slots=True)
class Item:
    """`prompt` ends where the reply begins. `every`: each answer counts, else one is enough."""

    name: str
    task: str
    prompt: str
    answers: tuple[str, ...]
    every: bool = True

    def score(self, reply: str) -> float:
        """From 0.0 to 1.0."""
        held = [answer.lower() in reply.lower() for answer in self.answers]
        return sum(held) / len(held) if self.every else float(any(held))


def items(folders: Sequence[Path], count: Count, length: int, most: int, seed: int = 0) -> list[Item]:
    """At most `most` items that fill at least half of `length` tokens and leave room for the reply.

    From the files; made here where these have none of that size.
    """
    fitting: dict[str, list[Item]] = {}
    for item in _written(folders):
        if length < 2 * len(item.prompt) and length // 2 < count(item.prompt) <= length - REPLY * 3:
            fitting.setdefault(item.task, []).append(item)
    if not fitting:
        for item in made(count, length - 2 * REPLY, -(-most // len(MAKERS)), seed):
            fitting.setdefault(item.task, []).append(item)
    turns = zip_longest(*fitting.values())
    return [item for turn in turns for item in turn if item is not None][:most]


def _written(folders: Sequence[Path]) -> Iterator[Item]:
    """Rows with `id`, `task`, `context`, `answers`, perhaps `answer_prefix`, and a `metric` of RULER."""
    for path in sorted(path for folder in folders for path in folder.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if not str(row.get("metric", "")).startswith("string_match") or "context" not in row:
                    continue
                prompt = row["context"] + row.get("answer_prefix", "")
                every = not row["task"].startswith("qa")
                item = Item(row["id"], row["task"], prompt.rstrip(), tuple(row["answers"]), every)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}, line {number}, is no task: {error}",
                    code="corrupt",
                    source=str(path),
                    hint="correct the line, or name another folder as --data",
                ) from error
            yield item


def made(count: Count, length: int, each: int, seed: int = 0) -> Iterator[Item]:
    """`each` items of every kind, of about `length` tokens."""
    for task, maker in MAKERS.items():
        for number in range(each):
            chance = random.Random(f"{seed} {task} {length} {number}")
            facts, question, answers = maker(chance)
            room = length - count(question) - count("\n".join(facts))
            text = _scattered(chance, list(_filler(chance, count, room)), facts)
            yield Item(f"{task}-{length}-{number}", task, f"{text}\n\n{question}", answers)


def _scattered(chance: random.Random, filler: list[str], facts: list[str]) -> str:
    """The facts at random places, in their order: a chain is one."""
    places = sorted(chance.randrange(len(filler) + 1) for _ in facts)
    found = list(filler)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        found.insert(place, fact)
    return " ".join(found)


def _filler(chance: random.Random, count: Count, room: int) -> Iterator[str]:
    while True:
        person, deed, kind, place = map(chance.choice, (_PEOPLE, _DEEDS, _KINDS, _PLACES))
        sentence = f"The {person} {deed} the {kind} {place}."
        room -= count(" " + sentence)
        if room < 0:
            return
        yield sentence


def _number(chance: random.Random) -> str:
    return str(chance.randrange(100_000, 1_000_000))


def _keys(chance: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    places = chance.sample(_PLACES, KEYS)
    numbers = [_number(chance) for _ in places]
    facts = [f"The code of the {place} is {number}." for place, number in zip(places, numbers, strict=True)]
    asked = chance.randrange(KEYS)
    return facts, f"As the text says, the code of the {places[asked]} is", (numbers[asked],)


def _values(chance: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    place, *others = chance.sample(_PLACES, 3)
    numbers = [_number(chance) for _ in range(4)]
    facts = [f"A code of the {place} is {number}." for number in numbers]
    facts += [f"A code of the {other} is {_number(chance)}." for other in others]
    return facts, f"As the text says, the four codes of the {place} are", tuple(numbers)


def _chain(chance: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    names = ["".join(chance.sample("BCDFGHJKLMNPQRSTVWXZ", 4)) for _ in range(4)]
    number = _number(chance)
    facts = [f"{names[0]} is {number}."]
    facts += [f"{new} is the same as {old}." for old, new in zip(names, names[1:], strict=False)]
    return facts, f"As the text says, the four names that stand for {number} are", tuple(names)


MAKERS: dict[str, Callable[[random.Random], tuple[list[str], str, tuple[str, ...]]]] = {
    "keys": _keys,
    "values": _values,
    "chain": _chain,
}
