"""Opening models by name: folders, damage, unknown names; the embedded model as it is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.models import weights
from agentctx.models.load import Model, open_model
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.body import Body


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    root = tmp_path / "home"
    return Paths(root / "cache", root / "data", root / "state", root / "config")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_folder(tiny_model: Path, paths: Paths) -> None:
    model = open_model(str(tiny_model), paths=paths, offline=True)
    assert (model.profile.kind, model.profile.context, model.profile.reliable) == ("local", 1024, None)
    sent = model.counter.count_messages([HumanMessage("hello")])
    reply = model.chat.invoke("hello", max_tokens=4)
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["input_tokens"] == sent
    assert model.counter.count_text("hello") == 5
    assert model.counter.exact
    assert not paths.cache.exists()


def test_a_smaller_window_is_kept(tiny_model: Path, paths: Paths) -> None:
    model = open_model(str(tiny_model), paths=paths, window=300)
    assert model.profile.context == 300
    with pytest.raises(ModelError, match="300"):
        model.chat.invoke("x" * 400)


def test_a_window_above_the_model_s(tiny_model: Path, paths: Paths) -> None:
    with pytest.raises(ConfigError, match="1024"):
        open_model(str(tiny_model), paths=paths, window=5000)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c"])
def test_unknown_names(paths: Paths, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_model(name, paths=paths)
    assert name in caught.value.message
    assert "smollm2" in caught.value.hint


def test_a_hub_id_offline(paths: Paths) -> None:
    with pytest.raises(ModelError) as caught:
        open_model("nobody/no-model", paths=paths, offline=True)
    assert caught.value.code == "not_fetched"


def test_a_hub_id_that_is_cached(
    tiny_model: Path, paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(tiny_model, cached / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = open_model("someone/tiny", paths=paths, offline=True)
    assert (model.profile.name, model.profile.context) == ("someone/tiny", 1024)


def test_a_local_model_with_a_url(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="base URL"):
        open_model("smollm2", base_url="http://127.0.0.1:9/v1", paths=paths)


def test_the_default_offline(paths: Paths) -> None:
    with pytest.raises(ModelError) as caught:
        open_model("smollm2", paths=paths, offline=True)
    assert caught.value.code == "not_fetched"


def test_a_file_that_is_no_model(tmp_path: Path, paths: Paths) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        open_model(str(tmp_path / "notes.txt"), paths=paths)


def test_no_config(folder: Path, paths: Paths) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(str(folder), paths=paths)


def test_pickled_weights_are_refused(folder: Path, paths: Paths) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        open_model(str(folder), paths=paths)
    assert "pickle" in caught.value.hint


def test_truncated_weights(folder: Path, paths: Paths) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_model(str(folder), paths=paths)


def test_missing_tensors_are_not_replaced_by_noise(folder: Path, paths: Paths) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj.weight is missing"):
        open_model(str(folder), paths=paths)


def test_a_missing_shard(folder: Path, paths: Paths) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 of 2 shards.*model-2"):
        open_model(str(folder), paths=paths)


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "mod', "[]", "{}", '{"weight_map": ["a"]}'])
def test_a_damaged_list_of_shards(folder: Path, paths: Paths, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        open_model(str(folder), paths=paths)


@pytest.mark.parametrize("text", ['{"eos_token_id": [1', "[2]"])
def test_a_damaged_generation_config(folder: Path, paths: Paths, text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"cannot be loaded.*generation_config\.json"):
        open_model(str(folder), paths=paths)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": "two"}, {"rope_parameters": "default"}])
def test_a_config_of_the_wrong_types(folder: Path, paths: Paths, fields: dict[str, str]) -> None:
    change(folder, **fields)
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_model(str(folder), paths=paths)


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes"])
def test_a_quantised_folder_is_refused_with_a_way_out(folder: Path, paths: Paths, kind: str) -> None:
    how = {"quant_method": kind, "bits": 4, "group_size": 32, "load_in_4bit": kind == "bitsandbytes"}
    change(folder, quantization_config=how)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        open_model(str(folder), paths=paths)
    assert "bf16 weights or a GGUF" in caught.value.hint


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-architecture"}'])
def test_a_config_that_transformers_does_not_know(folder: Path, paths: Paths, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_model(str(folder), paths=paths)


def test_code_beside_the_weights_is_not_run(folder: Path, paths: Paths, tmp_path: Path) -> None:
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(folder, model_type="evil", auto_map=named)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError):
        open_model(str(folder), paths=paths)
    assert not (tmp_path / "ran").exists()


def test_no_chat_template(folder: Path, paths: Paths) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="chat template"):
        open_model(str(folder), paths=paths)


def test_a_tokenizer_that_truncates_is_cured(folder: Path, paths: Paths) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(tokenizer))
    assert open_model(str(folder), paths=paths).counter.count_text("x" * 100) == 100


def test_the_fingerprint_follows_weights_and_template(folder: Path, tiny_weights: Weights) -> None:
    def fingerprint() -> str:
        return Weights.load(folder, name="copy").fingerprint

    first = fingerprint()
    assert first == fingerprint()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    second = fingerprint()
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert len({first, second, fingerprint()}) == 3


def test_loading_is_silent(tiny_model: Path, tmp_path: Path) -> None:
    """Not a byte on stdout or stderr: stdout carries data only, stderr what we decide."""
    code = textwrap.dedent(f"""
        from pathlib import Path
        from agentctx.models.load import open_model
        from agentctx.paths import Paths

        here = Path({str(tmp_path)!r})
        open_model({str(tiny_model)!r}, paths=Paths(here, here, here, here)).chat.invoke("x", max_tokens=3)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_hub_client_stays_as_it_was_and_is_not_used(folder: Path, tmp_path: Path) -> None:
    """A model that transformers loads, and a tokenizer: no connection, and none is forbidden afterwards."""
    change(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    words = tmp_path / "words"
    words.mkdir()
    (words / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a"]))
    (words / "config.json").write_text('{"model_type": "bert"}')
    (words / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    code = textwrap.dedent(f"""
        import os, socket
        from pathlib import Path

        tried = []

        def refuse(*args, **options):
            tried.append(args)
            raise OSError("no network")

        socket.getaddrinfo = socket.socket.connect = refuse
        from agentctx.models.tokenizer import Tokenizer
        from agentctx.models.weights import Weights

        body = Weights.load(Path({str(folder)!r}), name="copy").engine.body
        Tokenizer.load(Path({str(words)!r}))
        from huggingface_hub import constants

        print(type(body).__name__, tried, constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE" in os.environ)
    """)
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert done.stdout == "HFBody [] False False\n"


def test_the_share_of_memory_is_of_what_was_free_before_the_weights(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, read = [1 << 30], weights._read_body

    def reading(folder: Path, dtype: torch.dtype, device: str) -> Body:
        body = read(folder, dtype, device)
        free[0] -= body.weight_bytes
        return body

    monkeypatch.setattr(weights, "_read_body", reading)
    monkeypatch.setattr(weights, "spare_bytes", lambda device: free[0] // 2)
    engine = Weights.load(tiny_model, name="tiny").engine
    assert engine.pool.budget == (1 << 29) - engine.body.weight_bytes


@pytest.mark.model
def test_the_embedded_model_answers(embedded_model: Model) -> None:
    reply = embedded_model.chat.invoke("How many legs has a spider?")  # it is sure of the answer
    assert "8" in str(reply.content)
    assert embedded_model.profile.tiers == {"reads"}
    assert embedded_model.profile.window == 300


@pytest.mark.model
def test_the_embedded_tokenizer_is_the_one_transformers_would_choose(
    embedded: Paths, embedded_model: Model
) -> None:
    from transformers import AutoTokenizer

    chosen = AutoTokenizer.from_pretrained(embedded.models / "smollm2" / "safetensors")
    for text in (
        "The court ruled on 3 May 2021.",
        "naïve façade — 日本語 😀\t\n\n  x",
        "def f(a):\n    return a",
    ):
        assert embedded_model.counter.count_text(text) == len(chosen.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("option", "value"),
    [("attention", "quest"), ("exact", True), ("linears", "int4"), ("kv_dtype", "int8")],
)
def test_an_endpoint_refuses_what_only_a_local_model_has(
    paths: Paths, option: str, value: str | bool
) -> None:
    given: Any = {option: value}
    with pytest.raises(ConfigError, match=f"{option} is {value!r}.*openai:x is an endpoint") as caught:
        open_model("openai:x", base_url="http://127.0.0.1:9/v1", paths=paths, **given)
    assert caught.value.hint == f"leave {option} (--{option.replace('_', '-')}) out, or name a local model"
