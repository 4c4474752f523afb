"""A run that is taken up after an outage ends whole, is paid for within the user's limits, and runs once."""

import threading
import time
from collections import Counter

import pytest

from agentctx.api import Context
from agentctx.memory.blobs import Blobs
from agentctx.memory.errors import BudgetExceeded, StoreError
from agentctx.memory.types import Budget, Document
from agentctx.paths import Paths
from agentctx.runs import Runs
from agentctx.testing import ScriptedChat, finding, scripted_model
from agentctx.testing_endpoint import ScriptedEndpoint

GOOD = finding(r"The code of (\w+ is \w+)\.")
QUESTION = "What is the code of Zed?"
TEXT = " ".join([*(f"Sentence {n} says nothing." for n in range(1500)), "The code of Zed is K77."])


@pytest.fixture
def paths(tmp_path):
    return Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))


class Outage:
    """Goes down after `after` calls, until `over`."""

    def __init__(self, after):
        self.after, self.calls, self.over = after, 0, False

    def __call__(self, messages):
        self.calls += 1
        down = self.calls > self.after and not self.over
        return Exception("overloaded") if down else GOOD(messages)


def opened(url, paths):
    return Context.open(
        [Document.of(TEXT, "hay.txt")], model="openai:scripted", base_url=url, window=2000, paths=paths
    )


def ended_early(ctx, budget=None):
    try:
        answer = ctx.ask(QUESTION, strategy="map_reduce", run_id="r", budget=budget or Budget())
    except BudgetExceeded as error:
        answer = error.partial
    assert answer.status == "partial"
    return answer


@pytest.fixture
def _no_waiting(monkeypatch):
    async def at_once(run, seconds):
        return None

    monkeypatch.setattr("agentctx.workflows.send._pause", at_once)


@pytest.mark.usefixtures("_no_waiting")
def test_a_run_that_met_an_outage_is_completed(paths):
    outage = Outage(10)
    with ScriptedEndpoint(outage) as endpoint:
        first = ended_early(opened(endpoint.url, paths))
        outage.over = True
        answer = Context.resume("r", paths=paths)
    assert first.coverage.read < first.coverage.total
    assert (answer.status, answer.text) == ("complete", "Zed is K77 [1]")
    assert answer.coverage.read == answer.coverage.total
    assert set(Counter(endpoint.finished).values()) == {1}, "a finished call was repeated"
    # What the outage cost is said: in what was used, and in the ceiling that this attempt announced.
    assert answer.usage.calls > first.usage.calls
    assert answer.usage.calls <= answer.plan.ceiling.calls == first.plan.ceiling.calls + first.usage.calls


@pytest.mark.usefixtures("_no_waiting")
def test_the_users_own_limit_holds_over_all_attempts(paths):
    outage = Outage(10)
    with ScriptedEndpoint(outage) as endpoint:
        ctx = opened(endpoint.url, paths)
        limit = ctx.plan(QUESTION, strategy="map_reduce").ceiling.calls + 2
        ended_early(ctx, Budget(calls=limit))
        outage.over = True
        for _ in range(3):
            with pytest.raises(BudgetExceeded) as caught:
                Context.resume("r", paths=paths)
        assert caught.value.partial.usage.calls <= limit
        assert endpoint.started <= limit
        assert Context.resume("r", paths=paths, budget=Budget(calls=10 * limit)).status == "complete"


def test_a_live_run_is_not_taken_up_by_another_nor_removed(paths):
    with ScriptedEndpoint(GOOD, delay=0.05) as endpoint:
        answers = []
        ctx = opened(endpoint.url, paths)
        ask = threading.Thread(
            target=lambda: answers.append(ctx.ask(QUESTION, strategy="map_reduce", run_id="r"))
        )
        ask.start()
        while not endpoint.started:
            time.sleep(0.005)
        for attempt in (lambda: Context.resume("r", paths=paths), lambda: Runs(paths.runs).remove("r")):
            with pytest.raises(StoreError) as caught:
                attempt()
            assert caught.value.code == "locked"
        ask.join()
    assert answers[0].status == "complete"
    assert endpoint.started == answers[0].usage.calls
    assert Context.resume("r", paths=paths) == answers[0]


def test_a_removed_run_leaves_no_text_that_no_other_run_needs(paths):
    def ask(run_id, *documents):
        model = scripted_model(ScriptedChat(reply=GOOD), context=4000)
        Context.open(list(documents), model=model, paths=paths).ask(QUESTION, run_id=run_id)

    own, shared = Document.of("The code of Zed is K77.", "a.txt"), Document.of("Nothing.", "b.txt")
    ask("one", own, shared)
    ask("two", Document.of(own.text, "other.txt"), shared)
    runs, blobs = Runs(paths.runs), Blobs(paths.blobs)
    runs.remove("one", blobs)
    with pytest.raises(StoreError):
        blobs.get_document(own.id, "a.txt")
    assert blobs.get_document(own.id, "other.txt").text == own.text
    assert blobs.get_document(shared.id, "b.txt") == shared
    runs.remove("two", blobs)
    assert own.id not in blobs
    assert shared.id not in blobs


def test_texts_stay_while_a_run_does_not_say_what_it_needs(paths):
    document = Document.of("The code of Zed is K77.", "a.txt")
    for run_id in ("one", "two"):
        model = scripted_model(ScriptedChat(reply=GOOD), context=4000)
        Context.open([document], model=model, paths=paths).ask(QUESTION, run_id=run_id)
    runs, blobs = Runs(paths.runs), Blobs(paths.blobs)
    (runs.folder("two") / "run.json").write_text("{")
    runs.remove("one", blobs)
    assert blobs.get_document(document.id, "a.txt") == document
    runs.remove("two", blobs)
    assert not (paths.runs / "two").exists()


def test_a_login_in_the_url_is_not_kept_and_is_found_again(paths, monkeypatch):
    seen = []
    with ScriptedEndpoint(GOOD) as endpoint:
        url = endpoint.url.replace("//", "//me:hunter2@")
        context = opened(url, paths)
        answer = context.ask(QUESTION, strategy="map_reduce", run_id="r")
        manifest = Runs(paths.runs).folder("r") / "run.json"
        assert "hunter2" not in manifest.read_text()
        manifest.write_text(manifest.read_text().replace('"complete"', '"running"'))
        monkeypatch.setenv("AGENTCTX_BASE_URL", url)
        monkeypatch.setattr(
            "agentctx.models.endpoint.EndpointChat.place",
            property(lambda chat: seen.append(chat.openai_api_base) or "endpoint"),
        )
        assert Context.resume("r", paths=paths).text == answer.text
    assert set(seen) == {url}


def test_what_the_disk_refuses_is_an_error_of_ours(paths):
    paths.state.mkdir(parents=True)
    paths.runs.write_text("a file where a directory should be")
    with ScriptedEndpoint(GOOD) as endpoint, pytest.raises(StoreError) as caught:
        opened(endpoint.url, paths).ask(QUESTION, strategy="map_reduce", run_id="r")
    assert caught.value.code == "unwritable"
