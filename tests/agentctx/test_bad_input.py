"""Everything a user may hand over that cannot work, through the real API: a typed error and its exit code."""

import json
import os
import socket
from pathlib import Path

import pytest

from agentctx.cli.main import run
from agentctx.paths import Paths

GOOD = "The harbour closes at nine in the evening.\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AGENTCTX_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTCTX_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def pdf(path, *, encrypted=False):
    from pypdf import PdfWriter

    writer = PdfWriter()
    writer.add_blank_page(200, 200)
    if encrypted:
        writer.encrypt("secret", algorithm="RC4-128")
    writer.write(path)


def truncated_pdf(path):
    pdf(path)
    path.write_bytes(path.read_bytes()[:200])


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2_000_000_000)


def unreadable(path):
    path.write_text(GOOD)
    path.chmod(0)


def loop(path):
    path.symlink_to(path)


BAD = {
    "missing path": ("absent.txt", lambda path: None, "not_found"),
    "empty directory": ("folder", Path.mkdir, "empty"),
    "empty file": ("empty.txt", Path.touch, "empty"),
    "binary file": ("data.bin", lambda path: path.write_bytes(b"\0\1\2" * 99), "binary"),
    "encrypted PDF": ("locked.pdf", lambda path: pdf(path, encrypted=True), "encrypted"),
    "truncated PDF": ("torn.pdf", truncated_pdf, "corrupt"),
    "2 GB sparse file": ("huge.txt", sparse, "too_large"),
    "symlink loop": ("loop.txt", loop, "not_found"),
    "unreadable file": ("private.txt", unreadable, "permission"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_source_that_cannot_be_read(folder, capfd, what):
    name, make, code = BAD[what]
    make(folder / name)
    if code == "permission" and os.access(folder / name, os.R_OK):
        pytest.skip("this user may read everything")
    assert run(["ask", "When does it close?", name, "--json"]) == 3
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["code"] == code and name in error["message"]


@pytest.mark.parametrize(
    ("args", "exit_code", "code"),
    [
        (["--model", "no-such-model"], 2, "config"),
        (["--model", "openai:any"], 2, "config"),
        (["--model", "smollm2", "--base-url", "http://127.0.0.1:9/v1"], 2, "config"),
        (["--model", "smollm2", "--offline"], 6, "not_fetched"),
    ],
)
def test_a_model_that_cannot_be_had(folder, capfd, args, exit_code, code):
    Path("good.txt").write_text(GOOD)
    assert run(["ask", "When does it close?", "good.txt", "--json", *args]) == exit_code
    assert json.loads(capfd.readouterr().out)["error"]["code"] == code


def test_an_endpoint_that_is_down(folder, capfd):
    Path("good.txt").write_text(GOOD)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    endpoint = ["--model", "openai:any", "--base-url", url, "--max-seconds", "20"]
    assert run(["ask", "When does it close?", "good.txt", "--json", *endpoint]) == 6
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["code"] == "unavailable" and error["hint"]


@pytest.mark.model
def test_what_the_model_cannot_take(folder, capfd, embedded, tmp_path):
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "models").symlink_to(embedded.models)
    assert Paths.default().models.samefile(embedded.models)
    Path("good.txt").write_text(GOOD * 400)
    too_long = "When does it close? " * 2_000
    assert run(["ask", too_long, "good.txt", "--json", "--offline"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["code"] == "config"
    assert run(["ask", "When?", "good.txt", "--json", "--offline", "--max-output-tokens", "1"]) == 5
    assert json.loads(capfd.readouterr().out)["error"]["code"] == "budget"
