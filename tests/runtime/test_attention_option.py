"""`attention=` from a flag to the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentctx.memory.errors import ConfigError
from agentctx.memory.kv.quantised import QuantisedPool
from agentctx.models.load import open_model
from agentctx.models.local import LocalChat
from agentctx.paths import Paths
from agentctx.runtime.methods.quest import Quest
from agentctx.settings import Settings


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "cache", tmp_path / "data", tmp_path / "state", tmp_path / "config")


def test_a_method_reaches_the_engine_and_changes_the_fingerprint(tiny_model: Path, paths: Paths) -> None:
    plain = open_model(str(tiny_model), paths=paths, offline=True)
    dense = open_model(str(tiny_model), paths=paths, offline=True, attention="dense")
    quest = open_model(str(tiny_model), paths=paths, offline=True, attention="quest:budget=512")
    assert isinstance(quest.chat, LocalChat) and isinstance(plain.chat, LocalChat)
    assert quest.chat.weights.engine.method == Quest(budget=512)
    assert quest.chat.weights.engine.root == plain.chat.weights.engine.root  # one reading serves both
    assert plain.profile.fingerprint == dense.profile.fingerprint != quest.profile.fingerprint


@pytest.mark.parametrize(
    ("name", "attention"),
    [("smollm2", "sparse"), ("openai:m", "quest"), ("openai:m", "sparse"), (".", "quest:x=1")],
)
def test_what_is_refused(name: str, attention: str, paths: Paths, tiny_model: Path) -> None:
    place = str(tiny_model) if name == "." else name
    with pytest.raises(ConfigError, match="attention|no parameter 'x'"):
        open_model(place, paths=paths, attention=attention)
    assert not (paths.cache / "models").exists()


def test_it_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTCTX_ATTENTION", "mean")
    settings = Settings.load({}, cwd=tmp_path)
    assert (settings.attention, settings.origin("attention")) == ("mean", "AGENTCTX_ATTENTION")
    assert Settings.load({"attention": "quest"}, cwd=tmp_path).attention == "quest"


def test_how_kv_is_held_reaches_the_engine(tiny_model: Path, paths: Paths) -> None:
    plain = open_model(str(tiny_model), paths=paths, offline=True)
    small = open_model(str(tiny_model), paths=paths, offline=True, kv_dtype="int8", memory_bytes=1 << 28)
    assert isinstance(small.chat, LocalChat)
    assert isinstance(small.chat.weights.engine.pool, QuantisedPool)
    assert small.profile.fingerprint != plain.profile.fingerprint


def test_how_kv_is_held_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings.load({}, cwd=tmp_path).kv_dtype == "auto"
    assert Settings.load({"kv_dtype": "int4"}, cwd=tmp_path).kv_dtype == "int4"
    monkeypatch.setenv("AGENTCTX_KV_DTYPE", "int3")
    with pytest.raises(ConfigError, match="kv_dtype is 'int3'"):
        Settings.load({}, cwd=tmp_path)


def test_a_longer_window_reaches_the_plan(tiny_model: Path, paths: Paths) -> None:
    plain = open_model(str(tiny_model), paths=paths, offline=True)
    scaled = open_model(str(tiny_model), paths=paths, offline=True, attention="ropescale:factor=2")
    assert scaled.profile.context == 2 * plain.profile.context
    with pytest.raises(ConfigError, match="a window of"):
        open_model(
            str(tiny_model),
            paths=paths,
            offline=True,
            attention="ropescale:factor=2",
            window=2 * plain.profile.context + 1,
        )
