"""A merge that fails: what the joined notes leave out is spread over all of them, counted and said."""

import re

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ModelError
from agentctx.memory.types import Document
from agentctx.testing import ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.definition.folder import open_definition
from agentctx.workflows.notes import MAX_POINTS

SENTENCE = r"Sentence (\d+) speaks of rain and no more\."
FLOW = """\
version: 1
name: points
nodes:
  cut: {type: split}
  note: {type: read, with: {schema: points}}
  all: {type: reduce}
edges:
  - {source: START, target: cut}
  - {source: cut, map: {over: cut, as: part, node: note}}
  - {source: note, target: all}
  - {source: all, target: END}
"""


def hay(sentences):
    return " ".join(f"Sentence {n} speaks of rain and no more." for n in range(sentences))


def summariser(*, each, merge, words=0):
    """Notes the first `each` sentences of a text, at length; `merge` answers what has notes to merge."""

    def reply(messages):
        if str(messages[0].text).startswith("You are given notes"):
            return merge(messages)
        [text] = fenced_texts(str(messages[-1].text))
        found = list(re.finditer(SENTENCE, text))[:each]
        points = [{"text": f"point {m[1]}" + " again" * words, "quotes": [m[0]]} for m in found]
        return {"points": points, "no_information": not points}

    return reply


def refused(messages):
    return ModelError("no", code="refused")


def opened(reply, sentences, context):
    model = scripted_model(ScriptedChat(reply=reply), context=context)
    return Context.open([Document.of(hay(sentences), "hay.txt")], model=model, ephemeral=True)


def reads_of(ctx):
    return [prompt for prompt in ctx.model.chat.prompts if 'name="notes 1"' not in prompt]


def strategies(tmp_path):
    (tmp_path / "flow.yaml").write_text(FLOW)
    return {"map_reduce": "map_reduce", "definition": open_definition(tmp_path / "flow.yaml")}


@pytest.mark.parametrize("kind", ["map_reduce", "definition"])
@pytest.mark.parametrize(("each", "reads"), [(8, 5), (1, 40)])
def test_a_failed_merge_leaves_points_of_all_reads_and_says_how_many_it_left_out(kind, each, reads, tmp_path):
    chat = summariser(each=each, merge=refused)
    ctx = opened(chat, 1200 if reads < 10 else 4000, 3000 if reads < 10 else 1500)
    strategy = strategies(tmp_path)[kind]
    answer = ctx.ask("What?", strategy=strategy) if kind == "definition" else ctx.summarize(strategy=strategy)
    asked = reads_of(ctx)
    found = sum(min(each, len(re.findall(SENTENCE, prompt))) for prompt in asked)
    assert len(asked) >= reads
    shown = [int(number) for number in re.findall(r"point (\d+)", answer.text)]
    assert len(shown) == min(found, MAX_POINTS)
    assert answer.coverage.not_forwarded == found - len(shown) > 0
    assert answer.status == "partial"
    codes = [w.code for w in answer.warnings]
    assert {"merge_failed", "failed_refusal"} <= set(codes)
    assert any("were left out" in w.message for w in answer.warnings)
    last = max(int(number) for prompt in asked for number in re.findall(SENTENCE, prompt)[:1])
    assert max(shown) >= last * 3 // 4, "the end of the text is there"
    assert min(shown) <= last // 4


def test_what_a_merge_is_not_shown_is_counted():
    """Points of more tokens than a record has room for."""
    seen = []

    def merge(messages):
        quotes = re.findall(r'"(Sentence [^"]+)"', str(messages[-1].text))
        seen.append(len(quotes))
        return {"points": [{"text": "all", "quotes": quotes[:1]}]}

    ctx = opened(summariser(each=24, merge=merge, words=12), 400, 3000)
    answer = ctx.summarize(strategy="map_reduce")
    found = sum(min(24, len(re.findall(SENTENCE, prompt))) for prompt in reads_of(ctx))
    assert answer.status == "complete"
    assert answer.coverage.not_forwarded == found - sum(seen) > 0
    assert len(seen) == 1
