"""`LocalChat` under sparse attention: exact answers, what was left out, texts beyond the window."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.owners import forget, owned
from agentctx.models.load import open_model
from agentctx.models.local import LocalChat
from agentctx.models.reader import LikelihoodReader
from agentctx.models.tokenizer import Tokenizer
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method
from agentctx.workflows.ports import SOURCES, SpanMethod

SPARSE = "quest:budget=448,dense_below=0,dense_layers=0"
LONG = [HumanMessage("The court of appeal ruled on the third of May, 1921. " * 12)]  # 650 tokens of 1,024


def chat(folder: Path, attention: str, **fields: Any) -> LocalChat:
    """In float32, where several tokens in one pass round like one."""
    body = LlamaDecoder.load(folder, torch.float32)
    engine = Engine(body, fingerprint="x", memory_bytes=1 << 28, method=method(attention))
    weights = Weights(engine, Tokenizer.load(folder), "tiny", frozenset({-1}))
    return LocalChat(weights=weights, model_name="tiny", context=body.window, max_tokens=60, **fields)


def told(reply: AIMessage) -> dict[str, Any]:
    return {key: value for key, value in reply.response_metadata.items() if key != "model_name"}


def test_an_exact_answer_is_the_dense_one(tiny_model: Path) -> None:
    dense = chat(tiny_model, "dense").invoke(LONG)
    sparse = chat(tiny_model, SPARSE)
    exact = sparse.bind(exact=True).invoke(LONG)
    assert sparse.invoke(LONG).content != dense.content == exact.content
    assert exact.usage_metadata == dense.usage_metadata
    said = told(exact)
    assert said["draft_tokens"] >= said["accepted_tokens"] >= 0 and said["draft_tokens"] > 0
    assert told(dense) == {"finish_reason": "length"}


def test_a_field_makes_every_answer_exact_and_another_model_of_it(tiny_model: Path) -> None:
    exact, plain = chat(tiny_model, SPARSE, exact=True), chat(tiny_model, SPARSE)
    chunks = list(exact.stream(LONG, max_tokens=20))
    assert "".join(str(chunk.content) for chunk in chunks) == exact.invoke(LONG, max_tokens=20).content
    assert "draft_tokens" in chunks[-1].response_metadata
    assert exact._identifying_params != plain._identifying_params


def test_what_exact_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        chat(tiny_model, SPARSE, exact=True).invoke(LONG, temperature=0.5)
    with pytest.raises(ConfigError, match="streaming"):
        chat(tiny_model, "streaming", exact=True)
    with pytest.raises(ConfigError, match="streaming"):
        chat(tiny_model, "streaming").invoke(LONG, exact=True)
    with pytest.raises(ConfigError, match="endpoint"):
        open_model("openai:x", base_url="http://127.0.0.1:9", paths=Paths.default(), exact=True)


def test_a_model_is_opened_for_exact_answers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path))
    models = [
        open_model(str(tiny_model), paths=Paths.default(), attention=SPARSE, exact=exact)
        for exact in (False, True)
    ]
    assert models[0].profile.fingerprint != models[1].profile.fingerprint
    assert "draft_tokens" in models[1].chat.invoke(LONG, max_tokens=9).response_metadata


def test_a_guard_tells_what_was_left_out(tiny_model: Path) -> None:
    guarded = chat(tiny_model, f"{SPARSE},guard=report")
    said = told(guarded.invoke(LONG))["attention"]
    assert said["rows"] == 59 * 2 * 4  # tokens fed, layers, heads
    assert 0 <= said["low"] <= said["high"] <= said["worst"] <= 1
    assert said["fallbacks"] == 0
    assert "attention" not in told(guarded.invoke(LONG[:1], exact=True))


def test_a_certified_answer_falls_back_to_the_dense_one(tiny_model: Path) -> None:
    certified = chat(tiny_model, f"{SPARSE},guard=certified:0.000001").invoke(LONG)
    assert certified.content == chat(tiny_model, "dense").invoke(LONG).content
    said = told(certified)["attention"]
    assert said["fallbacks"] == said["rows"] > 0


def test_attention_without_end_reads_beyond_the_window(tiny_model: Path) -> None:
    longer = [HumanMessage("The geese return in autumn. " * 60)]
    with pytest.raises(ModelError, match="window"):
        chat(tiny_model, "dense").invoke(longer)
    reply = chat(tiny_model, "streaming:sinks=4,window=252").invoke(longer)
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["input_tokens"] > 1024 and reply.usage_metadata["output_tokens"] == 60
    lowered = chat(tiny_model, "streaming:sinks=4,window=252")
    lowered.context = 512  # what the user asked for holds
    with pytest.raises(ModelError, match="512"):
        lowered.invoke(longer)


async def test_what_is_kept_is_listed_under_its_documents(tiny_model: Path, tmp_path: Path) -> None:
    weights = Weights.load(tiny_model, name="tiny", kv=tmp_path)
    store = weights.engine.store
    assert store is not None
    local = LocalChat(weights=weights, model_name="tiny", context=1024, max_tokens=2)
    message = HumanMessage(LONG[0].content, additional_kwargs={SOURCES: ["a.txt"]})
    await local.ainvoke([message])
    reader = LikelihoodReader(weights.engine, weights.tokenizer)
    texts = ["The light is kept by Tobias Renn. " * 3, "Geese return in autumn, says the warden. " * 3]
    await reader.likelihood("who?", texts, [["a.txt"], ["a.txt", "b.txt"]])
    found = {one.document: one for one in owned(store.shelf)}
    kept = len(list(store.folder.glob("*/*.kv")))
    assert found.keys() == {"a.txt", "b.txt"}
    assert found["a.txt"].blocks == kept and 0 < found["b.txt"].blocks < kept
    forget(store.shelf, ["b.txt"])
    (left,) = owned(store.shelf)
    assert left.document == "a.txt" and left.blocks == kept - found["b.txt"].blocks
    forget(store.shelf, ["a.txt"])
    assert not owned(store.shelf)
    again = await reader.likelihood("who?", texts)  # pages in memory still serve
    assert len(again.values) == 2


@pytest.mark.parametrize("method", ["likelihood", "attention"])
async def test_spans_of_a_text_are_kept_under_its_documents(
    deep_model: Path, tmp_path: Path, method: SpanMethod
) -> None:
    weights = Weights.load(deep_model, name="deep", kv=tmp_path)
    assert weights.engine.store is not None
    texts = ["The light is kept by Tobias Renn, who is never away from the island. " * 2, "Geese return."]
    reader = LikelihoodReader(weights.engine, weights.tokenizer)
    await reader.score_spans("who?", texts, [["a.txt"], ["b.txt"]], method=method)
    assert {one.document for one in owned(weights.engine.store.shelf)} == {"a.txt", "b.txt"}


async def test_what_stands_before_the_documents_is_of_none_and_stays(
    tiny_model: Path, tmp_path: Path
) -> None:
    weights = Weights.load(tiny_model, name="tiny", kv=tmp_path)
    store = weights.engine.store
    assert store is not None
    local = LocalChat(weights=weights, model_name="tiny", context=1024, max_tokens=2)
    rules = SystemMessage("Read with care, answer briefly and name the place. " * 4)
    for name in ("a.txt", "b.txt"):
        text = f"{name} {LONG[0].content}"[:300]
        await local.ainvoke([rules, HumanMessage(text, additional_kwargs={SOURCES: [name]})])
    rows = {one.document: one.blocks for one in owned(store.shelf)}
    assert rows.keys() == {"a.txt", "b.txt", None} and rows["a.txt"] == rows["b.txt"] > 1
    shared = len("system\n" + str(rules.content)) // 64
    assert rows[None] == shared > 1
    forget(store.shelf, ["a.txt"])
    assert {one.document: one.blocks for one in owned(store.shelf)} == {"b.txt": rows["b.txt"], None: shared}


async def test_what_a_broken_off_prompt_left_is_named_as_well(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights.load(tiny_model, name="tiny", kv=tmp_path)
    store = weights.engine.store
    assert store is not None
    local = LocalChat(weights=weights, model_name="tiny", context=1024, max_tokens=2)

    def begin(prompt: list[int], cancelled: threading.Event) -> Any:
        weights.engine.begin(prompt[:130], keep=True)[0].close()
        raise MemoryError

    monkeypatch.setattr(LocalChat, "_begin", lambda self, *args: begin(*args))
    with pytest.raises(ModelError):
        await local.ainvoke([HumanMessage(LONG[0].content, additional_kwargs={SOURCES: ["a.txt"]})])
    assert {one.document: one.blocks for one in owned(store.shelf)} == {"a.txt": 2}
