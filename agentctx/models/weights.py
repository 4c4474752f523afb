"""A causal language model in memory: its tokenizer, and the engine that runs it.

Reads a Hugging Face folder of safetensors; never a pickle, never code that ships with weights. Loading is
kept short: hashes are checked beside the import of torch, and for a plain Llama transformers is not imported
at all.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.dtype import KVDtype
from agentctx.models.manifest import Manifest
from agentctx.models.table import Entry, Linears
from agentctx.models.tokenizer import Tokenizer, json_object
from agentctx.paths import KV_BYTES
from agentctx.runtime.memory import spare_bytes
from agentctx.runtime.methods.table import method

if TYPE_CHECKING:
    import torch

    from agentctx.models.calibration import Calibration
    from agentctx.runtime.body import Body
    from agentctx.runtime.engine import Engine
    from agentctx.runtime.llama import LlamaDecoder

LOADER = "2"  # part of every fingerprint; raise it when loading or prompting changes what a model answers
_BLOCK = 1 << 20
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError)  # what reading files of another make comes to


class Weights:
    """What `LocalChat` and a reader share. `ends`: the tokens that end an answer; `entry`: the model in the
    table, if it is from there; `calibration`: what `agentctx calibrate` found out about the model.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, name: str, ends: frozenset[int], *, content: str = ""
    ) -> None:
        """`content`: changes with the files alone; without it, with all that `fingerprint` changes with."""
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self.ends = ends
        self.content = content or engine.identity
        self.entry: Entry | None = None
        self.calibration: Calibration | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with the files, the dtype, the loader and the attention method."""
        return self.engine.identity

    @property
    def context(self) -> int:
        """Tokens, prompt and answer together; the model's own where its attention knows no limit."""
        return self.engine.body.window if self.engine.method.endless else self.engine.window

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        verify: Manifest | None = None,
        kv: Path | None = None,
        kv_bytes: int = KV_BYTES,
        memory_bytes: int | None = None,
        attention: str = "dense",
        linears: Linears = "auto",
        kv_dtype: KVDtype = "auto",
        measured: Linears = "bf16",
        gguf: Path | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> Weights:
        """Read `folder`; ModelError when something is missing, corrupt or too large for the memory.

        `verify` is the list of files that must hash as written. `kv` is the folder that keeps KV between
        processes, within `kv_bytes`; None keeps it in memory only. `memory_bytes` bounds weights and KV in
        memory; None takes 60 % of what is free. `attention`: see `runtime.methods.table.method`; ConfigError
        for what it does not know. `kv_dtype`: see `memory.kv.quantised.pool_of`.

        `linears`: with "int4" a few rows at a time go through 4-bit copies of the linear layers, made of the
        codes in `gguf` if the folder came from there; "auto" is `measured`, what is known to cost this model
        little, on a processor that multiplies bfloat16. ConfigError for a model that cannot have them. `warn`
        is told what is less than it could be.
        """
        if verify is None:
            _check_files(folder)
        with ThreadPoolExecutor(1) as beside:
            identity = beside.submit(_identity, folder, verify)
            from agentctx.memory.kv.store import BlockStore  # torch comes with it
            from agentctx.runtime.engine import Engine

            dtype, device = _choose_device()
            chosen = method(attention)
            content = identity.result()  # before anything of the files is used
            room = spare_bytes(device) if memory_bytes is None else memory_bytes
            body, tokenizer, ends = _read(folder, dtype, device, name, beside)
        identified_by = f"{LOADER} {content} {dtype}"
        if _can_quantise(body, linears, measured, name):
            from agentctx.models.int4 import quantise

            made_of = quantise(body, folder, source=content, manifest=verify, gguf=gguf, warn=warn)
            identified_by += f" int4 of {made_of}"
        fingerprint = hashlib.sha256(identified_by.encode()).hexdigest()
        store = BlockStore(kv, fingerprint[:16], budget=kv_bytes, name=name) if kv else None
        engine = Engine(
            body,
            fingerprint=fingerprint,
            memory_bytes=max(0, room - body.weight_bytes),
            method=chosen,
            store=store,
            kv_dtype=kv_dtype,
        )
        return cls(engine, tokenizer, name, ends, content=content)


