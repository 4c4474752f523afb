"""What git would ignore.

pathspec turns one pattern into a regular expression; which pattern decides is git's rule, kept here. The
nearest .gitignore speaks first, inside it the last pattern that fits. A path is asked about level by level
from the top, so a pattern that fits only a parent of the path (its group `ps_d` ends early) says nothing
about the path itself: the parent was asked before. Agrees with `git ls-files -o --exclude-standard`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec.patterns.gitignore.base import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from agentctx.memory.errors import ConfigError

MAX_BYTES = 1_000_000  # of a .gitignore
STAR, DEEP = "[^/]*", "(?:/.+)?"  # what pathspec makes of a star, and of "/**" before a slash
DIRECTORY_MARK = "ps_d"  # pathspec's name for the slash behind what the pattern itself matched


@dataclass(frozen=True, slots=True)
class Rules:
    """The patterns of one .gitignore, for paths below `base`."""

    base: str  # absolute, with a slash at the end
    patterns: tuple[tuple[bool, re.Pattern[str]], ...]  # (ignore or keep, expression) as in the file

    @classmethod
    def of(cls, lines: Sequence[str], base: str) -> Rules:
        """Compile `lines`; like git, leave out what is no pattern."""
        patterns = []
        for line in lines:
            try:
                pattern = GitIgnoreSpecPattern(line)
            except (GitIgnorePatternError, re.error):
                continue
            if pattern.include is not None and pattern.regex is not None:
                patterns.append(
                    (pattern.include, re.compile(_settled(pattern.regex.pattern), pattern.regex.flags))
                )
        return cls(base, tuple(patterns))

    @classmethod
    def read(cls, file: Path, base: Path) -> Rules | None:
        """The rules in `file`, None if it is not there, cannot be read, or is no file of a sane size.

        Like git, a link is not followed: it may lead to a device.
        """
        try:
            found = file.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                return None
            raw = file.read_bytes()
        except OSError:
            return None
        lines = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")
        return cls.of([line.removesuffix("\r") for line in lines], slashed(base))

    def decide(self, path: str, is_dir: bool) -> bool | None:
        """True to ignore the absolute `path`, False to keep it, None if no pattern fits."""
        bare = path[len(self.base) :]
        probe = bare + "/" if is_dir else bare
        for ignore, regex in reversed(self.patterns):
            if _fits(regex, bare, probe):
                return ignore
        return None


def slashed(folder: Path) -> str:
    """The folder with one slash behind it, also when it is the root of the file system."""
    return str(folder).rstrip("/") + "/"


def ignored(path: str, is_dir: bool, chain: Sequence[Rules]) -> bool:
    """True if git ignores `path`, whose parents are not ignored. `chain` runs from the outermost rules in."""
    for rules in reversed(chain):
        if (decision := rules.decide(path, is_dir)) is not None:
            return decision
    return False


def outer_rules(root: Path) -> list[Rules]:
    """The rules that the repository around `root` has above it. Empty outside of a repository."""
    for top in (root, *root.parents):
        if (top / ".git").exists():
            break
    else:
        return []
    between = [parent for parent in reversed(root.parents) if parent.is_relative_to(top)]
    found = [Rules.read(top / ".git" / "info" / "exclude", top)]
    found += [Rules.read(folder / ".gitignore", folder) for folder in between]
    return [rules for rules in found if rules]


def check_pathspec() -> None:
    """Refuse a pathspec whose expressions lack the mark: matching would go wrong in silence."""
    regex = GitIgnoreSpecPattern("probe").regex
    if regex is None or DIRECTORY_MARK not in regex.groupindex:
        raise ConfigError(
            "the installed pathspec marks no directories", hint="pip install 'pathspec>=1.1,<2'"
        )


def _settled(regex: str) -> str:
    """The same expression, without going back to where an earlier star ended.

    The first place where what follows a star fits leaves the most to the next star, so no other place needs
    a try; with many stars, trying them all takes for ever. `(?>…)` is that: it is never entered again. For
    the last star of a name the place is not free, the name must end behind it; so it is for the last DEEP.
    """
    first, *runs = map(_stars_settled, regex.split(DEEP))
    middle = (f"(?>(?:/[^/]+)*?{run}(?=/))" for run in runs[:-1])
    return first + "".join(middle) + "".join(DEEP + run for run in runs[-1:])


def _stars_settled(run: str) -> str:
    """`_settled` for a run of names without DEEP."""
    first, *pieces = run.split(STAR)
    for place, piece in enumerate(pieces):
        another = place + 1 < len(pieces) and "/" not in piece.replace("[^/]", "")  # star in the same name
        first += f"(?>{STAR}?{piece})" if another else STAR + piece
    return first


def _fits(regex: re.Pattern[str], bare: str, probe: str) -> bool:
    if DIRECTORY_MARK not in regex.groupindex:
        return bool(regex.search(probe) and regex.search(bare))
    return any(
        match[DIRECTORY_MARK] is None or match.end(DIRECTORY_MARK) == len(probe)
        for match in regex.finditer(probe)
    )
