"""A model with what was indexed for it, where that can be used. Imports torch only if there is an index."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agentctx.memory.errors import StoreError
from agentctx.memory.types import Notice
from agentctx.paths import Paths

if TYPE_CHECKING:
    from agentctx.models.load import Model


def with_index(model: Model, paths: Paths) -> Model:
    """The model with its index under `paths`; without one if nothing was indexed for it.

    An index that is damaged or of another version is not used, and a warning says so.
    """
    if model.profile.kind != "local" or not paths.index.is_dir():
        return model
    from agentctx.corpus.held import DATABASE
    from agentctx.corpus.index import Index, folder_of, usable

    folder = folder_of(paths.index, model)
    if not (folder / DATABASE).is_file() or not usable(model):
        return model
    if getattr(model.chat, "exact", False):
        said = "the index is not used: answers over composed KV are not those of dense attention"
        return replace(model, warnings=(*model.warnings, Notice("index", said, str(folder))))
    try:
        return replace(model, index=Index(folder, model))
    except StoreError as error:
        said = f"the index is not used: {error.message}; {error.hint}"
        return replace(model, warnings=(*model.warnings, Notice("index", said, str(folder))))
