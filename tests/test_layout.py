"""Guards of the repository's shape: what ships, what shadows nothing, what stays small and honest."""

import ast
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import agentctx

ROOT = Path(__file__).parent.parent
PARTS = ("kernels", "memory", "workflows")
FOLDERS = ("agentctx", *PARTS)
REFUSED_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "core", "misc"}
MAX_FILE_LINES = 350  # review aims at 300
MAX_KERNEL_LINES = 450  # a kernel and its host function stay together
MAX_FUNCTION_LINES = 60  # review aims at 40


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, ast.parse(file.read_text())


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["setuptools"]


def test_every_folder_with_code_ships() -> None:
    shipped = {name.removeprefix("agentctx.") for name in project()["packages"]}
    for file, _ in sources():
        name = ".".join(file.parent.relative_to(ROOT).parts).removeprefix("agentctx.")
        assert name in shipped, f"{file} is in no package of pyproject.toml"


def test_the_links_lead_to_the_part_folders() -> None:
    for name in PARTS:
        link = ROOT / "agentctx" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


def test_part_folders_are_not_packages() -> None:
    """`kernels` is Hugging Face's name and `workflows` LlamaIndex's.

    A folder without `__init__.py` never wins over an installed package, even when the repository's root is
    on the path. With one, `from transformers import LlamaForCausalLM` fails where `kernels` is installed.
    """
    for name in PARTS:
        assert not list((ROOT / name).rglob("__init__.py"))
        spec = find_spec(name)
        assert spec is None or spec.origin is None or "site-packages" in spec.origin, spec


def test_exported_names() -> None:
    assert sorted(agentctx.__all__) == ["Answer", "Budget", "Context", "Document", "Engine", "build"]
    assert sorted(agentctx._HOME) == sorted(agentctx.__all__)


def test_files_and_functions_stay_small() -> None:
    for file, tree in sources():
        lines = len(file.read_text().splitlines())
        limit = MAX_KERNEL_LINES if file.parent.name == "gpu" else MAX_FILE_LINES
        assert lines <= limit, f"{file.relative_to(ROOT)} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                    continue  # a GPU kernel is one piece
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, (
                    f"{file.relative_to(ROOT)}: {node.name} has {length} lines"
                )


def test_names_say_what_a_file_holds() -> None:
    for file, tree in sources():
        assert file.stem not in REFUSED_NAMES, file
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert not node.name.lower().endswith(("utils", "helper", "manager")), f"{file}: {node.name}"


def test_no_failure_is_swallowed() -> None:
    """Broad handlers hide bugs: only one that raises again, or says why not, may catch everything."""
    for file, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            why = "noqa: BLE001 - " in file.read_text().splitlines()[node.lineno - 1]
            assert caught != "Exception" and (
                again or why or caught not in ("everything", "BaseException")
            ), f"{file.relative_to(ROOT)}:{node.lineno} catches {caught}"
