import os
import random
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pathspec.patterns.gitignore.base import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from agentctx.memory import gitignore
from agentctx.memory.errors import ConfigError
from agentctx.memory.selection import Selection
from agentctx.memory.walk import walk

NAMES = ["a", "b", "build", "foo", "bar.txt", "foo.log", "x y", "é.md", "q[1].c", "#h", "!k"]
PATTERNS = [
    *("a", "/a", "a/", "a/b", "*.log", "!foo.log", "**", "*", "*/", "!*/", "/*", "!/a", "build/", "!build/"),
    *(
        "foo/**",
        "**/foo",
        "a/**/b",
        "/build/*",
        "!build/foo",
        "b/*.txt",
        "# note",
        "",
        "x y",
        "x\\ y",
        "q[1].c",
    ),
    *(
        "q\\[1\\].c",
        "\\#h",
        "\\!k",
        "[!a]",
        "?",
        "fo?",
        "é.md",
        "**/",
        "a/*",
        "!a/b",
        "foo.*",
        "!bar.txt",
        "[z-a]",
        "*o*o*",
        "*b*a*r*.t*",
        "a/**/b/**/*o*",
        "**/f*o*/**/*.*",
    ),
]


def files(root: Path, selection: Selection | None = None) -> list[str]:
    return [str(path.relative_to(root)) for path in walk(root, selection or Selection()).files]


def write(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def random_tree(root: Path, dice: random.Random) -> None:
    for _ in range(dice.randint(3, 25)):
        folder = root.joinpath(*dice.choices(NAMES, k=dice.randint(0, 3)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / dice.choice(NAMES)).write_text("x")
        except OSError:
            continue  # a file stands where the folder should be
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and dice.random() < 0.4)]:
        (folder / ".gitignore").write_text("\n".join(dice.choices(PATTERNS, k=dice.randint(1, 6))))


@pytest.mark.parametrize("seed", range(4))
def test_leaves_out_what_git_leaves_out(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for number in range(25):
        root = tmp_path / f"{number}"
        root.mkdir()
        random_tree(root, dice)
        subprocess.run(["git", "init", "-q"], cwd=root, env=environment, check=True)
        listing = subprocess.run(
            ["git", "ls-files", "-o", "--exclude-standard", "-z"],
            cwd=root,
            env=environment,
            check=True,
            capture_output=True,
        )
        expected = {name for name in listing.stdout.decode().split("\0") if name}
        found = set(files(root, Selection(hidden=True)))
        rules = {str(path.relative_to(root)): path.read_text() for path in root.rglob(".gitignore")}
        assert found == expected, rules


GLOBS = st.lists(st.sampled_from(["*", "**", "/", "/**/", "a", "b", "?", "[ab]", "[!a]", "."]), max_size=9)
PATHS = st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=6)


@given(GLOBS, st.lists(PATHS, min_size=1, max_size=5))
def test_settled_stars_fit_what_free_ones_fit(glob: list[str], paths: list[list[str]]) -> None:
    try:
        regex = GitIgnoreSpecPattern("".join(glob)).regex
    except GitIgnorePatternError:
        regex = None
    assume(regex is not None)
    assert regex is not None
    settled = re.compile(gitignore._settled(regex.pattern))
    for path in map("/".join, paths):
        for probe in (path, path + "/"):
            assert gitignore._fits(settled, path, probe) == gitignore._fits(regex, path, probe), (glob, probe)


def test_many_stars_end_soon(tmp_path: Path) -> None:
    """Tried in every place these would outlast the test."""
    deep = "/".join(["a"] * 60)
    write(tmp_path, "a" * 200, f"{deep}/c.txt")
    write(tmp_path, ".gitignore", text="*a" * 30 + "*b\n" + "**/a/" * 20 + "b\n")
    assert len(files(tmp_path)) == 2


def test_rules_are_read_from_plain_files_of_a_sane_size(tmp_path: Path) -> None:
    for name in ("pipe", "device", "large", "plain"):
        write(tmp_path, f"{name}/a.log")
    os.mkfifo(tmp_path / "pipe" / ".gitignore")
    (tmp_path / "device" / ".gitignore").symlink_to("/dev/zero")
    write(tmp_path, "large/.gitignore", text="*.log\n" * 200_000)
    write(tmp_path, "plain/.gitignore", text="*.log\n")
    assert files(tmp_path) == ["device/a.log", "large/a.log", "pipe/a.log"]


