"""From the name of a model to everything a run needs of it: chat model, profile, counter, reader."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.memory.kv.dtype import KVDtype
from agentctx.memory.types import Notice
from agentctx.models.fetch import Progress, announce
from agentctx.models.table import TABLE, Entry, Linears
from agentctx.paths import KV_BYTES, Paths
from agentctx.runtime.methods.auto import automatic
from agentctx.runtime.methods.table import place_of
from agentctx.workflows.profile import ModelProfile

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from agentctx.models.manifest import Manifest
    from agentctx.models.weights import Weights
    from agentctx.workflows.ports import Counter, Embedder, KVIndex, Reader

ENDPOINT = "openai:"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is ready to be asked."""

    chat: BaseChatModel
    profile: ModelProfile
    counter: Counter
    reader: Reader | None  # None: the model can only generate
    warnings: tuple[Notice, ...] = ()
    index: KVIndex | None = None  # of what it has read, if anything was indexed
    embedder: Embedder | None = None  # a model beside it, that finds passages by their meaning


@dataclass(frozen=True, slots=True)
class Loading:
    """How a local model is opened: tokens of its window, its attention, bytes of disk and of memory."""

    window: int | None
    attention: str
    exact: bool
    linears: Linears
    kv_dtype: KVDtype
    kv_bytes: int
    memory_bytes: int | None


def open_model(
    name: str,
    *,
    base_url: str | None = None,
    paths: Paths,
    offline: bool = False,
    window: int | None = None,
    attention: str = "auto",
    exact: bool = False,
    linears: Linears = "auto",
    kv_dtype: KVDtype = "auto",
    kv_bytes: int = KV_BYTES,
    memory_bytes: int | None = None,
    concurrency: int | None = None,
    embed: str = "none",
    progress: Progress | None = None,
) -> Model:
    """Open `name`: a fetchable model (`smollm2`), a folder, a .gguf file, a hub id, or `openai:NAME`.

    `window` lowers a local model's window, or states an endpoint's, in tokens. `offline` forbids every
    download. `attention`: how a local model reads, `NAME` or `NAME:key=value,...`; with `exact` a sparse
    method only drafts answers, which are those of dense attention. `linears` chooses the
    weights that a local model generates with: "bf16", the smaller and faster "int4", or "auto", int4 where
    that is known to cost little. `kv_dtype`: what it has read is held in memory in the model's dtype, or in 8
    or 4 bits. `kv_bytes` bounds what is kept on disk of what a local model reads, 0 keeps nothing;
    `memory_bytes` its weights and KV in memory, None takes 60 % of what is free; `concurrency` the calls in
    flight at an endpoint. `embed`: see `embedding.open_embedder`; its vectors are kept on disk unless
    `kv_bytes` is 0. ConfigError for an unknown name or a contradiction, ModelError for what cannot be loaded.
    """
    report = progress or announce
    place_of(attention)  # a misspelt name is told before anything is fetched
    how = Loading(window, attention, exact, linears, kv_dtype, kv_bytes, memory_bytes)
    if name.startswith(ENDPOINT):
        local: dict[str, str | bool] = {"attention": attention, "exact": exact}
        _refuse_local(name, local | {"linears": linears, "kv_dtype": kv_dtype})
        from agentctx.models.endpoint import open_endpoint

        model = open_endpoint(
            name.removeprefix(ENDPOINT),
            base_url=base_url,
            offline=offline,
            window=window,
            concurrency=concurrency,
        )
    elif base_url is not None:
        raise ConfigError(f"{name!r} is a local model, which has no base URL", hint=f"write {ENDPOINT}NAME")
    else:
        model = _open_local(name, paths, how, offline=offline, progress=report)
    from agentctx.models.embedding import open_embedder

    beside = open_embedder(embed, paths, keep=kv_bytes > 0, offline=offline, progress=report)
    return replace(model, embedder=beside)


def _open_local(name: str, paths: Paths, how: Loading, *, offline: bool, progress: Progress) -> Model:
    if name in TABLE:
        return _open_fetched(TABLE[name], paths, how, offline=offline, progress=progress)
    place = _find(name, offline=offline, progress=progress)
    if place.is_dir():
        return _open_folder(place, name, paths, how)
    return _open_gguf(place, paths, how, progress=progress)


