"""K2 of the conformance suite: what a run spends is never above its plan, whatever the text and the model."""

import json
import random
import re

import pytest
from conformance_cases import ABLE, CASES, FACT, WEAK, haystack, opened, spent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentctx.memory.errors import BudgetExceeded, ModelError
from agentctx.memory.types import Budget
from agentctx.testing import ScriptedChat, finding

FORM = re.compile(r"in this form: (\{.*\})")
TEXTS = st.text(min_size=1, max_size=3000).filter(str.strip) | st.integers(3, 300).map(haystack)


def garbage(seed):
    """A model that sometimes answers well and sometimes anything else, and claims its maximum."""
    rng = random.Random(seed)
    good = finding(FACT)

    def reply(messages):
        form = FORM.search(str(messages[0].text))
        example = form[1] if form else "a few words"
        return rng.choice(
            [
                good(messages),
                example,
                example[: rng.randrange(len(example))],
                json.dumps({"unknown": 1}),
                "{}",
                "",
                "no",
                "a\x00\ud7ff " * 400,
            ]
        )

    return ScriptedChat(reply=reply, output_tokens=10**6)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.differing_executors]
)
@given(
    text=TEXTS,
    window=st.integers(1400, 2600),
    seed=st.integers(0, 2**32),
    able=st.booleans(),
    share=st.sampled_from([None, None, 0.3, 0.9]),
)
def test_k2_a_run_never_spends_more_than_its_plan_or_its_budget(case, text, window, seed, able, share):
    chat = garbage(seed)
    ctx = opened(chat, text, tiers=ABLE if able else WEAK, window=window)
    plan = case.plan(ctx)
    assert not chat.prompts
    budget = Budget()
    if share is not None:
        budget = Budget(int(plan.ceiling.calls * share), int(plan.ceiling.input_tokens * share))
    try:
        answer = case.run(ctx, budget=budget)
    except BudgetExceeded as error:
        answer = error.partial
    except ModelError:
        assert len(chat.prompts) <= plan.ceiling.calls
        return
    assert spent(answer).within(plan.ceiling)
    assert budget.calls is None or answer.usage.calls <= budget.calls
    assert budget.input_tokens is None or answer.usage.input_tokens <= budget.input_tokens
    assert answer.usage.calls >= len(chat.prompts)
    assert 0 <= answer.coverage.read <= answer.coverage.total
