"""Does a text say what an answer says? Decided by code, word by word, never by asking a model.

An answer repeats words of its question and adds its own. What it adds is its claim: a span supports the
answer if every word added, and every number, stands in the span. This is strict on purpose. A paraphrase is
refused although it may be right; the span is shown anyway, so a refusal costs a sentence, while a wrong
sentence would cost trust. It proves that the words are there, not that the claim follows from them.
"""

from __future__ import annotations

import re
import unicodedata

from agentctx.memory.lexical import terms

# English words that carry no claim. "no", "not" and "never" do carry one. Words of other languages all
# count, which makes the check stricter there, never looser.
_FUNCTION_WORDS = frozenset(
    terms(
        "a an the this that these those there here it its he him his she her hers they them their we us our "
        "you your i me my who whom whose which what when where why how of in on at by to from for with about "
        "into onto as than then and or but so if be is are was were been being am do does did have has had "
        "can could will would shall should may might must also such s t "
        "call called name named know known locate located answer question text passage"
    )
)
_CLAUSE_END = re.compile(r"\s*(?:[,;:](?=\s)|[，；：、](?=.)|\s[-–—](?=\s)|[—(（])")
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def content_words(text: str) -> frozenset[str]:
    """The index terms of a text that carry meaning, stemmed and case-folded."""
    return frozenset(terms(text)) - _FUNCTION_WORDS


def claim(answer: str, question: str) -> frozenset[str]:
    """The words that an answer adds to its question, and its numbers as written (4,500 as 4500).

    Empty for an answer that only repeats the question: it says nothing.
    """
    asked = _numbers(question) | content_words(question)
    return (content_words(answer) | _numbers(answer)) - asked


def supported_share(answer: str, span: str, question: str) -> float:
    """The part of the answer's claim that stands in the span, from 0.0 to 1.0; 0.0 for an empty claim."""
    said = claim(answer, question)
    return len(said & (content_words(span) | _numbers(span))) / len(said) if said else 0.0


def supports(answer: str, span: str, question: str) -> bool:
    """True if the answer claims something and every word and number of the claim stands in the span."""
    return supported_share(answer, span, question) == 1.0


def supported_part(answer: str, span: str, question: str) -> str:
    """The longest beginning of the answer, cut where a clause ends, that the span supports; "" if none.

    A small model states the fact and goes on inventing ("Montreal, Canada, in front of a crowd of"): what
    comes after the first unsupported clause is left out, an end cut off by the token limit with it.
    """
    ends = [match.start() for match in _CLAUSE_END.finditer(answer)]
    for end in (len(answer), *reversed(ends)):
        if supports(answer[:end], span, question):
            return answer[:end]
    return ""


def _numbers(text: str) -> frozenset[str]:
    """Numbers whole: the terms of 3.5 and 5.3 are the same two digits, these are not."""
    return frozenset(
        number.replace(",", "") if _THOUSANDS.fullmatch(number) else number
        for number in _NUMBER.findall(unicodedata.normalize("NFKC", text))
    )
