"""Limit the bytes, time and connections that a client may use."""

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedRequests:
    """
    ASGI middleware that refuses a body that is too large before reading all of it, and one that comes too slowly.

    Args:
        app (ASGI application):
            The application to protect.
        max_bytes (`int`):
            Size limit of a body; beyond it the answer is 413.
        max_seconds (`float`):
            Time limit for receiving a body; beyond it the answer is 408.
        metrics (`Metrics`):
            Counts requests by route and status, and measures their seconds.
    """

    def __init__(self, app: Any, max_bytes: int, max_seconds: float, metrics: Any):
        self.app, self.max_bytes, self.max_seconds, self.metrics = app, max_bytes, max_seconds, metrics

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def sent(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body, refusal = await self._body(scope, receive)
            if refusal is None:
                await self.app(scope, _replayed(body, receive), sent)
            else:
                await _answer(sent, *refusal)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # an unknown path is arbitrary text from a client
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)

    async def _body(self, scope: dict, receive: Any) -> tuple[bytes, tuple[int, str] | None]:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = (413, f"the request is larger than {self.max_bytes:,} bytes: send smaller pictures")
        if announced.isdigit() and int(announced) > self.max_bytes:
            return b"", too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.max_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", (499, "the client is gone")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_bytes:
                        return b"", too_large
                    if not message.get("more_body"):
                        return b"".join(parts), None
        except TimeoutError:
            return b"", (408, f"the request did not arrive within {self.max_seconds:g} seconds")


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` callable for a body that was already read: it returns the body once, then passes on later messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict:
        return waiting.pop() if waiting else await receive()

    return again


async def _answer(send: Any, status: int, message: str) -> None:
    body = f'{{"error": {{"message": "{message}", "type": "BadRequestError"}}}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class BoundedConnections(H11Protocol):
    """
    uvicorn's HTTP/1.1 protocol (`uvicorn/protocols/http/h11_impl.py`), with two more limits: connections beyond
    `most` are closed at once, and one that has not sent the head of a request within `seconds` is closed.

    uvicorn limits neither: its `limit_concurrency` counts whole requests, and its keep-alive timer starts only after the
    first answer. Ten thousand idle connections would take ten thousand file handles.
    """

    most = 512
    seconds = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(self.seconds, self._close_unless_asked)
        if len(self.connections) > self.most:
            transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.head_timer.cancel()
        super().connection_lost(error)

    def _close_unless_asked(self) -> None:
        if self.cycle is None:  # no complete request head has arrived
            self.transport.abort()
