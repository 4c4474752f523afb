"""What calibrating a model found: the heads that retrieve, and how much of its window it reads well.

Kept as JSON in the data folder, by what the model's files hold; those of the models of the table ship with
the package, by name. A user's own come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from agentctx.memory.atomic import write_bytes
from agentctx.memory.errors import StoreError
from agentctx.models.table import TABLE

VERSION = 1  # raise it when what calibrating does changes what it finds


@dataclass(frozen=True, slots=True)
class Calibration:
    """`heads`: (layer, head) of a model of `layers` layers of `width` query heads each, in the order in which
    they were chosen. `mrr` and `first`: on the half of the needles on which they were not chosen, mean
    reciprocal rank of the right sentence and how often it is first; `mrr_middle`, `first_middle`: the same
    by all heads of the middle layers. `hits` and `shares`, `[layers][width]`: of each head alone, how often
    the right sentence is first, and the share of its attention that goes there (empty: not kept).

    `recall`: tokens of a text, and the share of its facts that the model names when asked; `reliable`: the
    longest text of which it named 0.9, None if there is none.
    """

    model: str
    layers: int
    width: int
    heads: tuple[tuple[int, int], ...]
    mrr: float
    first: float
    mrr_middle: float
    first_middle: float
    questions: int
    tokens: int  # of each text
    seed: int
    filler: str  # "generated", or the folder
    recall: Mapping[int, float]
    reliable: int | None
    hits: tuple[tuple[float, ...], ...]
    shares: tuple[tuple[float, ...], ...]
    version: int = VERSION

    @property
    def router_layers(self) -> tuple[int, ...]:
        """The layers that hold a retrieval head."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def write(self, file: Path) -> None:
        """OSError where it cannot be written."""
        table = asdict(self) | {"router_layers": self.router_layers}
        write_bytes(file, json.dumps(table).encode())


def calibration_file(folder: Path, content: str) -> Path:
    """Where a user's calibration of the model with this content stands."""
    return folder / f"{content[:16]}.json"


def calibration_of(folder: Path, content: str, name: str) -> Calibration | None:
    """What is known of a model: the user's, else what ships for this `name` in the table. None if it was
    never calibrated, or by another version. StoreError (corrupt) for a file that is not one.
    """
    own = calibration_file(folder, content)
    if own.is_file():
        try:
            return _parsed(own.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{own} is not a calibration",
                code="corrupt",
                hint="delete it, or run `agentctx calibrate` again",
            ) from error
    return shipped(name) if name in TABLE else None


def shipped(name: str) -> Calibration | None:
    """That of a model of the table."""
    file = files("agentctx.models").joinpath("calibrated").joinpath(f"{name}.json")
    return _parsed(file.read_text(encoding="utf-8")) if file.is_file() else None


def _parsed(text: str) -> Calibration | None:
    table: dict[str, Any] = json.loads(text)
    if table["version"] != VERSION:
        return None
    known = {field.name: table[field.name] for field in fields(Calibration)}
    known["heads"] = tuple((int(layer), int(head)) for layer, head in table["heads"])
    known["recall"] = {int(tokens): float(share) for tokens, share in table["recall"].items()}
    for name in ("hits", "shares"):
        known[name] = tuple(tuple(map(float, row)) for row in table[name])
    found = Calibration(**known)
    if not all(0 <= layer < found.layers and 0 <= head < found.width for layer, head in found.heads):
        raise ValueError("heads that the model does not have")
    return found
