"""A scripted OpenAI-compatible server on loopback: the public test double for whole processes.

with ScriptedEndpoint(finding(r"The code of (\\w+ is \\w+)")) as endpoint:
    Context.open("notes", model="openai:scripted", base_url=endpoint.url)
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage

from agentctx.testing import Reply, WordCounter


class ScriptedEndpoint:
    """Answers chat completions, streamed or not, by a reply function. `finished` are the prompts it answered.

    `delay` is seconds per call; an exception that the function returns becomes a status 500. A prompt that
    takes, with its answer, more tokens than `window` is refused as servers do it; `refused` counts these.
    """

    def __init__(self, reply: Reply, *, delay: float = 0.0, window: int | None = None) -> None:
        self.window = window
        self.refused = 0
        self.finished: list[str] = []
        self.started = 0
        self.ended = 0  # answered, or given up because the client was gone
        counting = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with counting:
                    endpoint.started += 1
                try:
                    time.sleep(delay)
                    endpoint._answer(self, body, reply)
                finally:
                    with counting:
                        endpoint.ended += 1

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], reply: Reply) -> None:
        messages = [_message(item) for item in body["messages"]]
        counter = WordCounter()
        read = counter.count_messages(messages)
        if self.window is not None and read + body.get("max_tokens", 0) > self.window:
            self.refused += 1
            told = f"This model's maximum context length is {self.window} tokens, you sent {read}"
            error = {"message": told, "code": "context_length_exceeded"}
            return _send(handler, 400, "application/json", {"error": error})
        said = reply(messages)
        if isinstance(said, Exception):
            return _send(handler, 500, "application/json", {"error": {"message": str(said)}})
        text = said if isinstance(said, str) else json.dumps(said)
        written = counter.count_text(text)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        common = {"id": "scripted", "created": 1, "model": body["model"]}
        if body.get("stream"):
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            events: list[dict[str, Any]] = [{"choices": [choice]}, {"choices": [], "usage": usage}]
            lines = [json.dumps({**common, "object": "chat.completion.chunk", **event}) for event in events]
            stream = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
            _send(handler, 200, "text/event-stream", stream)
        else:
            message = {"role": "assistant", "content": text}
            whole = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {**common, "object": "chat.completion", "choices": [whole], "usage": usage}
            _send(handler, 200, "application/json", answer)
        self.finished.append(str(messages[-1].text))
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # many connections may come at once

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is what these servers are for; nothing to print."""


def _message(item: dict[str, Any]) -> BaseMessage:
    kind = SystemMessage if item["role"] in ("system", "developer") else HumanMessage
    return kind(item["content"])


def _send(handler: BaseHTTPRequestHandler, status: int, media_type: str, body: str | dict[str, Any]) -> None:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    handler.send_response(status)
    handler.send_header("content-type", media_type)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)
    handler.wfile.flush()
