"""The endpoint client against a real HTTP server on loopback that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError

from agentctx.memory.errors import ConfigError, ModelError
from agentctx.models.endpoint import EndpointChat, endpoint_chat, open_endpoint
from agentctx.models.load import open_model
from agentctx.paths import Paths

Fault = Callable[[BaseHTTPRequestHandler], None]
SECRET = "sk-never-to-be-shown"


class Server:
    """Answers every POST with `reply`, every GET with `models`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.reply: Fault = completion("Paris.")
        self.models: Fault = status(404, "no such path")
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.models(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append(json.loads(body))
                outer.keys.append(self.headers.get("authorization", ""))
                outer.reply(self)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def hang(self, handler: BaseHTTPRequestHandler) -> None:
        self.released.wait(30)
        handler.close_connection = True


def send(handler: BaseHTTPRequestHandler, code: int, body: bytes, **headers: str) -> None:
    handler.send_response(code)
    for name, value in {"content-type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, message: str, **headers: str) -> Fault:
    body = json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()
    return lambda handler: send(handler, code, body, **headers)


def raw(body: str, content_type: str = "application/json") -> Fault:
    return lambda handler: send(handler, 200, body.encode(), content_type=content_type)


def completion(text: str, usage: object = None) -> Fault:
    reply = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": usage or {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }
    return raw(json.dumps(reply))


def stream(*events: object, cut: bool = False) -> Fault:
    """Server-sent events; `cut` drops the connection in the middle of the body."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for event in events:
            data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def usage(prompt: int) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": 2, "total_tokens": prompt + 2}
    return {**delta(""), "choices": [], "usage": counts}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def chat(server: Server, monkeypatch: pytest.MonkeyPatch) -> EndpointChat:
    monkeypatch.setenv("AGENTCTX_API_KEY", SECRET)
    return endpoint_chat("m", base_url=server.url, timeout=5)


Way = Callable[[EndpointChat, str], str]


def invoke(chat: EndpointChat, text: str) -> str:
    return str(chat.invoke(text).content)


def ainvoke(chat: EndpointChat, text: str) -> str:
    return str(asyncio.run(chat.ainvoke(text)).content)


def streamed(chat: EndpointChat, text: str) -> str:
    return "".join(str(chunk.content) for chunk in chat.stream(text))


def astreamed(chat: EndpointChat, text: str) -> str:
    async def collect() -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(text)])

    return asyncio.run(collect())


ALL = pytest.mark.parametrize("way", [invoke, ainvoke, streamed, astreamed])
WHOLE = pytest.mark.parametrize("way", [invoke, ainvoke])
STREAMED = pytest.mark.parametrize("way", [streamed, astreamed])


def failure(chat: EndpointChat, way: Way, text: str = "Capital of France?") -> ModelError:
    with pytest.raises(ModelError) as caught:
        way(chat, text)
    return caught.value


@WHOLE
def test_answer(chat: EndpointChat, server: Server, way: Way) -> None:
    assert way(chat, "Capital of France?") == "Paris."
    assert server.asked[0]["temperature"] == 0
    assert server.keys == [f"Bearer {SECRET}"]


@STREAMED
def test_streamed_answer(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Pa"), delta("ris."), delta("", "stop"), usage(9), "[DONE]")
    assert way(chat, "Capital of France?") == "Paris."
    assert server.asked[0]["stream_options"] == {"include_usage": True}


def test_usage_and_name_are_told(chat: EndpointChat, server: Server) -> None:
    reply = chat.invoke("?")
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["input_tokens"] == 9
    assert reply.response_metadata["model_name"] == "m"


def test_the_limit_has_the_name_that_every_server_knows(chat: EndpointChat, server: Server) -> None:
    chat.invoke("?", max_tokens=7)
    assert server.asked[0]["max_tokens"] == 7
    assert "max_completion_tokens" not in server.asked[0]


@ALL
def test_429_carries_the_wait(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = status(429, "slow down", retry_after="7")
    error = failure(chat, way)
    assert (error.code, error.retry_after) == ("rate_limit", 7.0)
    assert len(server.asked) == 1  # no retry behind the caller's back


def test_429_with_a_date(chat: EndpointChat, server: Server) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    server.reply = status(429, "slow down", retry_after=soon)
    wait = failure(chat, invoke).retry_after
    assert wait is not None and 60 < wait <= 90


@pytest.mark.parametrize("header", ["", "soon", "-1", "1.2.3"])
def test_429_with_a_useless_header(chat: EndpointChat, server: Server, header: str) -> None:
    server.reply = status(429, "slow down", retry_after=header)
    assert failure(chat, invoke).retry_after is None


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (status(500, "boom"), "unavailable"),
        (status(503, "loading"), "unavailable"),
        (status(504, "gateway"), "timeout"),
        (status(401, "no"), "auth"),
        (status(403, "no"), "auth"),
        (status(404, "no model m"), "unavailable"),
        (status(400, "n must be 1"), "refused"),
        (status(413, "large"), "overflow"),
        (status(400, "This model's maximum context length is 4096 tokens"), "overflow"),
        (status(400, "the request exceeds the available context size (2048 tokens)"), "overflow"),
        (status(400, "context_length_exceeded: prompt is too long: 9 > 8"), "overflow"),
    ],
)
@ALL
def test_status(chat: EndpointChat, server: Server, way: Way, answer: Fault, code: str) -> None:
    server.reply = answer
    error = failure(chat, way)
    assert error.code == code
    assert "127.0.0.1" in error.message
    assert isinstance(error, ContextOverflowError) == (code == "overflow")


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "",
        "[]",
        "null",
        '"hello"',
        "{}",
        '{"choices": []}',
        '{"choices": null}',
        '{"choices": [{}]}',
        '{"choices": 3}',
    ]
    + ['{"choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}}], "usage": "many"}'],
)
@WHOLE
def test_malformed_reply(chat: EndpointChat, server: Server, way: Way, body: str) -> None:
    server.reply = raw(body)
    assert failure(chat, way).code == "malformed"


@WHOLE
def test_a_web_page_instead_of_json(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = raw("<html>Sign in</html>", "text/html")
    assert failure(chat, way).code == "malformed"


@STREAMED
def test_malformed_event(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Pa"), "{broken")
    assert failure(chat, way).code == "malformed"


@STREAMED
def test_cut_stream(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Pa"), delta("ris"), cut=True)
    assert failure(chat, way).code == "unavailable"


@STREAMED
def test_stream_that_ends_early_but_politely(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Pa"), delta("ris"))
    assert "before the reply was finished" in failure(chat, way).message


@STREAMED
def test_error_event_in_a_stream(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Pa"), {"error": {"message": "worker died"}})
    error = failure(chat, way)
    assert (error.code, "worker died" in error.message) == ("unavailable", True)


@ALL
def test_hang(server: Server, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = server.hang
    assert failure(endpoint_chat("m", base_url=server.url, timeout=0.3), way).code == "timeout"


@ALL
def test_server_that_is_down(way: Way) -> None:
    error = failure(endpoint_chat("m", base_url="http://127.0.0.1:9/v1", timeout=5), way)
    assert error.code == "unavailable"
    assert "running" in error.hint


LONG = "word " * 1000


@WHOLE
def test_silent_truncation(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = completion("Paris.", {"prompt_tokens": 512, "completion_tokens": 3, "total_tokens": 515})
    error = failure(chat, way, LONG)
    assert error.code == "truncated_by_endpoint"
    assert "OLLAMA_CONTEXT_LENGTH" in error.hint


@STREAMED
def test_silent_truncation_of_a_stream(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = stream(delta("Paris."), delta("", "stop"), usage(512), "[DONE]")
    assert failure(chat, way, LONG).code == "truncated_by_endpoint"


@pytest.mark.parametrize("reported", [0, 1000, 1300])
def test_honest_servers_are_not_accused(chat: EndpointChat, server: Server, reported: int) -> None:
    counts = {"prompt_tokens": reported, "completion_tokens": 3, "total_tokens": reported + 3}
    server.reply = completion("Paris.", counts)
    assert invoke(chat, LONG) == "Paris."


@ALL
def test_the_key_is_never_shown(chat: EndpointChat, server: Server, way: Way) -> None:
    server.reply = status(401, f"Incorrect API key provided: {SECRET}")
    error = failure(chat, way)
    assert SECRET not in f"{error.message} {error.hint} {chat!r} {chat}"
    assert SECRET not in "".join(traceback.format_exception(error))


def test_credentials_in_the_url_are_not_shown() -> None:
    chat = endpoint_chat("m", base_url="http://user:pass@127.0.0.1:9/v1")
    assert chat.place == "http://127.0.0.1:9/v1"


def test_no_key_and_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTCTX_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="gpt-x"):
        endpoint_chat("gpt-x")


def test_url_without_a_scheme() -> None:
    with pytest.raises(ConfigError, match="localhost:8000"):
        endpoint_chat("m", base_url="localhost:8000")


def listing(**facts: object) -> Fault:
    return raw(json.dumps({"object": "list", "data": [{"id": "m", "object": "model", **facts}]}))


@pytest.mark.parametrize(
    ("models", "window"),
    [
        (listing(max_model_len=4096), 4096),
        (listing(meta={"n_ctx": 2048, "n_ctx_train": 131072}), 2048),
        (listing(), 8192),
        (status(500, "no"), 8192),
        (raw("<html>", "text/html"), 8192),
    ],
)
def test_window_is_asked(server: Server, models: Fault, window: int) -> None:
    server.models = models
    model = open_endpoint("m", base_url=server.url, offline=False, window=None)
    assert model.profile.context == window
    assert [notice.code for notice in model.warnings] == (["window_unknown"] if window == 8192 else [])


def test_stated_window_is_taken_without_asking(server: Server, tmp_path: Any) -> None:
    paths = Paths(tmp_path, tmp_path, tmp_path, tmp_path)
    model = open_model("openai:m", base_url="http://127.0.0.1:9/v1", paths=paths, window=3000)
    assert (model.profile.context, model.profile.kind, model.counter.exact) == (3000, "endpoint", False)


def test_endpoint_that_is_down_is_noticed_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        open_endpoint("m", base_url="http://127.0.0.1:9/v1", offline=False, window=None)
    assert caught.value.code == "unavailable"


def test_offline_allows_this_machine_only(server: Server) -> None:
    assert open_endpoint("m", base_url=server.url, offline=True, window=4096).profile.context == 4096
    with pytest.raises(ConfigError):
        open_endpoint("m", base_url="https://models.example/v1", offline=True, window=4096)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_a_server_on_this_machine_is_reached_without_a_proxy(
    server: Server, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What is sent to a proxy leaves this machine, and --offline says that nothing does."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    server.models = listing(max_model_len=4096)
    model = open_endpoint("m", base_url=server.url, offline=True, window=None)
    assert model.profile.context == 4096
    assert asyncio.run(model.chat.ainvoke("hi")).text if way == "ainvoke" else model.chat.invoke("hi").text


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:abc/v1",
        "http://localhost:99999/v1",
        "http://[::1/v1",
        "http:///v1",
        "ftp://localhost/v1",
        "http://me:hunter2@localhost:abc/v1",
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_what_is_no_url_is_named_without_a_password(url: str, offline: bool) -> None:
    with pytest.raises(ConfigError, match="is not an endpoint") as caught:
        open_endpoint("m", base_url=url, offline=offline, window=4096)
    assert caught.value.hint
    assert "hunter2" not in str(caught.value)


def test_a_login_comes_from_the_setting_for_the_same_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTCTX_BASE_URL", "http://me:hunter2@localhost:8000/v1")
    same, other = (endpoint_chat("m", base_url=f"http://localhost:{port}/v1") for port in (8000, 8001))
    assert same.openai_api_base == "http://me:hunter2@localhost:8000/v1"
    assert other.openai_api_base == "http://localhost:8001/v1"
    monkeypatch.setenv("AGENTCTX_BASE_URL", "http://[::1")
    assert endpoint_chat("m", base_url="http://localhost:8000/v1").place == "http://localhost:8000/v1"
