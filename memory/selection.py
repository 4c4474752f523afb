"""Which files of a directory to read, and how. The fields are the words of the command line's flags."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from agentctx.memory.errors import ConfigError
from agentctx.memory.loaders.decode import codec_of


@dataclass(frozen=True, slots=True)
class Selection:
    """Applies to what is found inside directories; a file that was named itself is always taken.

    `include` and `exclude` are .gitignore patterns. `encodings` are "GLOB=NAME" pairs, the first glob that
    matches a file's name or path decides, also for files that were named. `max_file_bytes` replaces the
    limits of the formats; of each directory `max_files` are read. Raises ConfigError for an encoding that
    does not exist.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hidden: bool = False  # also names that begin with a dot, except .git and .env*
    no_ignore: bool = False  # also what .gitignore leaves out
    encodings: tuple[str, ...] = ()
    max_file_bytes: int | None = None
    max_files: int = 10_000

    def __post_init__(self) -> None:
        for pair in self.encodings:
            glob, _, name = pair.rpartition("=")
            if not glob:
                raise ConfigError(f"encoding {pair!r} is not GLOB=NAME", hint="for example '*.txt=cp1252'")
            if codec_of(name) is None:
                raise ConfigError(f"unknown encoding {name!r}", hint="use a name that Python knows")
        if self.max_file_bytes is not None and self.max_file_bytes < 1:
            raise ConfigError(f"max_file_bytes must be at least 1, got {self.max_file_bytes}")
        if self.max_files < 1:
            raise ConfigError(f"max_files must be at least 1, got {self.max_files}")

    def encoding_of(self, source: str) -> str | None:
        """The encoding asked for `source`, None to detect it."""
        for pair in self.encodings:
            glob, _, name = pair.rpartition("=")
            if fnmatch(source, glob) or fnmatch(source.rpartition("/")[2], glob):
                return name
        return None
