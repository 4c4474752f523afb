"""A reading made with its question in view, on a small model of random weights: it serves that one only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from agentctx.memory.errors import ConfigError
from agentctx.reading.engine import Engine
from agentctx.reading.reading import Reading
from tests.agentctx.tiny_reader import TEXT, engine

SNAP = "snap:keep=0.3,dense_below=64,window=16"
QUESTION, OTHER = "Which court ruled, and on which day?", "Was there an appeal?"


@pytest.fixture(scope="module")
def snap(tiny_model: Path) -> Engine:
    return engine(tiny_model, attention=SNAP)


def kept(reading: Reading) -> list[torch.Tensor]:
    """The keys that are held of each head, in a fixed order."""
    past = reading._held().state.pasts[0]
    assert past is not None
    found = []
    for layer in range(past.tiles.shape[0]):
        keys, _ = past.read(layer)
        found += [head[:size] for head, size in zip(keys, past.lens[layer].tolist(), strict=True)]
    return [torch.tensor(sorted(head.tolist())) for head in found]


def same(a: Reading, b: Reading) -> bool:
    pairs = zip(kept(a), kept(b), strict=True)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_the_question_decides_what_is_kept(snap: Engine) -> None:
    with (
        snap.read(TEXT, question=QUESTION) as one,
        snap.read(TEXT, question=QUESTION) as again,
        snap.read(TEXT, question=OTHER) as other,
        snap.read(TEXT) as plain,
    ):
        assert same(one, again)
        assert not same(one, other) and not same(one, plain)
        sizes = [sum(map(len, kept(reading))) for reading in (one, other, plain)]
        assert max(sizes) <= 1.05 * min(sizes), "as much is kept, whatever was in view"
        assert one.ask(QUESTION, max_new_tokens=8) == again.ask(QUESTION, max_new_tokens=8)
        assert plain.question is None and one.question != other.question


@pytest.mark.parametrize("force", [False, True])
def test_another_question_is_refused_unless_forced(snap: Engine, force: bool) -> None:
    with snap.read(TEXT, question=QUESTION) as reading:
        assert reading.ask(f" {QUESTION}\n", max_new_tokens=4).token_ids
        assert reading.ask_many([QUESTION, QUESTION], max_new_tokens=4)
        options: Any = {"max_new_tokens": 4, "force": force}
        for act in (
            lambda: reading.ask(OTHER, **options),
            lambda: list(reading.stream(OTHER, **options)),
            lambda: reading.ask_many([QUESTION, OTHER], **options),
            lambda: reading.generate("And", **options),
            lambda: reading.fork(force=force).close(),
        ):
            if force:
                act()
                continue
            with pytest.raises(ConfigError, match="was made for one question"):
                act()


def test_what_holds_the_whole_text_serves_every_question(tiny_model: Path, snap: Engine) -> None:
    """A method that does not look at the question, one that keeps all, a text too short to be cut."""
    for method in ("dense", "keydiff:keep=0.3,dense_below=64", f"{SNAP},keep=1".replace("keep=0.3,", "")):
        found = engine(tiny_model, attention=method)
        with found.read(TEXT, question=QUESTION) as reading, found.read(TEXT) as plain:
            assert reading.question is None
            asked = [r.ask(OTHER, max_new_tokens=6).token_ids for r in (reading, plain)]
            assert asked[0] == asked[1]
    with snap.read("Short.", prefix="", question=QUESTION) as reading:
        assert reading.question is None and reading.generate("x", max_new_tokens=2).text is not None


def test_nothing_that_is_kept_on_disk_knows_the_question(tiny_model: Path, tmp_path: Path) -> None:
    stored = []
    for question in (QUESTION, OTHER, None):
        kv = tmp_path / str(question)
        with engine(tiny_model, kv=kv, attention=SNAP).read(TEXT, question=question):
            found = {path.name: load_file(path) for path in kv.rglob("*.kv")}
            stored.append(
                {name: [block[key].tolist() for key in sorted(block)] for name, block in found.items()}
            )
    assert stored[0] and stored[0] == stored[1] == stored[2]


def test_a_text_that_grows_forgets_the_question(snap: Engine) -> None:
    with snap.read(TEXT, question=QUESTION) as reading:
        reading.extend(" And more of it.")
        assert reading.question is None and reading.ask(OTHER, max_new_tokens=2).token_ids
