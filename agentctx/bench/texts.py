"""Long real text: files that the user names, or, for a quick run, the source code of this package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from agentctx.memory.errors import InputError

if TYPE_CHECKING:
    from agentctx.models.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md")
LONGEST = 16  # characters of a token, more than which a file is not read for


@dataclass(frozen=True, slots=True)
class Text:
    """The beginning of a file, as tokens."""

    name: str
    ids: tuple[int, ...]


def collect(folders: Sequence[Path], tokenizer: Tokenizer, length: int, count: int) -> list[Text]:
    """`count` texts of `length` tokens, from as many folders as there are. None given: this package's code.

    Raises InputError (not_found) where no file is that long.
    """
    found = list(islice(_long_enough(folders, tokenizer, length), count))
    if not found:
        where = ", ".join(map(str, folders)) or "the package"
        raise InputError(
            f"no text of {length:,} tokens in {where}",
            code="not_found",
            hint="name a folder with longer .txt files as --data, or shorter --lengths",
        )
    return found


def _long_enough(folders: Sequence[Path], tokenizer: Tokenizer, length: int) -> Iterator[Text]:
    written = ((name, _beginning(path, length)) for name, path in _files(folders))
    for name, text in written if folders else [_own_code()]:
        if len(text) < length:
            continue
        ids: list[int] = tokenizer.encode(text, special=True)
        if len(ids) >= length:
            yield Text(name, tuple(ids[:length]))


def _files(folders: Sequence[Path]) -> Iterable[tuple[str, Path]]:
    """In turns from each folder that holds any, so that the first few are of different kinds."""
    kinds: dict[Path, list[tuple[str, Path]]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}", code="not_found", source=str(folder))
        for path in sorted(folder.rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                name = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
                kinds.setdefault(path.parent, []).append((name, path))
    return (found for turn in zip_longest(*kinds.values()) for found in turn if found is not None)


def _beginning(path: Path, length: int) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(length * LONGEST)


def _own_code() -> tuple[str, str]:
    package = files("agentctx")
    modules = sorted(Path(str(package)).glob("*.py"))
    return "agentctx", "\n".join(path.read_text(encoding="utf-8") for path in modules)
