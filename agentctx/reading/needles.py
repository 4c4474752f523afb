"""Texts with facts hidden in them, and questions in other words: what calibrating a model is done on.

A single needle discriminates nothing: any odd sentence stands out. So every text holds many facts of a few
kinds about a few people, and a question is right for one of them only: others are about the same person, or
say the same of another. Questions share the name with the fact and, where they can, nothing else, because
heads that find the same word again do not find what is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


_FIRST = _words(
    "Ada Bruno Carla Dmitri Elena Farid Greta Hugo Ines Jonas Katja Luis Mina Noor Otto Petra Quentin Rosa "
    "Stefan Thea Umar Vera Willem Yara"
)
_LAST = _words(
    "Albrecht Bauer Castellan Dvorak Eriksen Fontaine Gruber Halvorsen Iwasaki Janssen Kowalski Lindqvist "
    "Moreau Novak Okafor Petrov Quint Rasmussen Santoro Takeda Ulrich Vargas Weiss Zielinski"
)
_VALUES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "job": _words("carpenter dentist pilot baker surveyor plumber florist notary welder translator"),
        "town": _words("Lisbon Tampere Ghent Valencia Odense Graz Bergen Toledo Utrecht Cork"),
        "food": _words("peanuts shellfish sesame celery mustard walnuts lupin barley almonds cashews"),
        "instrument": _words("cello trumpet harp oboe clarinet violin banjo accordion flute bassoon"),
        "colour": _words("crimson turquoise olive violet silver orange beige maroon indigo black"),
        "animal": _words("parrot tortoise ferret greyhound hamster goat rabbit gecko pony cat"),
        "language": _words("Basque Finnish Korean Swahili Welsh Tamil Greek Icelandic Turkish Czech"),
        "prize": _words("Harland Pemberton Sorel Wexford Calloway Brandt Lockhart Tremaine Ashby Moritz"),
        "sport": _words("fencing rowing judo badminton archery curling handball squash polo karate"),
        "dish": _words("lasagne goulash paella risotto dumplings chowder moussaka ramen quiche tacos"),
    }
)
# What a fact says, its value, and what is asked. The kinds of each half of the needles are its own.
_KINDS: Sequence[Sequence[tuple[tuple[str, ...], str, tuple[str, ...]]]] = (
    (
        (("{} earns a living as a {}.", "By trade, {} is a {}."), "job", ("What is the profession of {}?",)),
        (
            ("{} must never eat {}.", "The kitchen was told that {} cannot have {}."),
            "food",
            ("What is {} allergic to?",),
        ),
        (
            ("{} drives to the site in a {} van.", "The van of {} was painted {} last spring."),
            "colour",
            ("Which colour is the vehicle that belongs to {}?",),
        ),
        (
            ("{} was handed the {} medal.", "The jury gave {} the {} medal."),
            "prize",
            ("Which award did {} win?",),
        ),
        (
            ("Calls for {} go to extension {}.", "Colleagues reach {} at extension {}."),
            "number",
            ("What has to be dialled to phone {}?",),
        ),
        (
            ("{} goes {} twice a week.", "On free evenings {} does {}."),
            "sport",
            ("Which sport is practised by {}?",),
        ),
    ),
    (
        (
            ("{} grew up in {}.", "The childhood home of {} stood in {}."),
            "town",
            ("Which city does {} come from?",),
        ),
        (
            ("{} practises the {} every evening.", "Neighbours hear {} rehearse on the {}."),
            "instrument",
            ("What kind of music can {} make?",),
        ),
        (
            ("{} shares the flat with a {}.", "A {1} waits at home for {0}."),
            "animal",
            ("Which pet does {} keep?",),
        ),
        (
            ("{} is fluent in {}.", "At home {} talks in {}."),
            "language",
            ("Which foreign tongue was learnt by {}?",),
        ),
        (
            ("{} sits in room {}.", "The desk of {} is in room {}."),
            "number",
            ("Where is the office of {}?",),
        ),
        (
            ("{} always orders {}.", "Nothing pleases {} like a plate of {}."),
            "dish",
            ("What is the favourite meal of {}?",),
        ),
    ),
)
_NOUNS = _words(
    "harbour market library station orchard bridge museum workshop theatre garden mill quarry chapel "
    "vineyard factory tower canal meadow archive ferry"
)
_LINES = (
    "The {} stands a short walk from the {}.",
    "Every autumn the {} is repaired before the {}.",
    "From the {} a narrow road leads down to the {}.",
    "Visitors of the {} seldom notice the {}.",
    "The old {} was rebuilt after the flood, unlike the {}.",
    "Nobody remembers why the {} closes earlier than the {}.",
    "A map of the {} hangs at the entrance of the {}.",
    "In summer the {} is busier than the {}.",
    "The council discussed the {} and postponed the {}.",
    "Rain fell on the {} while fog covered the {}.",
    "Most of the money went to the {} and little to the {}.",
    "Behind the {} lies what is left of the {}.",
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact at `text[start:end]` of its haystack, what asks for it, and what the answer must hold."""

    question: str
    value: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text, and the needles in it."""

    text: str
    needles: tuple[Needle, ...]


def haystack(
    draw: random.Random,
    length: int,
    count: Callable[[str], int],
    *,
    half: int,
    people: int = 4,
    filler: Sequence[str] = (),
) -> Haystack:
    """A text of about `length` tokens as `count` counts them, or as many as its facts take: every fact of a
    half about every person.

    The facts stand in any order, from the beginning to the end. `half` 0 or 1: the kinds of the other are
    different ones. `filler`: sentences to stand between them; without, they are made up.
    """
    facts = _facts(draw, half, people)
    lines = [(fact, needle) for fact, needle in facts]
    left = length - count(" ".join(fact for fact, _ in facts))
    between: list[str] = []
    while left > 0:
        more = draw.choice(filler) if filler else draw.choice(_LINES).format(*draw.sample(_NOUNS, 2))
        left -= count(" " + more) + 1
        between.append(more)
    for index, line in enumerate(between[:-1]):
        lines.insert(draw.randrange(index + len(facts) + 1), (line, None))
    text, needles = "", []
    for line, needle in lines:
        if needle:
            needles.append(Needle(*needle, len(text), len(text) + len(line)))
        text += line + " "
    return Haystack(text.rstrip(), tuple(needles))


def _facts(draw: random.Random, half: int, people: int) -> list[tuple[str, tuple[str, str] | None]]:
    """Facts in any order, each with its question and value. Names differ in both parts."""
    names = [
        " ".join(pair) for pair in zip(draw.sample(_FIRST, people), draw.sample(_LAST, people), strict=True)
    ]
    found: list[tuple[str, tuple[str, str] | None]] = []
    for statements, what, questions in _KINDS[half]:
        values = _VALUES.get(what) or [str(number) for number in draw.sample(range(1000, 9999), people)]
        for name, value in zip(names, draw.sample(list(values), people), strict=True):
            fact = draw.choice(statements).format(name, value)
            found.append((fact, (draw.choice(questions).format(name), value)))
    draw.shuffle(found)
    return found
