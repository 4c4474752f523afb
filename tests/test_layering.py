"""Floors: kernels < memory < workflows < agentctx, and inside agentctx: models < api < cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a floor may import: of agentctx, and of the heavy packages that mark a floor.
FLOORS = {"kernels": 0, "memory": 1, "workflows": 2}
FORBIDDEN = {
    "kernels": {"langchain_core", "langchain_openai", "langgraph", "transformers", "openai", "pydantic"},
    "memory": {"langchain_core", "langchain_openai", "langgraph", "transformers", "openai"},
    "workflows": {"langchain_openai", "transformers", "openai"},
}
# Inside agentctx a module imports its own rank or a lower one. A new module needs a rank here.
RANKS = {
    "__init__": 0,
    "paths": 0,
    "asked": 0,
    "blocking": 0,
    "checkpoints": 0,
    "privacy": 0,
    "secret": 0,
    "sources": 0,
    "runtime": 0,
    "models": 1,
    "testing": 1,
    "testing_endpoint": 1,
    "runs": 1,
    "session": 1,
    "bench": 2,
    "api": 2,
    "settings": 2,
    "result": 2,
    "doctor": 2,
    "cli": 3,
    "__main__": 4,
}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively: write agentctx.…"
            if node.module == "agentctx":
                yield from ((node.lineno, f"agentctx.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))  # rglob does not follow the links


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_downwards(floor: str) -> None:
    for file in files(floor):
        for line, name in imports(file):
            parts = name.split(".")
            where = f"{file.relative_to(ROOT)}:{line} imports {name}"
            assert parts[0] not in FORBIDDEN[floor], where
            if parts[0] == "agentctx":
                assert len(parts) > 1 and parts[1] in FLOORS, where
                assert FLOORS[parts[1]] <= FLOORS[floor], where


def test_the_top_floor_imports_in_order() -> None:
    for file in files("agentctx"):
        if file.name == "__init__.py" and file.parent == ROOT / "agentctx":
            continue  # it names the public surface, and imports it only when asked
        own = file.relative_to(ROOT / "agentctx").with_suffix("").parts[0]
        assert own in RANKS, f"agentctx/{own} needs a rank here"
        for line, name in imports(file):
            parts = name.split(".")
            if parts[0] != "agentctx" or (len(parts) > 1 and parts[1] in FLOORS):
                continue
            other = parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__"
            assert RANKS[other] <= RANKS[own], f"agentctx/{own}:{line} imports {name}"
