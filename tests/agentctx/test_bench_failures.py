"""What `agentctx bench attention` holds of the model's memory after a cell that was refused."""

import random
from contextlib import suppress

import pytest

from agentctx.bench import fidelity, tasks
from agentctx.bench.peers import Place
from agentctx.bench.texts import collect
from agentctx.memory.errors import ModelError
from agentctx.paths import Paths


@pytest.fixture(scope="module")
def weights(deep_model):
    return Place.find(str(deep_model), Paths.default()).load()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    words = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=600)
    (folder / "long.txt").write_text(" ".join(words))
    return folder


@pytest.mark.parametrize("attention", ["dense", "random:budget=512", "snap:keep=0.5"])
def test_a_cell_that_fails_on_the_way_holds_no_page(weights, book, monkeypatch, attention):
    """What a refused cell held would be missing to all that come after it."""
    (text,) = collect([book], weights.tokenizer, 1024, 1)
    (item,) = tasks.items([book], lambda text: len(weights.tokenizer.encode(text)), 1024, 1, 0)[:1]
    subject = fidelity.Subject(weights, attention)
    expected = fidelity.Subject(weights, "dense").expect(text)

    def fail(*args):
        raise ModelError("no", code="unsupported")

    for name in ("ask", "reduce"):
        with monkeypatch.context() as patch:
            if name == "ask":
                patch.setattr(subject, "ask", fail)
            else:
                patch.setattr(type(subject.method), "reduce", fail)
            for work in (
                lambda: subject.expect(text),
                lambda: subject.agreement(text, expected),
                lambda: subject.bracket(text),
                lambda: subject.reply(item),
            ):
                with suppress(ModelError):
                    work()
        for engine in (weights.engine, subject.engine):
            engine.prefixes.clear()
            assert engine.pool.used_pages == 0, name
