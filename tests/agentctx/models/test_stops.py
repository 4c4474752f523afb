"""Stop sequences over any way of cutting the text into pieces."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from agentctx.models.stops import StopFilter

letters = st.text("ab", max_size=12)


@given(st.lists(letters, max_size=6), st.lists(letters, max_size=3))
@example(["a", "a", "b"], ["ab"])
def test_what_passes_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    stopper, passed = StopFilter(stops), ""
    for piece in pieces:
        passed += stopper.feed(piece)
        if stopper.stopped:
            break
    passed += stopper.flush()
    text = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    assert stopper.stopped == bool(ends)
    if not ends:
        assert passed == text
    else:
        assert text.startswith(passed)
        assert not any(stop and stop in passed for stop in stops)


@given(letters)
def test_nothing_is_held_back_without_stops(text: str) -> None:
    assert StopFilter([]).feed(text) == text
