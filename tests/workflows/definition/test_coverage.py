"""Coverage of a workflow file: what was sent in a call that failed was not read."""

import pytest

from agentctx.api import Context
from agentctx.memory.errors import ModelError
from agentctx.memory.types import Document
from agentctx.testing import ScriptedChat, fenced_texts, scripted_model
from agentctx.workflows.definition.folder import open_definition

LOOKING = """\
version: 1
name: look_further
nodes:
  cut: {type: split, with: {chunk_tokens: 200}}
  best: {type: select, with: {k: 2}, max_visits: 3}
  say: {type: answer}
edges:
  - {source: START, target: cut}
  - {source: cut, target: best}
  - {source: best, target: say}
  - {source: say, match: {path: no_information, cases: {"true": best}, default: END}}
"""


@pytest.mark.parametrize("bad", [None, 1])
def test_what_was_sent_in_a_failed_call_is_failed_and_not_read(tmp_path, bad):
    (tmp_path / "flow.yaml").write_text(LOOKING)
    sent = []

    def reply(messages):
        sent.append(list(fenced_texts(str(messages[-1].text))))
        return ModelError("no", code="refused") if len(sent) - 1 == bad else {"no_information": True}

    text = " ".join(f"Sentence {n} speaks of rain and no more." for n in range(400))
    model = scripted_model(ScriptedChat(reply=reply), context=1500)
    ctx = Context.open([Document.of(text, "a.txt")], model=model, ephemeral=True)
    answer = ctx.ask("What is the code of Zed?", strategy=open_definition(tmp_path / "flow.yaml"))
    assert len(sent) == 3
    count = model.counter.count_text
    lost = sent[bad] if bad is not None else []
    failed = [text[span.start : span.end] for span in answer.coverage.failed]
    assert sum(map(count, failed)) == sum(map(count, lost))
    assert all(any(piece in gap for gap in failed) for piece in lost)
    assert answer.coverage.read == sum(count(piece) for pieces in sent for piece in pieces) - sum(
        map(count, lost)
    )
    assert answer.status == ("partial" if lost else "unanswerable")