def _read(
    folder: Path, dtype: torch.dtype, device: str, name: str, beside: Executor
) -> tuple[Body, Tokenizer, frozenset[int]]:
    from safetensors import SafetensorError

    from agentctx.models.failures import memory_errors

    try:
        with memory_errors(name):
            body = beside.submit(_read_body, folder, dtype, device)
            tokenizer = Tokenizer.load(folder)
            return body.result(), tokenizer, _end_tokens(folder, tokenizer)
    except (*_DAMAGE, OSError, RuntimeError, ImportError, SafetensorError) as error:
        hint = "check that the files are complete and that transformers supports the architecture"
        if b'"quantization_config"' in (folder / "config.json").read_bytes():
            hint = "quantised folders are not served: use the bf16 weights or a GGUF"
        raise ModelError(
            f"the model {name} cannot be loaded from {folder}: {_first_line(error)}", hint=hint
        ) from error


def _read_body(folder: Path, dtype: torch.dtype, device: str) -> Body:
    from agentctx.runtime import llama

    config = json_object(folder / "config.json")
    if device == "cpu" and llama.supports(config):
        return llama.LlamaDecoder.load(folder, dtype)
    with _quiet_transformers():
        from transformers import AutoModelForCausalLM

        from agentctx.runtime.hf.body import HFBody

        loader: Any = AutoModelForCausalLM
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):  # transformers would fill them with noise
            raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
        return HFBody(model.requires_grad_(False).to(device))


def _can_quantise(body: Body, linears: Linears, measured: Linears, name: str) -> TypeGuard[LlamaDecoder]:
    """Whether int4 is wanted; ConfigError if it was asked for and cannot be had."""
    import torch

    from agentctx.runtime.llama import LlamaDecoder

    able = isinstance(body, LlamaDecoder)
    if linears == "int4" and not able:
        raise ConfigError(
            f"{name} cannot have linear layers of 4 bits here: they are for Llama and Qwen on a CPU",
            hint="set linears to auto or bf16",
        )
    fast = body.shape.dtype == torch.bfloat16
    return able and (linears == "int4" or (linears == "auto" and measured == "int4" and fast))


def _check_files(folder: Path) -> None:
    """Refuse early, with a reason, what could not be loaded or must not be."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json_object(index)["weight_map"].values()))
        except _DAMAGE as error:
            raise ModelError(
                f"the list of shards {index} cannot be read: {_first_line(error)}",
                hint="check that the files are complete",
            ) from error
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ModelError(
                f"{folder} lacks {len(absent)} of {len(shards)} shards, the first is {absent[0]}"
            )
    elif not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"{folder} holds no safetensors weights",
            hint="agentctx reads safetensors and GGUF, never pickles",
        )


def _choose_device() -> tuple[torch.dtype, str]:
    """bfloat16 where the hardware multiplies it fast, else float32, which is right everywhere."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16, "cuda"
    able: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # absent from the oldest supported torch
    fast = any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return (torch.bfloat16 if fast else torch.float32), "cpu"


def _identity(folder: Path, manifest: Manifest | None) -> str:
    """A hash that changes with the files: the manifest's where there is one, checked against them first."""
    if manifest is not None:
        manifest.verify(folder)
        return manifest.digest
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path, blocks: int = 16) -> bytes:
    """SHA-256 of `blocks` evenly spaced MiB: all of a small file, and 10 GB cost no more than 16 MB."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for offset in sorted({max(0, size - _BLOCK) * i // (blocks - 1) for i in range(blocks)}):
            file.seek(offset)
            digest.update(file.read(_BLOCK))
    return digest.digest()


def _end_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    named = json_object(folder / "generation_config.json").get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in (*listed, tokenizer.end) if isinstance(token, int))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Nothing of ours goes to stderr unasked: silence progress bars and advice, then restore them."""
    from transformers import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
