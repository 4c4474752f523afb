import json
from pathlib import Path

import pytest

from agentctx.memory.errors import StoreError
from agentctx.workflows.trace import Trace, read_trace


def test_events_form_one_tree_and_survive_a_reader_while_running(tmp_path):
    path = tmp_path / "run" / "trace.jsonl"
    seen = []
    trace = Trace("r", path, seen.append)
    trace.emit("run.start")
    with trace.span("read"):
        with trace.span():
            trace.emit("call.start", role="read")
        assert [event["event"] for event in read_trace(path)] == ["run.start", "node.start", "call.start"]
    trace.close()
    events = list(read_trace(path))
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert events == [event.as_dict() for event in seen]
    parent = {event["span"]: event["parent"] for event in events}
    call = next(event for event in events if event["event"] == "call.start")
    assert call["node"] == "read"
    assert parent[parent[call["span"]]] == parent["0"] or parent[call["span"]] in parent


def test_a_line_cut_off_by_a_kill_is_dropped_and_writing_goes_on(tmp_path):
    path = tmp_path / "trace.jsonl"
    trace = Trace("r", path)
    trace.emit("reserve", reservation=1)
    trace.close()
    with path.open("a") as file:
        file.write('{"event": "settl')
    trace = Trace("r", path)
    trace.emit("settle", reservation=1)
    trace.close()
    assert [event["event"] for event in read_trace(path)] == ["reserve", "settle"]
    assert [event["seq"] for event in read_trace(path)] == [1, 2]


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"event": "a"}) + "\n{broken\n" + json.dumps({"event": "b"}) + "\n")
    with pytest.raises(StoreError, match="line 2"):
        list(read_trace(path))


def test_tokens_are_shown_but_not_kept(tmp_path):
    seen = []
    trace = Trace("r", tmp_path / "t.jsonl", seen.append)
    trace.emit("token", text="a")
    trace.close()
    assert [event.event for event in seen] == ["token"]
    assert list(read_trace(tmp_path / "t.jsonl")) == []


def test_a_lone_surrogate_in_a_models_words_is_kept(tmp_path):
    trace = Trace("r", tmp_path / "t.jsonl")
    trace.emit("failure", message="half a \ud83d sign")
    trace.close()
    (event,) = read_trace(tmp_path / "t.jsonl")
    assert event["data"]["message"] == "half a \ud83d sign"


def test_what_the_disk_refuses_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Trace("r", tmp_path / "file" / "t.jsonl")
    assert caught.value.code == "unwritable"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_by_now_is_an_error_of_ours(tmp_path):
    trace = Trace("r", tmp_path / "t.jsonl")
    trace._file.close()
    trace._file = open("/dev/full", "w")  # noqa: SIM115
    for attempt in (lambda: trace.emit("run.start"), trace.close):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert caught.value.code == "no_space"
    trace.close()
