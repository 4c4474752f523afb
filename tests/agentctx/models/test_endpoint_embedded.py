"""The endpoint client against a real server with a real model: `transformers serve` on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage

from agentctx.models.load import Model, open_model
from agentctx.paths import Paths

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
        reason="`transformers serve` needs fastapi and uvicorn",
    ),
]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def served(embedded: Paths, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URL and the name of the embedded model behind a server of its own process."""
    folder = str(embedded.models / "smollm2" / "safetensors")
    port = _free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=log.parent
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    pytest.fail(f"the server did not start: {log.read_text()}")


def test_answers_like_the_local_model(served: tuple[str, str], embedded_model: Model, tmp_path: Path) -> None:
    url, name = served
    model = open_model(
        f"openai:{name}", base_url=url, paths=Paths(tmp_path, tmp_path, tmp_path, tmp_path), offline=True
    )
    assert [notice.code for notice in model.warnings] == ["window_unknown"]
    reply = model.chat.invoke(QUESTION, max_tokens=20)
    assert "Paris" in str(reply.content)
    assert reply.usage_metadata is not None
    messages = [HumanMessage(QUESTION)]
    assert reply.usage_metadata["input_tokens"] == embedded_model.counter.count_messages(messages)
    assert reply.usage_metadata["input_tokens"] <= model.counter.count_messages(messages) * 1.25
    parts = list(model.chat.stream(QUESTION, max_tokens=20))
    assert "".join(str(part.content) for part in parts) == reply.content
    told = [part for part in parts if getattr(part, "usage_metadata", None)]
    assert len(told) == 1
