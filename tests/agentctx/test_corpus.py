"""An index of a tiny model: what it holds, that it is reused exactly, what happens when something fails."""

import asyncio
import errno
import shutil
from dataclasses import replace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage

from agentctx.api import Context
from agentctx.corpus import held
from agentctx.corpus.attach import with_index
from agentctx.corpus.chat import ComposedChat, Kept, stretches
from agentctx.corpus.index import Index
from agentctx.memory.errors import ModelError, StoreError
from agentctx.memory.kv import shelf
from agentctx.memory.types import Document
from agentctx.models.load import open_model
from agentctx.paths import Paths


@pytest.fixture(scope="module")
def roomy(tiny_model, tmp_path_factory):
    """The tiny model with a window for whole prompts, which are long in bytes."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("roomy") / "model")
    config = (folder / "config.json").read_text()
    assert '"max_position_embeddings": 1024' in config
    (folder / "config.json").write_text(config.replace("1024", "8192"))
    return folder


@pytest.fixture
def paths(tmp_path):
    return Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))


def model(folder, paths, **options):
    return open_model(str(folder), paths=paths, memory_bytes=60 << 20, **options)


def documents(count=3, *, first=0):
    return [
        Document.of(" ".join(f"Note {n} of part {part} says {n * part}." for part in range(40)), f"d/{n}.txt")
        for n in range(first, first + count)
    ]


def texts_of(index, given):
    return [text for one in given for text in index._passages(one)]


def test_what_is_indexed_is_not_read_again_and_what_changed_is(roomy, paths):
    index = Index.open(paths.index, model(roomy, paths))
    told = []
    first = index.add("d", documents(), progress=lambda *now: told.append(now))
    assert first.fresh == first.passages > 10
    assert first.computed_tokens > 0
    assert told[-1][0] == told[-1][1]
    again = Index.open(paths.index, model(roomy, paths))
    assert replace(again.add("d", documents()), warnings=()) == replace(first, fresh=0, computed_tokens=0)
    changed = [*documents(2), Document.of(documents(3)[2].text + " One more.", "d/2.txt")]
    few = again.add("d", changed)
    assert 0 < few.fresh <= 2
    assert set(again.held(texts_of(again, changed))) == {True}
    gone = set(texts_of(again, documents())) - set(texts_of(again, changed))
    assert gone
    assert not any(again.held(sorted(gone)))  # with the KV of what is in no document any more


def test_a_passage_behind_the_same_beginning_is_exactly_what_would_be_computed(roomy, paths):
    """In another process the KV comes from the disk in 8 bits; here it is in memory as it was computed."""
    index = Index.open(paths.index, model(roomy, paths))
    index.add("d", documents())
    passage = texts_of(index, documents())[4]
    message = [HumanMessage(f"{passage} What does it say?")]
    plain = index.chat.invoke(message, max_tokens=24)
    composed = index.composed([passage]).invoke(message, max_tokens=24)
    assert composed.text == plain.text
    assert composed.usage_metadata["input_tokens"] == plain.usage_metadata["input_tokens"]
    reused = composed.usage_metadata["input_token_details"]["cache_read"]
    assert reused >= len(passage.strip())  # a byte is a token


def test_several_passages_are_reused_and_the_rest_is_computed(roomy, paths):
    Index.open(paths.index, model(roomy, paths)).add("d", documents())
    index = Index.open(paths.index, model(roomy, paths))  # which holds nothing in memory
    chosen = texts_of(index, documents())[1:9:2]
    prompt = "\n\n".join(f"<{n}>\n{text}\n</{n}>" for n, text in enumerate(chosen)) + "\n\nWhat is it?"
    found = index.composed(chosen).invoke([HumanMessage(prompt)], max_tokens=8)
    usage = found.usage_metadata
    kept = sum(len(text.strip()) for text in chosen)
    assert usage["input_token_details"]["cache_read"] >= kept - len(chosen)
    assert usage["input_tokens"] == index.chat.invoke([HumanMessage(prompt)]).usage_metadata["input_tokens"]
    assert "warnings" not in found.response_metadata
    assert index.engine.pool.used_pages - len(index.engine.prefixes._pages) == 0  # nothing leaks


def test_what_was_evicted_is_read_again_and_said(roomy, paths):
    first = Index.open(paths.index, model(roomy, paths))
    first.add("d", documents(1))
    chosen = texts_of(first, documents(1))[:2]
    index = Index.open(paths.index, model(roomy, paths))
    shelf.Shelf(paths.kv, budget=0).remove(None)
    assert index.held(chosen) == [False, False]
    found = index.composed(chosen).invoke([HumanMessage("\n".join(chosen) + "?")], max_tokens=4)
    assert any("read again" in warning for warning in found.response_metadata["warnings"])
    assert index.add("d", documents(1)).fresh > 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 3)), max_size=6),
    repair=st.integers(0, 3),
)
def test_stretches_hold_what_stands_in_the_prompt(parts, repair):
    passages = [tuple(100 * n + i for i in range(12 + n)) for n in range(4)]
    kept = [Kept((7, 7, *ids, 8), 2, 2 + len(ids)) for ids in passages]
    prompt = [1]
    for gap, which in parts:
        prompt += [*gap, *passages[which]]
    last = 0
    for one in stretches(prompt, kept, repair):
        assert last <= one.start < one.end < len(prompt)
        assert prompt[one.start : one.end] == [*one.kept.ids[one.first : one.first + one.end - one.start]]
        assert one.kept.first <= one.first
        last = one.end
    used = {which for _, which in parts}
    assert len(list(stretches(prompt, kept, repair))) == len(used)


def test_the_nearest_passage_is_the_question_itself(roomy, paths):
    index = Index.open(paths.index, model(roomy, paths))
    index.add("d", documents())
    texts = texts_of(index, documents())
    found = asyncio.run(index.nearest(texts[7], texts, 5))
    assert sorted(found.values)[-5] > float("-inf")
    assert sum(value > float("-inf") for value in found.values) == 5
    assert found.computed_tokens + found.reused_tokens == index.nearest_cost(texts[7])


def test_the_budget_of_kv_is_never_exceeded(roomy, paths):
    given = documents(12)
    budget = 400_000
    index = Index.open(paths.index, model(roomy, paths, kv_bytes=budget))
    with pytest.raises(StoreError) as caught:
        index.add("d", given)
    assert caught.value.code == "no_space"
    assert shelf.Shelf(paths.kv, budget=0).used_bytes <= budget
    kept = index.held(texts_of(index, given))
    assert True in kept
    assert False in kept
    more = Index.open(paths.index, model(roomy, paths, kv_bytes=budget * 100))
    assert more.add("d", given).fresh == kept.count(False)


def test_a_full_disk_is_a_typed_error_and_nothing_is_lost(roomy, paths, monkeypatch):
    index = Index.open(paths.index, model(roomy, paths))
    index.add("d", documents(1))
    write, left = shelf.write, [30]

    def full(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "write", full)
        with pytest.raises(StoreError) as caught:
            index.add("d", documents(6))
    assert caught.value.code == "no_space"
    assert set(index.held(texts_of(index, documents(1)))) == {True}
    index.add("d", documents(6))
    assert set(index.held(texts_of(index, documents(6)))) == {True}
    assert held.verify(paths)[0].kind == "deleted"  # "d" is no folder here; all else is whole
    assert {one.kind for one in held.verify(paths)} == {"deleted"}


def test_an_index_of_another_model_is_refused(roomy, deep_model, paths):
    index = Index.open(paths.index, model(roomy, paths))
    index.add("d", documents(1))
    (folder,) = paths.index.iterdir()
    other = model(deep_model, paths)
    assert with_index(other, paths).index is None  # it has its own place
    theirs = paths.index / other.chat.weights.engine.root[:16]
    shutil.copytree(folder, theirs)
    with pytest.raises(StoreError) as caught:
        Index.open(paths.index, other)
    assert caught.value.code == "version"
    found = with_index(other, paths)
    assert found.index is None
    assert "another model" in found.warnings[0].message


@pytest.mark.parametrize("options", [{"kv_bytes": 0}, {"kv_dtype": "int8"}, {"attention": "streaming"}])
def test_what_cannot_be_composed_is_not_indexed(roomy, paths, options):
    with pytest.raises(ModelError) as caught:
        Index.open(paths.index, model(roomy, paths, **options))
    assert caught.value.code == "unsupported"


def test_a_model_with_windows_is_composed_as_well(tiny_model, paths, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "windows")
    tiny.tiny("Mistral", sliding_window=100, vocab_size=259).save_pretrained(folder)
    index = Index.open(paths.index, model(folder, paths))
    index.add("d", documents(1))
    passage = texts_of(index, documents(1))[1]
    message = [HumanMessage(f"{passage} What does it say?")]
    found = index.composed([passage]).invoke(message, max_tokens=24)
    assert found.usage_metadata["input_token_details"]["cache_read"] >= len(passage.strip())
    assert found.text == index.chat.invoke(message, max_tokens=24).text


@pytest.mark.parametrize("share", [0.15, 1.0])
def test_a_share_of_each_passage_is_computed_anew(roomy, paths, share):
    Index.open(paths.index, model(roomy, paths)).add("d", documents())
    index = Index.open(paths.index, model(roomy, paths))
    chosen = texts_of(index, documents())[1:6:2]
    messages = [HumanMessage("\n\n".join(chosen) + "\n\nWhat is it?")]
    composed = index.composed(chosen)
    fields = {name: getattr(composed, name) for name in type(composed).model_fields}
    kept = ComposedChat(**fields | {"recompute": 0.0}).invoke(messages, max_tokens=4).usage_metadata
    index.engine.prefixes.clear()
    found = ComposedChat(**fields | {"recompute": share}).invoke(messages, max_tokens=4).usage_metadata
    more = sum(found[x] - found["input_token_details"][y] for x, y in [("input_tokens", "cache_read")])
    more -= kept["input_tokens"] - kept["input_token_details"]["cache_read"]
    want = share * sum(len(text.strip()) for text in chosen)
    assert want - 2 * len(chosen) <= more <= want + 3 * len(chosen)
    assert index.engine.pool.used_pages - len(index.engine.prefixes._pages) == 0  # nothing leaks


def test_what_is_pinned_stays_when_other_texts_need_room(roomy, paths):
    budget = 2_000_000
    index = Index.open(paths.index, model(roomy, paths, kv_bytes=budget))
    index.add("pinned", documents(2), pin=True)
    index.add("open", documents(2, first=2))
    mine, others = texts_of(index, documents(2)), texts_of(index, documents(2, first=2))
    for n in range(40):
        index.chat.invoke([HumanMessage(f"{n} " + "once more " * 150)], max_tokens=1)
        assert index.store.shelf.used_bytes <= budget
    assert all(index.held(mine))
    assert not any(index.held(others))
    assert [(one.root, one.pinned) for one in held.listed(paths)] == [("open", False), ("pinned", True)]
    held.unpin(paths, ["pinned"])
    for n in range(40, 80):
        index.chat.invoke([HumanMessage(f"{n} " + "once more " * 150)], max_tokens=1)
    assert not any(index.held(mine))
    assert held.pin(paths, ["pinned"], budget=budget) == len(mine)  # are to be read again
    index.add("pinned", documents(2))
    assert index.store.shelf.pinned() == set(index.store.files(index.catalog.blocks("pinned")))


def test_a_pin_that_does_not_fit_is_refused_and_nothing_is_pinned(roomy, paths):
    index = Index.open(paths.index, model(roomy, paths))
    index.add("d", documents(2))
    size = index.store.shelf.used_bytes
    with pytest.raises(StoreError) as caught:
        held.pin(paths, ["d"], budget=size)
    assert caught.value.code == "no_space"
    assert "kv_bytes" in caught.value.hint
    assert not index.store.shelf.pinned()
    assert not index.catalog.pinned()
    assert held.pin(paths, ["d"], budget=2 * size) == 0
    small = Index.open(paths.index, model(roomy, paths, kv_bytes=size))
    with pytest.raises(StoreError) as caught:
        small.add("more", documents(2, first=5), pin=True)
    assert caught.value.code == "no_space"
    assert all(index.held(texts_of(index, documents(2))))


def test_what_leaves_a_pinned_path_is_pinned_no_more(roomy, paths):
    index = Index.open(paths.index, model(roomy, paths))
    index.add("pinned", documents(2), pin=True)
    index.add("open", documents(1))
    index.add("pinned", documents(1, first=1))
    pinned = index.store.shelf.pinned()
    assert pinned == set(index.store.files(index.catalog.blocks("pinned")))
    assert all(index.held(texts_of(index, documents(1))))
    held.remove(paths, ["pinned"])
    assert not index.store.shelf.pinned()
    assert all(index.held(texts_of(index, documents(1))))


def test_questions_over_an_index_compute_little_and_nothing_stale_is_served(roomy, paths, tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for one in documents(12):
        (tmp_path / one.source).write_text(one.text)
    opened = model(roomy, paths)
    Index.open(paths.index, opened).add(str(folder), documents(12))
    context = Context.open(folder, model=with_index(opened, paths), paths=paths)
    question = "What does note 3 of part 7 say?"
    answer = context.ask(question)
    assert answer.strategy == "kv_retrieval"
    assert answer.usage.reused_tokens > answer.usage.computed_tokens / 4
    assert not [one for one in answer.warnings if one.code in ("not_indexed", "kv")]
    (folder / "3.txt").write_text("It was all deleted.")
    (folder / "4.txt").unlink()
    context = Context.open(folder, model=with_index(opened, paths), paths=paths)
    answer = context.ask(question)
    assert answer.strategy != "kv_retrieval"
    assert [one for one in answer.warnings if one.code == "not_indexed"]
    answer = context.ask(question, strategy="kv_retrieval")
    assert answer.strategy == "kv_retrieval"
    assert [one for one in answer.warnings if one.code == "not_indexed"]
    assert "part 7 says" not in "".join(one.quote for one in answer.citations if "d/3" in one.source)
