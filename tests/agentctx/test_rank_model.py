"""The embedded model ranks: the file that answers comes first, and every file is read once."""

from __future__ import annotations

import pytest

from agentctx.api import Context
from agentctx.memory.types import Document
from agentctx.models.load import Model
from agentctx.workflows.strategies.rank import Rank

FILES = {
    "pump": "The pump moves forty litres a minute. It is primed by filling the chamber with clean water.",
    "lease": "Either party may end the lease with five months' notice, given in writing before Easter.",
    "ferry": "The last boat back to the mainland leaves the island at 18.40, on Sundays an hour earlier.",
    "birds": "Oystercatchers breed on shingle. Both parents sit on the eggs for about twenty-six days.",
    "council": "The council voted nine to four to close the swimming pool until the roof is repaired.",
    "log": "A woodcock struck the lantern in fog and broke one pane, which the keeper replaced by noon.",
}
ASKED = {
    "How long do both parents incubate the eggs of oystercatchers?": "birds",
    "Why is there no swimming this year?": "council",
    "When does the last ferry return in the evening?": "ferry",
    "What damaged the window of the lighthouse?": "log",
}


@pytest.mark.model
def test_the_file_that_answers_comes_first_and_is_read_once(embedded_model: Model) -> None:
    files = [Document.of(text, name) for name, text in FILES.items()]
    context = Context.open(files, model=embedded_model, ephemeral=True)
    ranking = Rank(mode="likelihood", top=1)
    used = []
    for question, name in ASKED.items():
        plan = context.plan(question, strategy=ranking)
        answer = context.ask(question, strategy=ranking)
        assert answer.value[0]["source"] == name and len(answer.value) == len(files)
        (citation,) = answer.citations
        assert (citation.source, citation.verdict) == (name, "supported")
        assert answer.usage.calls == 0 and answer.usage.input_tokens <= plan.ceiling.input_tokens
        used.append(answer.usage)
    read = sum(context.model.counter.count_text(text) for text in FILES.values())
    assert all(later.reused_tokens >= read for later in used[1:])