def test_rules_of_the_repository_above_hold_too(tmp_path: Path) -> None:
    (tmp_path / ".git" / "info").mkdir(parents=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("*.bak\n")
    (tmp_path / ".gitignore").write_text("*.log\n/docs/draft/\n")
    write(tmp_path, "docs/a.txt", "docs/a.log", "docs/a.bak", "docs/draft/b.txt")
    assert files(tmp_path / "docs") == ["a.txt"]
    assert files(tmp_path / "docs", Selection(no_ignore=True)) == ["a.bak", "a.log", "a.txt", "draft/b.txt"]
    assert files(tmp_path / "docs" / "draft") == ["b.txt"]  # named itself


def test_hidden_files_and_secrets_stay_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.txt",
        ".hidden/b.txt",
        ".git/config",
        ".env.local",
        "id_rsa",
        "id_rsa.pub",
        "tls/site.pem",
    )
    assert files(tmp_path) == ["a.txt", "id_rsa.pub"]
    assert files(tmp_path, Selection(hidden=True)) == [".hidden/b.txt", "a.txt", "id_rsa.pub"]
    assert [path.name for path in walk(tmp_path, Selection()).secrets] == ["id_rsa", "site.pem"]


def test_a_link_does_not_show_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, ".git/config", ".aws/credentials", "tls/site.pem", "docs/a.txt")
    for link, target in {
        "config.txt": "../.git/config",
        "repository": "../.git",
        "more.txt": "../.aws/credentials",
        "site.txt": "../tls/site.pem",
    }.items():
        (tmp_path / "docs" / link).symlink_to(target)
    found = walk(tmp_path, Selection())
    assert [path.name for path in found.files] == ["a.txt"]
    assert (found.left_out, sorted(path.name for path in found.secrets)) == (4, ["site.pem", "site.txt"])
    assert files(tmp_path, Selection(hidden=True)) == [".aws/credentials", "docs/a.txt"]
    assert files(tmp_path / "docs") == ["a.txt"], "from below they lead out"


def test_include_and_exclude(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "a.txt", "docs/b.md", "docs/old/c.md", "src/d.py")
    assert files(tmp_path, Selection(include=("*.md",))) == ["a.md", "docs/b.md", "docs/old/c.md"]
    assert files(tmp_path, Selection(include=("docs/",), exclude=("old/",))) == ["docs/b.md"]
    assert files(tmp_path, Selection(exclude=("*.md", "src"))) == ["a.txt"]


def test_links_stay_inside_and_loops_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "a.txt", "sub/b.txt", ".data/c.txt", "build/d.txt", text="x")
    write(root, ".gitignore", text="build/\n")
    write(tmp_path, "outside.txt")
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to(root / "sub")
    (root / "self").symlink_to(root / "self")
    (root / "gone").symlink_to(root / "nothing")
    (root / "out").symlink_to(tmp_path / "outside.txt")
    (root / "again.txt").symlink_to(root / "a.txt")
    (root / "current").symlink_to(root / "build")
    (root / "unseen").symlink_to(root / ".data")
    found = walk(root, Selection())
    assert [str(path.relative_to(root)) for path in found.files] == ["a.txt", "current/d.txt", "sub/b.txt"]
    assert {error.source: error.code for error in found.problems} == {
        "root/self": "not_found",
        "root/gone": "not_found",
        "root/out": "outside",
    }


def test_a_folder_that_cannot_be_listed_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = walk(tmp_path, Selection())
    assert [path.name for path in found.files] == ["a.txt"]
    assert [(error.code, error.source) for error in found.problems] == [
        ("permission", f"{tmp_path.name}/closed")
    ]


def test_too_many_files_are_said_not_hidden(tmp_path: Path) -> None:
    write(tmp_path, *(f"d{i}/{j}.txt" for i in range(3) for j in range(5)))
    found = walk(tmp_path, Selection(max_files=7))
    assert len(found.files) == 7
    assert [error.code for error in found.problems] == ["too_large"]
    assert walk(tmp_path, Selection(max_files=15)).problems == []


def test_a_pathspec_without_the_directory_mark_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gitignore, "DIRECTORY_MARK", "renamed")
    with pytest.raises(ConfigError, match="pathspec"):
        walk(tmp_path, Selection())


def test_selection_refuses_what_cannot_work() -> None:
    for encodings in [("cp1252",), ("*.txt=nonsense",), ("*.txt=base64",)]:
        with pytest.raises(ConfigError):
            Selection(encodings=encodings)
    with pytest.raises(ConfigError, match="at least 1"):
        Selection(max_file_bytes=0)
    chosen = Selection(encodings=("old/*=cp1252", "*.txt=utf-16"))
    assert [chosen.encoding_of(name) for name in ("old/a.txt", "b/a.txt", "a.md")] == [
        "cp1252",
        "utf-16",
        None,
    ]
