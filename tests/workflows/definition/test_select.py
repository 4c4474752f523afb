"""The node type `select`, by words and by likelihood."""

import pytest

from agentctx.api import Context
from agentctx.memory.errors import BudgetExceeded, ConfigError
from agentctx.memory.types import Budget, Cost, Document
from agentctx.testing import ScriptedChat, ScriptedReader, finding, scripted_model
from agentctx.workflows.definition.folder import open_definition

NEEDLE = r"The code of (\w+ is \w+)\."
QUESTION = "What is the code of Zed?"
WEIGHING = """\
version: 1
name: weigh
nodes:
  cut: {type: split, with: {chunk_tokens: 100}}
  best: {type: select, with: {k: 1, by: likelihood}, max_visits: 3}
  say: {type: answer}
edges:
  - {source: START, target: cut}
  - {source: cut, target: best}
  - {source: best, target: say}
  - {source: say, match: {path: no_information, cases: {"true": best}, default: END}}
"""
PARAPHRASE = "Which sign was Zed given?"


def haystack(sentences):
    lines = [f"Sentence {n} speaks of this and no more." for n in range(sentences)]
    lines[sentences // 2] = "The code of Zed is K77."
    return " ".join(lines)


def flow_in(folder, text=WEIGHING):
    (folder / "flow.yaml").write_text(text)
    return open_definition(folder / "flow.yaml")


def kept(ctx, question, flow):
    plan = ctx.plan(question, strategy=flow)
    assert not ctx.model.chat.prompts, "a plan calls no model"
    answer = ctx.ask(question, strategy=flow)
    used = answer.usage
    assert Cost(used.calls, used.input_tokens, used.output_tokens).within(plan.ceiling)
    return plan, answer


def weighing(reader, text):
    chat = ScriptedChat(reply=finding(NEEDLE))
    model = scripted_model(chat, context=1500, reader=reader)
    return chat, Context.open([Document.of(text, "hay.txt")], model=model, ephemeral=True)


def test_select_by_likelihood_finds_what_the_words_do_not(tmp_path):
    flow = flow_in(tmp_path)
    text = haystack(400).replace("Sentence 7 ", "Which sign was given to Sentence 7 ")
    reader = ScriptedReader(lambda question, text: 20.0 * ("code of Zed" in text))
    chat, ctx = weighing(reader, text)
    plan, answer = kept(ctx, PARAPHRASE, flow)
    assert [stage.name for stage in plan.stages if not stage.cost.calls] == ["best"]
    assert (answer.text, answer.usage.calls) == ("Zed is K77 [1]", 1)
    assert answer.usage.scored > 0 and answer.usage.input_tokens <= plan.ceiling.input_tokens
    assert answer.coverage.scored > answer.coverage.read
    by_words = flow_in(tmp_path, WEIGHING.replace(", by: likelihood", ""))
    chat, ctx = weighing(reader, text)
    assert kept(ctx, PARAPHRASE, by_words)[1].usage.scored == 0
    assert "code of Zed" not in chat.prompts[0]


def test_a_later_visit_weighs_what_is_left(tmp_path):
    flow = flow_in(tmp_path)
    looked = ("Sentence 300 ", "Sentence 250 ", "code of Zed")

    def score(question, text):
        return max((90.0 - 20 * n for n, words in enumerate(looked) if words in text), default=0.0)

    chat, ctx = weighing(ScriptedReader(score), haystack(400))
    _, answer = kept(ctx, QUESTION, flow)
    assert "K77" in answer.text
    assert ["Sentence 300 " in chat.prompts[0], "Sentence 250 " in chat.prompts[1]] == [True, True]


def test_a_model_that_cannot_score_is_refused_by_the_plan(tmp_path):
    flow = flow_in(tmp_path)
    _, ctx = weighing(None, haystack(400))
    with pytest.raises(ConfigError, match="best selects by likelihood") as caught:
        ctx.plan(QUESTION, strategy=flow)
    assert "by: words" in caught.value.hint


def test_without_tokens_to_look_words_decide_and_that_is_said(tmp_path):
    flow = flow_in(tmp_path)
    reader = ScriptedReader(lambda question, text: 1.0)
    _, ctx = weighing(reader, haystack(400))
    plan = ctx.plan(QUESTION, strategy=flow)
    held = plan.hold.input_tokens
    with pytest.raises(BudgetExceeded) as caught:
        ctx.ask(QUESTION, strategy=flow, budget=Budget(input_tokens=held + 5))
    answer = caught.value.partial
    assert "ranked_by_words" in {warning.code for warning in answer.warnings}
    assert (answer.text, answer.usage.scored) == ("Zed is K77 [1]", 0)
