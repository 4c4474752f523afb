"""Find the files of a directory that a person would want read, in sorted order.

Left out, unless named on their own: what .gitignore says, hidden names, `.git`, `.env*`, private keys. A link
is followed only to something inside the directory that is not hidden and was not met under its own name; so
loops end, nothing is read twice, and no link leads out or shows a hidden file.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from agentctx.memory.errors import InputError
from agentctx.memory.gitignore import Rules, check_pathspec, ignored, outer_rules, slashed
from agentctx.memory.selection import Selection

SECRET = re.compile(
    r"\.env.*|id_(rsa|dsa|ecdsa|ed25519)(?!.*\.pub).*|.*\.(pem|key|p12|pfx|ppk|jks|keystore|kdbx)", re.I
)


@dataclass(slots=True)
class Walk:
    """What was found below `root`."""

    root: Path  # resolved
    files: list[Path] = field(default_factory=list)  # absolute, sorted by their parts
    problems: list[InputError] = field(default_factory=list)
    left_out: int = 0  # entries that the rules leave out, a directory counts as one
    secrets: list[Path] = field(default_factory=list)  # left out because of their names


def walk(root: Path, selection: Selection) -> Walk:
    """List the files below `root`. Unreadable folders, outward and broken links are `problems`."""
    check_pathspec()
    found = _Walker(root.resolve(), selection)
    found.run()
    return found.result


class _Walker:
    def __init__(self, root: Path, selection: Selection) -> None:
        self.result = Walk(root)
        self.selection = selection
        self.max_files = selection.max_files
        self.include = Rules.of(selection.include, slashed(root))
        self.exclude = Rules.of(selection.exclude, slashed(root))
        self.seen: set[str] = set()  # real paths of folders and files that were met
        self.links: list[str] = []

    def run(self) -> None:
        result = self.result
        outer = [] if self.selection.no_ignore else outer_rules(result.root)
        self._folder(str(result.root), outer)
        for link in self.links:  # grows while folders behind links are walked
            self._link(link, outer)
        result.files.sort(key=lambda path: path.parts)
        if len(result.files) > self.max_files:
            del result.files[self.max_files :]
            result.problems.append(
                InputError(
                    f"more than {self.max_files:,} files, read {self.max_files:,} of them",
                    code="too_large",
                    source=self._name(str(result.root)),
                    hint="name fewer folders, use --include and --exclude, or raise --max-files",
                )
            )

    def _folder(self, folder: str, chain: list[Rules]) -> None:
        """Walk depth first in sorted order, and stop soon after the limit."""
        stack = [(folder, chain)]
        while stack and len(self.result.files) <= self.max_files:
            folder, chain = stack.pop()
            self.seen.add(os.path.realpath(folder))
            try:
                with os.scandir(folder) as listing:
                    entries = sorted(listing, key=lambda entry: entry.name)
            except OSError as error:
                self._problem(folder, error)
                continue
            if not self.selection.no_ignore and (
                rules := Rules.read(Path(folder, ".gitignore"), Path(folder))
            ):
                chain = [*chain, rules]
            folders = []
            for entry in entries:
                is_dir = entry.is_dir(follow_symlinks=False)
                if not self._wanted(entry.name, entry.path, is_dir, chain):
                    continue
                if entry.is_symlink():
                    self.links.append(entry.path)
                elif is_dir:
                    folders.append((entry.path, chain))
                else:
                    self._file(entry.path)
            stack.extend(reversed(folders))

    def _wanted(self, name: str, path: str, is_dir: bool, chain: list[Rules]) -> bool:
        if name == ".git" or (is_dir and self.exclude.decide(path, True)):
            return False
        if (name.startswith(".") and not self.selection.hidden) or ignored(path, is_dir, chain):
            self.result.left_out += 1
            return False
        if not is_dir and SECRET.fullmatch(name):
            self.result.secrets.append(Path(path))
            return False
        return True

    def _file(self, path: str) -> None:
        if self._selected(path):
            self.seen.add(path)
            self.result.files.append(Path(path))

    def _selected(self, path: str) -> bool:
        """Apply include and exclude: a pattern that fits any folder above the file fits the file."""
        below = path[len(self.include.base) :].split("/")
        levels = [self.include.base + "/".join(below[:depth]) for depth in range(1, len(below) + 1)]
        asked = [(level, level != path) for level in levels]
        if any(self.exclude.decide(level, is_dir) for level, is_dir in asked):
            return False
        return not self.include.patterns or any(self.include.decide(level, is_dir) for level, is_dir in asked)

    def _link(self, link: str, outer: list[Rules]) -> None:
        try:
            target = os.path.realpath(link, strict=True)
        except OSError as error:
            self._problem(link, error)
            return
        if not Path(target).is_relative_to(self.result.root):
            message = f"{self._name(link)} is a link that leaves the directory"
            hint = "name its target on the command line to read it"
            self.result.problems.append(
                InputError(message, code="outside", source=self._name(link), hint=hint)
            )
            return
        names = Path(target).relative_to(self.result.root).parts
        if ".git" in names or (not self.selection.hidden and any(name.startswith(".") for name in names)):
            self.result.left_out += 1
        elif SECRET.fullmatch(os.path.basename(target)):
            self.result.secrets.append(Path(link))
        elif target in self.seen:
            return
        elif os.path.isdir(target):
            self._folder(link, outer)
        elif self._selected(link):
            self.seen.add(target)
            self.result.files.append(Path(link))

    def _problem(self, path: str, error: OSError) -> None:
        code = "permission" if isinstance(error, PermissionError) else "not_found"
        message = f"{self._name(path)}: {error.strerror or error}"
        self.result.problems.append(InputError(message, code=code, source=self._name(path)))

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.result.root.parent)
