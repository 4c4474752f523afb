"""4-bit weights from GGUF to answer: every code is the weight it stands for, in the right row."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from agentctx.memory.errors import ConfigError
from agentctx.models.int4 import codes, quantise
from agentctx.models.load import open_model
from agentctx.models.manifest import Manifest
from agentctx.models.table import SMOLLM2, Linears
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime import twins
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.sampling import Sampling, generate


@pytest.fixture(scope="module")
def folder(embedded: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the embedded model's folder, of links, beside its GGUF file."""
    source = embedded.models / "smollm2"
    place = tmp_path_factory.mktemp("models") / "smollm2"
    ignored = shutil.ignore_patterns("staging", twins.FILE)
    shutil.copytree(source, place, copy_function=os.symlink, ignore=ignored)
    return place / "safetensors"


def load(folder: Path, linears: Linears, warnings: list[str]) -> Weights:
    return Weights.load(
        folder,
        name="smollm2",
        verify=Manifest.read(folder),
        memory_bytes=1 << 30,
        linears=linears,
        gguf=folder.parent / SMOLLM2.gguf.basename,
        warn=warnings.append,
    )


def answer(weights: Weights) -> str:
    ids = weights.tokenizer.encode("The capital of France is")
    context, hidden = weights.engine.begin(ids)
    found = generate(
        context, hidden, most=5, ends=weights.ends, sampling=Sampling(), cancelled=threading.Event()
    )
    return weights.tokenizer.decode(list(found), special=True)


@pytest.mark.model
def test_every_code_of_the_gguf_is_the_weight_of_its_row(folder: Path) -> None:
    body = LlamaDecoder.load(folder, torch.bfloat16)
    known = codes(folder.parent / SMOLLM2.gguf.basename)
    assert len(known) == 7 * body.shape.layers
    for name, parts, linear in body.linears():
        if name == twins.HEAD:
            continue
        joined = twins.Codes(*(torch.cat(part) for part in zip(*(known[one] for one in parts), strict=True)))
        groups = joined.codes.view(*joined.scales.shape, -1)
        values = groups * joined.scales[..., None] + joined.minima[..., None]
        assert torch.equal(values.view(linear.weight.shape).to(torch.bfloat16), linear.weight), name


@pytest.mark.model
def test_twins_are_made_once_without_quantising_again(folder: Path) -> None:
    warnings: list[str] = []
    plain = load(folder, "bf16", warnings)
    first = load(folder, "int4", warnings)
    kept = folder / twins.FILE
    made = kept.stat().st_mtime_ns
    again = load(folder, "int4", warnings)
    assert kept.stat().st_mtime_ns == made and not warnings
    assert first.fingerprint == again.fingerprint != plain.fingerprint
    assert first.engine.body.weight_bytes > plain.engine.body.weight_bytes
    assert "Paris" in answer(plain) and "Paris" in answer(first)
    assert answer(first) == answer(again)
    kept.unlink()


@pytest.mark.model
def test_without_the_gguf_they_are_quantised_a_second_time_with_a_warning(folder: Path) -> None:
    manifest, warnings = Manifest.read(folder), list[str]()
    assert manifest
    body = LlamaDecoder.load(folder, torch.bfloat16)
    elsewhere = folder.parent / "elsewhere"
    quantise(body, elsewhere, source="x", manifest=manifest, gguf=None, warn=warnings.append)
    assert len(warnings) == 1 and "second time" in warnings[0]
    assert (elsewhere / twins.FILE).is_file()
    assert body.head.twin is not None


@pytest.mark.model
def test_the_embedded_model_s_codes_are_those_of_its_file(folder: Path, tmp_path: Path) -> None:
    """Without the file they are others: told each time, another model, and only until it is back."""
    gguf, paths = folder.parent / SMOLLM2.gguf.basename, Paths(tmp_path, tmp_path, tmp_path, tmp_path)
    paths.models.symlink_to(folder.parents[1])
    gguf.rename(away := tmp_path / gguf.name)
    without = [open_model("smollm2", paths=paths, offline=True, linears="int4", kv_bytes=0) for _ in range(2)]
    assert [len(model.warnings) for model in without] == [1, 1]
    assert all("second time" in model.warnings[0].message for model in without)
    away.rename(gguf)
    found = [open_model("smollm2", paths=paths, offline=True, linears="int4", kv_bytes=0) for _ in range(2)]
    assert [model.warnings for model in found] == [(), ()]
    first, other = ({model.profile.fingerprint for model in models} for models in (found, without))
    assert len(first) == len(other) == 1 and first != other


def test_a_folder_of_the_user_is_not_written_to(tiny_model: Path) -> None:
    before = sorted(tiny_model.iterdir())
    weights = Weights.load(tiny_model, name="tiny", linears="int4")
    assert isinstance(weights.engine.body, LlamaDecoder)
    assert weights.engine.body.layers[0].qkv.twin is not None
    assert sorted(tiny_model.iterdir()) == before


def test_auto_follows_what_was_measured(tiny_model: Path) -> None:
    def has_twins(linears: Linears = "auto", measured: Linears = "bf16") -> bool:
        body = Weights.load(tiny_model, name="tiny", linears=linears, measured=measured).engine.body
        assert isinstance(body, LlamaDecoder)
        return body.head.twin is not None

    assert not has_twins()
    assert not has_twins(linears="bf16", measured="int4")
    fast = Weights.load(tiny_model, name="tiny").engine.body.shape.dtype == torch.bfloat16
    assert has_twins(measured="int4") is fast


def test_what_cannot_have_them_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="4 bits"):
        Weights.load(folder, name="other", linears="int4")
