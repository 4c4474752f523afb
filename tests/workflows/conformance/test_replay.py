"""K9 of the conformance suite: a run is repeated from its trace, byte for byte, without a model."""

import pytest
from conformance_cases import CASES, FACT, WINDOW, Case, haystack, opened, paths_in, shape
from pydantic import TypeAdapter

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Answer
from agentctx.testing import ReplayChat, ScriptedChat, finding

FORM = TypeAdapter(Answer)


def stumbling():
    """Every third reply is no JSON and has to be repaired, every seventh call fails for good."""
    count = iter(range(10**6))
    good = finding(FACT)

    def reply(messages):
        number = next(count)
        if number % 7 == 6:
            return ModelError("no", code="refused")
        return "I think so." if number % 3 == 1 else good(messages)

    return ScriptedChat(reply=reply)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_k9_a_replay_gives_the_same_bytes(case, tmp_path):
    first = case.run(opened(stumbling(), haystack(), paths=paths_in(tmp_path)), run_id="r")
    replay = ReplayChat.of("r", paths=paths_in(tmp_path))
    again = case.run(opened(replay, haystack()))
    assert FORM.dump_json(shape(again)) == FORM.dump_json(shape(first))
    assert not any(replay.outcomes.values()), "every recorded reply was used"


CASE = Case("map_reduce", "search")


def test_a_call_that_was_not_made_is_named(tmp_path):
    CASE.run(opened(ScriptedChat(reply=finding(FACT)), haystack(), paths=paths_in(tmp_path)), run_id="r")
    replay = ReplayChat.of("r", paths=paths_in(tmp_path))
    with pytest.raises(ConfigError, match="no such call of role read"):
        CASE.run(opened(replay, haystack(seed=1)))


def test_one_role_is_asked_live_while_the_rest_replays(tmp_path):
    CASE.run(opened(ScriptedChat(reply=finding(FACT)), haystack(), paths=paths_in(tmp_path)), run_id="r")
    live = ScriptedChat(reply=finding(r"The code of (Yan is \w+)\."))
    replay = ReplayChat.of("r", paths=paths_in(tmp_path), live=live, live_roles=["answer"])
    answer = CASE.run(opened(replay, haystack()))
    assert answer.usage.calls > len(live.prompts) >= 1
    assert all(len(prompt.split()) < WINDOW and "code of Zed?" in prompt for prompt in live.prompts)
    assert answer.status == "complete"
