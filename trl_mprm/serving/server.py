"""
Serve our scorer over HTTP. Unlike vLLM it scores all candidates of a question in one pass over its picture and text.

    POST /pooling      a solution in vLLM's form (see `messages`) -> [P(bad), P(good)] of each step
    POST /best_of_n    a question and its candidates -> a ranking
    GET  /v1/models, /health, /metrics (Prometheus), /docs (OpenAPI)

Pictures come as data URLs, or as names inside the image root; network addresses are fetched only from hosts that are
allowed by name. Everything that a client sends is limited: bytes, time, pictures, pixels, tokens and waiting requests.
"""

import hmac
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from ..scoring import ProcessRewardModel
from .limits import BoundedConnections, BoundedRequests
from .messages import TASK
from .pictures import Limits, Pictures
from .queue import Busy
from .service import Service


class Part(BaseModel):
    """A part of a message, in the form of OpenAI's API."""

    type: str
    text: str | None = None
    image_url: dict[str, Any] | None = None


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class PoolingRequest(BaseModel):
    """One solution: the question in the user turn, the steps with a marker after each in the assistant turn."""

    model: str | None = None
    task: Literal["token_classify"] = TASK
    messages: list[Message]


class BestOfNRequest(BaseModel):
    """A question and candidate solutions, each a list of steps or a text to split."""

    question: str
    images: list[str] = []
    candidates: Annotated[list[str | list[str]], Field(min_length=1)]
    aggregate: Literal["mean", "min", "product", "last"] = "mean"
    split: str = "blank_line"


def create_app(
    prm: ProcessRewardModel,
    name: str = "prm",
    *,
    api_key: str | None = None,
    pictures: Pictures | None = None,
    limits: Limits | None = None,
    ui: bool = False,
) -> FastAPI:
    """
    Make the application, to be served by uvicorn or mounted elsewhere.

    Args:
        prm ([`ProcessRewardModel`]):
            The model.
        name (`str`, *optional*, defaults to `"prm"`):
            Name under which the model is offered.
        api_key (`str`, *optional*):
            Key that every request must carry, `Authorization: Bearer KEY`; `/health` needs none.
        pictures ([`Pictures`], *optional*):
            Opens pictures. By default only data URLs are accepted.
        limits ([`Limits`], *optional*):
            Limits on requests. Defaults to those of [`Limits`].
        ui (`bool`, *optional*, defaults to `False`):
            Serve a page at `/` for trying the model.
    """
    limits = limits or Limits()
    service = Service(prm, name, pictures or Pictures(limits), limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.queue:
            yield

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(given, api_key.encode()):
            raise _Unauthorised

    app = FastAPI(title="trl-mprm", description="Step scores of a process reward model", lifespan=lifespan)
    bounds = {"max_bytes": limits.body_bytes, "max_seconds": limits.body_seconds}
    app.add_middleware(BoundedRequests, **bounds, metrics=service.metrics)
    key = [Depends(authorised)]

    @app.post("/pooling", dependencies=key)
    async def pooling(body: PoolingRequest) -> dict[str, Any]:
        """Score one solution, in the form of vLLM's `/pooling`."""
        if body.model not in (None, name):
            return JSONResponse(_error(f"there is no model {body.model!r} here, only {name!r}", "NotFoundError"), 404)
        return await service.pooling([turn.model_dump(exclude_none=True) for turn in body.messages])

    @app.post("/best_of_n", dependencies=key)
    async def best_of_n(body: BestOfNRequest) -> dict[str, Any]:
        """Rank the candidates of one question, best first; its pictures and text are run only once."""
        return await service.best_of_n(**body.model_dump())

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        """List the one model that is served, with the marker and the joiner that a client needs."""
        return service.models()

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer if the server is up."""
        return {"status": "ok"}

    @app.get("/metrics", dependencies=key)
    async def prometheus() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if ui:
        page = resources.files("trl_mprm").joinpath("templates", "serve.html").read_text(encoding="utf-8")
        app.add_api_route("/", lambda: HTMLResponse(page), include_in_schema=False)
    _answer_errors(app)
    return app


def run(app: FastAPI, host: str, port: int) -> None:
    """
    Serve until the process is told to stop; pending requests are answered first.

    Raises `OSError` if the address is in use.
    """
    try:
        listening = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise OSError(f"{host}:{port} is in use: name another --port") from error
    config = uvicorn.Config(
        app,
        http=BoundedConnections,
        log_level="warning",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=30,
        h11_max_incomplete_event_size=2**16,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


class _Unauthorised(Exception):
    pass


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _answer_errors(app: FastAPI) -> None:
    """Answer every error with one sentence in the form of OpenAI's API that reveals nothing about this machine."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "the body"
        return JSONResponse(_error(f"{where}: {first['msg'][:200]}", "BadRequestError"), 400)

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(_error(" ".join(str(error).split())[:500], "BadRequestError"), 400)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return JSONResponse(_error(str(error), "ServiceUnavailableError"), 503, {"Retry-After": "1"})

    @app.exception_handler(_Unauthorised)
    async def unauthorised(request: Request, error: _Unauthorised) -> JSONResponse:
        message = "expected the key of this server: send the header Authorization: Bearer KEY"
        return JSONResponse(_error(message, "AuthenticationError"), 401, {"WWW-Authenticate": "Bearer"})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(
            _error("the server failed on this request; its log has the reason", "InternalServerError"), 500
        )
