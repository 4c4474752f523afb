import json
from pathlib import Path

import pytest

import agentctx
from agentctx.memory.errors import BudgetExceeded, InputError
from agentctx.memory.types import (
    Answer,
    Citation,
    Cost,
    Coverage,
    Locator,
    Notice,
    Plan,
    Span,
    Stage,
    Usage,
)
from agentctx.result import Result, failure, planned, result, schema
from agentctx.workflows.profile import ModelProfile

TEXT = "One. The court ruled on 3 May. Three."
PLAN = Plan(
    "spans",
    {"k": 4},
    (Stage("read", "reader", Cost(4, 400, 80), 2, 1.5),),
    Cost(5, 500, 100),
    2.5,
    1,
    Cost(1, 90, 20),
    1.0,
    12,
    ("estimated tokens",),
)

PROFILE = ModelProfile("smollm2", "local", "f00d", 8192)


def answer(status: str = "partial") -> Answer:
    span = Span("ab" * 32, 5, 30)
    return Answer(
        text="The court ruled on 3 May [1].",
        citations=(
            Citation("a.pdf", span, TEXT[5:30], "supported", 12, Locator(0, 37, "page", 12), "ruled"),
            Citation("a.pdf", None, "nowhere", "not_found"),
        ),
        coverage=Coverage(100, 60, 100, (Span("ab" * 32, 0, 5),), (), 1, (Notice("empty", "is empty", "b"),)),
        strategy="spans",
        model="smollm2",
        usage=Usage(2, 61, 19, 1.25, 1, 100, 0),
        plan=PLAN,
        run_id="01J",
        status=status,
        warnings=(Notice("encoding_guessed", "guessed cp1252", "a.txt"),),
        uncited=1,
        stopped_because="calls",
    )


def test_an_answer_becomes_the_documented_object() -> None:
    said = json.loads(result(answer(), "ask").model_dump_json())
    assert (said["schema_version"], said["command"], said["run_id"], said["status"]) == (
        1,
        "ask",
        "01J",
        "partial",
    )
    first, second = said["citations"]
    assert TEXT[first["start"] : first["end"]] == first["quote"]
    assert (first["id"], first["page"], first["locator"]) == (1, 12, {"kind": "page", "value": 12})
    assert (second["id"], second["start"], second["document_id"], second["verdict"]) == (
        2,
        None,
        None,
        "not_found",
    )
    assert said["coverage"]["unread"] == [{"document_id": "ab" * 32, "start": 0, "end": 5}]
    assert said["coverage"]["skipped"] == [{"code": "empty", "source": "b", "message": "is empty"}]
    assert said["usage"]["scored"] == 100 and said["usage"]["seconds"] == 1.25
    assert said["plan"]["ceiling"] == {"calls": 5, "input_tokens": 500, "output_tokens": 100}
    assert said["plan"]["stages"][0]["cost"]["calls"] == 4
    assert said["model"]["id"] == "smollm2" and said["uncited"] == 1 and said["error"] is None
    assert Result.model_validate(said) == result(answer(), "ask")


def test_a_failure_is_an_object_too() -> None:
    error = InputError("a.pdf is encrypted", code="encrypted", hint="decrypt it")
    said = json.loads(failure(error, "ask").model_dump_json())
    assert said["status"] == "failed" and said["answer"] is None
    assert said["error"] == {"code": "encrypted", "message": "a.pdf is encrypted", "hint": "decrypt it"}


def test_a_spent_budget_shows_what_was_found() -> None:
    said = failure(BudgetExceeded("2 calls are spent", partial=answer()), "ask")
    assert (said.status, said.answer) == ("partial", "The court ruled on 3 May [1].")
    assert said.error is not None and said.error.code == "budget"


def test_a_dry_run_has_a_plan_and_no_answer() -> None:
    said = planned(PLAN, "ask", PROFILE)
    assert (said.status, said.answer, said.usage) == ("planned", None, None)
    assert said.model == result(answer(), "ask", PROFILE).model
    assert said.model is not None and (said.model.kind, said.model.window) == ("local", 8192)
    assert said.plan is not None and said.plan.ceiling.calls == 5
    notices = [Notice("binary", "b.bin is binary", "b.bin"), Notice("tracing", "is on")]
    assert [note.code for note in planned(PLAN, "ask", PROFILE, notices).warnings] == ["binary", "tracing"]


def test_the_shipped_schema_is_that_of_the_models() -> None:
    """When this fails: `python -m agentctx.result > agentctx/schemas/result.schema.json`, and ask whether
    `schema_version` has to rise."""
    shipped = Path(agentctx.__file__).parent / "schemas" / "result.schema.json"
    assert shipped.read_text(encoding="utf-8") == schema()


def test_an_undeclared_field_is_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        Result.model_validate({"command": "ask", "status": "complete", "colour": "red"})
