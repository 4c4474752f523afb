"""The connections to an endpoint, each call on the next of several pools.

httpx's pool looks at every connection it holds when a request comes and when one goes, and asks the system of
each idle one whether it is still open: with 64 calls in flight, most of the time that a short call took.
"""

from __future__ import annotations

import functools
import itertools
import socket
from typing import Any
from urllib.request import getproxies

import openai

from agentctx.models.endpoint_errors import TRANSPORT

NO_PROXY = {"http://": None, "https://": None}  # the client's own transport, whatever the environment says
KEEPALIVE = 5.0  # seconds that an idle connection is kept, as openai's own client keeps them


class Lanes(TRANSPORT.AsyncBaseTransport):  # type: ignore[misc]  # of httpx or httpx2, as openai's client is
    """As many pools as there are calls in flight, taken in turn, so that each holds a connection or two."""

    def __init__(self, lanes: int) -> None:
        limits = TRANSPORT.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE
        )
        context = TRANSPORT.create_ssl_context()  # one for all: it reads the certificates
        alive = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        self._lanes = [
            TRANSPORT.AsyncHTTPTransport(verify=context, limits=limits, socket_options=alive)
            for _ in range(lanes)
        ]
        self._turns = itertools.cycle(self._lanes)

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request on the next lane."""
        return await next(self._turns).handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections."""
        for lane in self._lanes:
            await lane.aclose()


def lanes_client(base_url: str | None, lanes: int, timeout: float, *, direct: bool) -> Any | None:
    """An HTTP client for openai's; None where a proxy is set, which only a client of its own making finds.

    `direct`: the endpoint is on this machine, and a proxy is not for it.
    """
    return _client(base_url, lanes, timeout, direct) if direct or not getproxies() else None


@functools.cache  # for the whole process and each endpoint: connections outlive the context that opened them
def _client(base_url: str | None, lanes: int, timeout: float, direct: bool) -> Any:
    return openai.DefaultAsyncHttpxClient(
        timeout=timeout, transport=Lanes(lanes), mounts=NO_PROXY if direct else None
    )


@functools.cache
def direct_client(base_url: str) -> openai.DefaultHttpxClient:
    """For calls that wait, to an endpoint on this machine: without the proxy that the environment names."""
    return openai.DefaultHttpxClient(mounts=NO_PROXY)
