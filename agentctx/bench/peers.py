"""Who is timed: our runtime, transformers as it comes, llama.cpp where its Python binding is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentctx.bench.timing import Call
from agentctx.memory.errors import ConfigError
from agentctx.models.catalog import converted, ensure
from agentctx.models.manifest import Manifest
from agentctx.models.table import TABLE, Linears
from agentctx.models.weights import Weights
from agentctx.paths import Paths
from agentctx.runtime.context import Context
from agentctx.runtime.engine import Engine
from agentctx.runtime.llama import LlamaDecoder
from agentctx.runtime.methods.table import method

READING = {"dense": "dense", "blocktopk-1024": "blocktopk:budget=1024"}
DECODING = {"dense": "dense", "quest-1024": "quest:budget=1024"}
ANY_LENGTH = 1 << 20  # positions beyond a model's window are for timing only
NEXT = 5  # a token; which one does not matter


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lies; `gguf` is the file that its weights are from, if they are from one."""

    name: str
    folder: Path
    manifest: Manifest | None = None
    gguf: Path | None = None

    @classmethod
    def find(cls, name: str, paths: Paths) -> Place:
        """A model of the table, a folder, or a .gguf file. Raises ConfigError for anything else."""
        if name in TABLE:
            folder = ensure(TABLE[name], paths)
            return cls(name, folder, Manifest.read(folder), folder.parent / TABLE[name].gguf.basename)
        place = Path(name).expanduser()
        if place.is_dir():
            return cls(place.name, place)
        if place.suffix == ".gguf" and place.is_file():
            folder = converted(place, paths)
            return cls(place.stem, folder, Manifest.read(folder), place)
        raise ConfigError(
            f"there is no model {name!r}", hint=f"name a folder, a .gguf file, or one of {', '.join(TABLE)}"
        )

    def load(
        self, *, linears: Linears = "bf16", dtype: torch.dtype | None = None, kv: Path | None = None
    ) -> Weights:
        """With dense attention; in `dtype` instead of the one that suits the machine, if given."""
        weights = Weights.load(
            self.folder, name=self.name, verify=self.manifest, kv=kv, linears=linears, gguf=self.gguf
        )
        engine = weights.engine
        if dtype is not None and dtype != engine.body.shape.dtype:
            if not isinstance(engine.body, LlamaDecoder):
                raise ConfigError(
                    f"{self.name} is timed in {engine.body.shape.dtype} only", hint="no --dtype"
                )
            body = LlamaDecoder.load(self.folder, dtype)
            weights.engine = Engine(body, fingerprint="benchmark", memory_bytes=engine.pool.budget)
        return weights


class Ours:
    """Our runtime: one reading, gone on from in several ways. `kinds`: of linear layers."""

    def __init__(self, place: Place, kinds: list[Linears], dtype: torch.dtype) -> None:
        loaded = {kind: place.load(linears=kind, dtype=dtype) for kind in kinds}
        self.engines = {kind: weights.engine for kind, weights in loaded.items()}
        self.vocabulary = loaded[kinds[0]].tokenizer.backend.get_vocab_size()
        for engine in self.engines.values():
            engine.body.window = ANY_LENGTH
        self.read: Context | None = None
        self.forks: list[Context] = []

    def readers(self, ids: list[int]) -> dict[str, Call]:
        """Each way of reading, to the next token."""
        (kind, dense), *_ = self.engines.items()
        return {
            f"{name}/{kind}": partial(self._prefill, self._with(dense, text), ids)
            for name, text in READING.items()
        }

    def steps(self) -> dict[str, Call]:
        """A step for each kind of linear layers and each method, over forks of what was read densely."""
        assert self.read is not None, "read first"
        found: dict[str, Call] = {}
        for kind, engine in self.engines.items():
            for name, text in DECODING.items():
                state = self.read.state.fork()
                state.method, state.reading = method(text), False
                self.forks.append(Context(engine, state, list(self.read.ids)))
                found[f"{name}/{kind}"] = partial(_feed, self.forks[-1])
        return found

    def _with(self, dense: Engine, text: str) -> Engine:
        if text == "dense":
            return dense
        memory = dense.pool.budget
        return Engine(dense.body, fingerprint="benchmark", memory_bytes=memory, method=method(text))

    def _prefill(self, engine: Engine, ids: list[int]) -> None:
        engine.prefixes.clear()
        dense = engine in self.engines.values()
        if dense:
            for held in (*self.forks, *filter(None, [self.read])):
                held.close()
            self.forks.clear()
        context, hidden = engine.begin(ids)
        assert hidden is not None, "nobody cancels"
        int(engine.logits(hidden).argmax())
        if dense:
            self.read = context
        else:
            context.close()


def _feed(context: Context) -> None:
    hidden = context.feed([NEXT], spoken=True)
    assert hidden is not None, "nobody cancels"
    int(context.engine.logits(hidden, spoken=True).argmax())


class Stock:
    """transformers with `DynamicCache` and sdpa."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        self.model = loader.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)
        self._forward(ids)

    @torch.inference_mode()
    def step(self) -> None:
        self._forward([NEXT])

    def _forward(self, ids: list[int]) -> None:
        said = self.model(
            input_ids=torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        int(said.logits[0, -1].argmax())


class LlamaCpp:
    """llama.cpp on the GGUF file, flash attention on. Raises ImportError where its binding is absent."""

    def __init__(self, gguf: Path, tokens: int, threads: int) -> None:
        from llama_cpp import Llama  # type: ignore[import-not-found]

        self.model: Any = Llama(
            str(gguf),
            n_ctx=tokens + 256,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def step(self) -> None:
        self.model.eval([NEXT])
