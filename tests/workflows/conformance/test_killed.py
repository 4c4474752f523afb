"""K4 of the conformance suite: kill -9 in every node, resume, no finished call again, the same answer.

The killed run is a real process with real files and a real connection to an endpoint. A fork server that has
imported everything starts it, because imports take longer than all the rest.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from multiprocessing import forkserver

import pytest
from conformance_cases import EACH, FACT, paths_in
from killed_run import opened_at, resume, run

from agentctx.memory.errors import InputError
from agentctx.runs import Runs
from agentctx.testing import finding
from agentctx.testing_endpoint import ScriptedEndpoint


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["killed_run", "agentctx.models.endpoint", "langgraph.checkpoint.sqlite.aio"]
    )
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not give the server the path of this process.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


@pytest.fixture
def endpoint():
    with ScriptedEndpoint(finding(FACT), delay=0.002) as endpoint:
        yield endpoint


def _window(case, url, folder):
    """The tokens of a window that makes the strategy do its work; all of the text, where it must be whole."""
    try:
        case.plan(opened_at(url, folder, 2400))
    except InputError:
        return 40_000
    return 2400


def _places(events):
    """Before anything, and at the end of each node's last visit: its work is done, not checkpointed."""
    visits = Counter(event["node"] for event in events if event["event"] == "node.end")
    return [("run.start", "", 1), *(("node.end", node, last) for node, last in visits.items())]


@pytest.mark.parametrize("case", EACH, ids=str)
def test_k4_a_killed_run_repeats_no_finished_call_and_ends_the_same(case, tmp_path, forks, endpoint):
    arguments = (case.strategy, case.kind, endpoint.url)
    window = _window(case, endpoint.url, tmp_path)
    whole = tmp_path / "whole"
    assert _exit_code(forks, run, *arguments, whole, window, ("never", "", 1)) == 0
    expected = _answer(whole)
    assert expected["status"] == "complete"
    places = _places(_events(whole))
    assert len(places) >= 3
    for number, place in enumerate(places):
        endpoint.finished.clear()
        folder = tmp_path / str(number)
        assert _exit_code(forks, run, *arguments, folder, window, place) == -signal.SIGKILL, place
        _wait_for_calls_in_flight(endpoint)
        received = sum(event["event"] == "call.end" for event in _events(folder))
        lost = len(endpoint.finished) - received  # replies that were on their way when the process died
        assert _exit_code(forks, resume, folder) == 0
        again = sum(count - 1 for count in Counter(endpoint.finished).values())
        assert again <= lost, place
        resumed = _answer(folder)
        for name in ("text", "citations", "status", "value", "coverage"):
            assert resumed[name] == expected[name], (place, name)
        for name, ceiling in resumed["plan"]["ceiling"].items():
            assert resumed["usage"][name] <= ceiling


def _wiped(folder):
    shutil.rmtree(paths_in(folder).cache)


def _with_window(tokens):
    def change(folder):
        path = Runs(paths_in(folder).runs).folder("r") / "run.json"
        manifest = json.loads(path.read_text())
        manifest["model"]["window"] = tokens
        path.write_text(json.dumps(manifest))

    return change


@pytest.mark.parametrize("change", [_wiped, _with_window(6000), _with_window(1600)])
def test_a_killed_run_is_taken_up_where_little_is_as_it_was(change, tmp_path, forks, endpoint):
    """The cache was deleted, or the server takes more or fewer tokens: checkpoints name what is not there."""
    case = next(case for case in EACH if case.strategy == "map_reduce" and case.kind == "search")
    arguments = (case.strategy, case.kind, endpoint.url)
    whole = tmp_path / "whole"
    assert _exit_code(forks, run, *arguments, whole, 2400, ("never", "", 1)) == 0
    for number, place in enumerate(_places(_events(whole))[-3:]):
        folder = tmp_path / str(number)
        assert _exit_code(forks, run, *arguments, folder, 2400, place) == -signal.SIGKILL, place
        change(folder)
        assert _exit_code(forks, resume, folder) == 0
        answer = _answer(folder)
        assert (answer["status"], "Zed is K77" in answer["text"]) == ("complete", True), place
        assert answer["coverage"]["read"] == answer["coverage"]["total"]
        assert {citation["verdict"] for citation in answer["citations"]} == {"supported"}


def _exit_code(forks, target, *arguments):
    process = forks.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


def _events(folder):
    return list(Runs(paths_in(folder).runs).trace("r"))


def _answer(folder):
    return Runs(paths_in(folder).runs).manifest("r")["answer"]


def _wait_for_calls_in_flight(endpoint):
    deadline = time.monotonic() + 10
    while endpoint.started > endpoint.ended and time.monotonic() < deadline:
        time.sleep(0.005)