def _refuse_local(name: str, options: Mapping[str, str | bool]) -> None:
    """What an endpoint does inside is its own: a choice that could have no effect is a mistake."""
    for option, value in options.items():
        if value not in ("auto", False):
            flag = option.replace("_", "-")
            raise ConfigError(
                f"{option} is {value!r}, which a local model alone can have: {name} is an endpoint",
                hint=f"leave {option} (--{flag}) out, or name a local model",
            )


def _open_fetched(entry: Entry, paths: Paths, how: Loading, *, offline: bool, progress: Progress) -> Model:
    from agentctx.models.catalog import ensure
    from agentctx.models.manifest import Manifest

    folder = ensure(entry, paths, offline=offline, progress=progress)
    gguf = folder.parent / entry.gguf.basename
    return _open_folder(
        folder, entry.name, paths, how, entry=entry, manifest=Manifest.read(folder), gguf=gguf
    )


def _open_gguf(file: Path, paths: Paths, how: Loading, *, progress: Progress) -> Model:
    from agentctx.models.catalog import converted
    from agentctx.models.manifest import Manifest

    if file.suffix != ".gguf":
        raise ConfigError(f"{file} is not a model", hint="name a folder with safetensors, or a .gguf file")
    folder = converted(file, paths, progress=progress)
    try:
        return _open_folder(folder, file.stem, paths, how, manifest=Manifest.read(folder), gguf=file)
    except ModelError as error:
        if error.code != "wrong_hash":
            raise
    folder = converted(file, paths, progress=progress, repair=True)
    return _open_folder(folder, file.stem, paths, how, manifest=Manifest.read(folder), gguf=file)


def _open_folder(
    folder: Path,
    name: str,
    paths: Paths,
    how: Loading,
    *,
    entry: Entry | None = None,
    manifest: Manifest | None = None,
    gguf: Path | None = None,
) -> Model:
    with _collector_resting():
        from agentctx.models.calibration import calibration_of
        from agentctx.models.weights import Weights

        said: list[str] = []
        weights = Weights.load(
            folder,
            name=name,
            verify=manifest,
            attention=automatic(entry.name) if entry and how.attention == "auto" else how.attention,
            linears=how.linears,
            kv_dtype=how.kv_dtype,
            measured=entry.linears if entry else "bf16",
            gguf=gguf,
            kv=paths.kv if how.kv_bytes else None,
            kv_bytes=how.kv_bytes,
            memory_bytes=how.memory_bytes,
            warn=said.append,
        )
        weights.entry = entry
        weights.calibration = calibration_of(paths.calibration, weights.content, entry.name if entry else "")
        context = how.window or weights.context
        if context > weights.engine.window:
            raise ConfigError(
                f"a window of {context} tokens is more than the {weights.engine.window} that {name} takes"
            )
        fingerprint = weights.fingerprint + " exact" * how.exact
        reliable = weights.calibration.reliable if weights.calibration else None
        profile = ModelProfile(
            name=name, kind="local", fingerprint=fingerprint, context=context, reliable=reliable
        )
        model = _assemble(weights, profile if entry is None else _measured(profile, entry), exact=how.exact)
        return replace(model, warnings=tuple(Notice("model", line, name) for line in said))


@contextmanager
def _collector_resting() -> Iterator[None]:
    """What is imported here stays: to look for garbage in it, again and again, costs a sixth of the load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measured(profile: ModelProfile, entry: Entry) -> ModelProfile:
    return replace(
        profile, reliable=profile.reliable or entry.reliable, tiers=entry.tiers, rate_in=900.0, rate_out=18.0
    )


def _assemble(weights: Weights, profile: ModelProfile, *, exact: bool) -> Model:
    from agentctx.models.counters import TemplateCounter
    from agentctx.models.local import LocalChat
    from agentctx.models.reader import LikelihoodReader

    chat = LocalChat(weights=weights, model_name=profile.name, context=profile.context, exact=exact)
    reader = LikelihoodReader(weights.engine, weights.tokenizer, weights.calibration)
    return Model(chat, profile, TemplateCounter(chat.template), reader)


def _find(name: str, *, offline: bool, progress: Progress) -> Path:
    """The place of a model that the user named: a path, or a hub id, whose files are brought here first."""
    place = Path(name).expanduser()
    if place.exists():
        return place
    looks_like_path = place.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if looks_like_path:
        raise ConfigError(
            f"there is no model {name!r}",
            hint=f"known: {', '.join(sorted(TABLE))}; or name a folder, a .gguf file, a hub id (owner/name) "
            f"or {ENDPOINT}NAME",
        )
    from agentctx.models.hub import snapshot

    return snapshot(name, offline=offline, progress=progress)
