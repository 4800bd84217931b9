"""
Our scorer over HTTP, for what vLLM does not do: all candidates of a question in one pass over its picture and text.

    POST /pooling      one solution, in vLLM's form (see `messages`): [P(bad), P(good)] of each step
    POST /best_of_n    a question and its candidates: a ranking
    GET  /v1/models, /health, /metrics (Prometheus), /docs (OpenAPI)

Pictures come as data URLs, or as names inside the image root; an address on the network is fetched only from hosts that
were allowed by name. Everything that a client sends is bounded: bytes, time, pictures, pixels, tokens, waiting requests.
"""

import asyncio
import base64
import hmac
import io
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import requests
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field

from ..data.aggregates import AGGREGATES
from ..data.images import ImageFinder, check_image
from ..data.rows import Refused
from ..data.splitting import split_steps
from ..prompting.tokens import tokenizer_of
from ..scoring import ProcessRewardModel
from .limits import BoundedConnections, BoundedRequests
from .messages import TASK, solution_of
from .queue import Busy, ScoringQueue


@dataclass(frozen=True)
class Limits:
    """
    What a client may send.

    Attributes:
        body_bytes (`int`): Of one request.
        body_seconds (`float`): Until a request is here whole.
        images (`int`): Of one question.
        image_pixels (`int`): Of one picture.
        tokens (`int`): Of question and steps of one solution, those of pictures not counted.
        candidates (`int`): Of one question.
        waiting (`int`): Solutions that wait for the model.
    """

    body_bytes: int = 2**25
    body_seconds: float = 30.0
    images: int = 8
    image_pixels: int = 2**24
    tokens: int = 16384
    candidates: int = 256
    waiting: int = 1024


@dataclass
class Pictures:
    """Where pictures may come from: data URLs always, files of `root`, hosts named in `hosts`."""

    limits: Limits
    root: str | None = None
    hosts: tuple[str, ...] = ()
    finder: ImageFinder = field(init=False)

    def __post_init__(self):
        self.finder = ImageFinder(self.root)

    def open(self, name: str) -> dict[str, Any]:
        """A picture as rows hold it. Raises `ValueError` in one sentence that tells nothing of this machine."""
        if name.startswith("data:"):
            data = self._inline(name)
        elif urlsplit(name).scheme in ("http", "https"):
            data = self._fetched(name)
        elif self.root is None:
            raise ValueError(
                "expected an image as a data URL (data:image/png;base64,...): this server has no image root"
            )
        else:
            try:
                found = self.finder.find(name)
            except Refused as refused:
                raise ValueError(
                    f"an image cannot be used ({refused.reason}): name a whole picture in the image root"
                ) from None
            with open(found, "rb") as file:
                data = file.read()
        self._check(data)
        return {"bytes": data, "path": None}

    def _inline(self, url: str) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise ValueError(f"a data URL begins {url[:40]!r}, expected data:image/png;base64,...")
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError("the data of an image is no base64") from None

    def _fetched(self, url: str) -> bytes:
        host = urlsplit(url).hostname
        if host not in self.hosts:
            raise ValueError(
                f"images are not fetched from {host}: send a data URL, or start with --allow-image-host {host}"
            )
        try:
            with requests.get(url, stream=True, timeout=10, allow_redirects=False) as answer:
                data = answer.raw.read(self.limits.body_bytes + 1, decode_content=True)
                if answer.status_code != 200 or len(data) > self.limits.body_bytes:
                    raise ValueError(
                        f"{host} answered {answer.status_code} with {len(data)} bytes, expected a picture"
                    )
                return data
        except requests.RequestException as error:
            raise ValueError(f"{host} cannot be reached ({type(error).__name__})") from None

    def _check(self, data: bytes) -> None:
        try:
            check_image(io.BytesIO(data))
        except Refused as refused:
            raise ValueError(f"an image is {refused}") from None
        width, height = Image.open(io.BytesIO(data)).size
        if width * height > self.limits.image_pixels:
            raise ValueError(f"an image has {width} x {height} pixels, at most {self.limits.image_pixels:,} are read")


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


class Metrics:
    """Counters of a server, for Prometheus."""

    def __init__(self, queue: ScoringQueue):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trl_mprm_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram("trl_mprm_request_seconds", "Seconds of a request", ["route"], registry=self.registry)
        self.steps = Counter("trl_mprm_steps", "Steps scored", registry=self.registry)
        self.solutions = Counter("trl_mprm_solutions", "Solutions scored", registry=self.registry)
        Gauge("trl_mprm_waiting", "Solutions that wait", registry=self.registry).set_function(lambda: queue.waiting)


def create_app(
    prm: ProcessRewardModel,
    name: str = "prm",
    *,
    api_key: str | None = None,
    pictures: Pictures | None = None,
    limits: Limits = Limits(),
    ui: bool = False,
) -> FastAPI:
    """
    The application, to be served by uvicorn or mounted elsewhere.

    Args:
        prm ([`ProcessRewardModel`]):
            The model.
        name (`str`, *optional*, defaults to `"prm"`):
            Name under which it is offered.
        api_key (`str`, *optional*):
            Key that every request must carry, `Authorization: Bearer KEY`; `/health` needs none.
        pictures ([`Pictures`], *optional*):
            Where pictures may come from. Defaults to data URLs alone.
        limits ([`Limits`], *optional*):
            What a client may send.
        ui (`bool`, *optional*, defaults to `False`):
            Serve a page to try the model at `/`.
    """
    pictures = pictures or Pictures(limits)
    queue = ScoringQueue(prm.score_batch, limits.waiting)
    metrics = Metrics(queue)
    tokenizer = tokenizer_of(prm.processing_class)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with queue:
            yield

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if api_key is not None and not hmac.compare_digest(given, api_key.encode()):
            raise _Unauthorised

    app = FastAPI(title="trl-mprm", description="Step scores of a process reward model", lifespan=lifespan)
    app.add_middleware(BoundedRequests, max_bytes=limits.body_bytes, max_seconds=limits.body_seconds, metrics=metrics)
    key = [Depends(authorised)]

    async def scored(rows: list[dict[str, Any]]) -> tuple[list[list[float]], int]:
        counts = [_text_tokens(tokenizer, row) for row in rows]
        if max(counts) > limits.tokens:
            raise ValueError(
                f"a solution has {max(counts)} tokens of text, at most {limits.tokens} are read: shorten it"
            )
        scores = await queue.score(rows)
        metrics.solutions.inc(len(scores))
        metrics.steps.inc(sum(map(len, scores)))
        return scores, sum(counts)

    async def opened(names: list[str]) -> list[dict[str, Any]]:
        if len(names) > limits.images:
            raise ValueError(f"{len(names)} images came, at most {limits.images} are read")
        return [await asyncio.to_thread(pictures.open, image) for image in names]

    @app.post("/pooling", dependencies=key)
    async def pooling(body: PoolingRequest) -> dict[str, Any]:
        """Scores of one solution, in the form of vLLM's `/pooling`."""
        if body.model not in (None, name):
            return JSONResponse(_error(f"there is no model {body.model!r} here, only {name!r}", "NotFoundError"), 404)
        turns = [turn.model_dump(exclude_none=True) for turn in body.messages]
        prompt, images, steps = solution_of(turns, prm.step_format)
        question = prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else prompt
        row = {"images": await opened(images), "prompt": question, "completions": steps}
        (scores,), tokens = await scored([row])
        pairs = [[1 - score, score] for score in scores]
        return {
            "id": f"pool-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": name,
            "data": [{"index": 0, "object": "pooling", "data": pairs}],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    @app.post("/best_of_n", dependencies=key)
    async def best_of_n(body: BestOfNRequest) -> dict[str, Any]:
        """Candidates of one question, best first; its pictures and text are run once."""
        if len(body.candidates) > limits.candidates:
            raise ValueError(f"{len(body.candidates)} candidates came, at most {limits.candidates} are ranked")
        images = await opened(body.images)
        steps = [split_steps(text, body.split) if isinstance(text, str) else text for text in body.candidates]
        rows = [{"images": images, "prompt": body.question, "completions": own} for own in steps]
        for index, row in enumerate(rows):
            row["rollout_id"] = f"candidate {index}"
        scores, _ = await scored(rows)
        ranking = [
            {"index": index, "score": AGGREGATES[body.aggregate](own), "step_scores": own, "steps": steps[index]}
            for index, own in enumerate(scores)
        ]
        return {"model": name, "ranking": sorted(ranking, key=lambda candidate: -candidate["score"])}

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        """The one model that is served, with the marker and the joiner that a client writes."""
        layout = {"step_marker": prm.step_format.marker, "step_joiner": prm.step_format.joiner}
        entry = {"id": name, "object": "model", "owned_by": "trl-mprm", "reads_images": prm.reads_images, **layout}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics", dependencies=key)
    async def prometheus() -> PlainTextResponse:
        """Counters for Prometheus."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    if ui:
        page = resources.files("trl_mprm").joinpath("templates", "serve.html").read_text(encoding="utf-8")

        @app.get("/", include_in_schema=False)
        async def index() -> HTMLResponse:
            return HTMLResponse(page)

    _answer_errors(app)
    return app


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until the process is told to stop; requests that are under way are answered first."""
    config = uvicorn.Config(
        app,
        host,
        port,
        http=BoundedConnections,
        log_level="warning",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=30,
        h11_max_incomplete_event_size=2**16,
        server_header=False,
    )
    uvicorn.Server(config).run()


class _Unauthorised(Exception):
    pass


def _text_tokens(tokenizer: Callable, row: dict[str, Any]) -> int:
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return sum(map(len, tokenizer([*texts, *row["completions"]], add_special_tokens=False)["input_ids"]))


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _answer_errors(app: FastAPI) -> None:
    """One sentence for every error, in the form of OpenAI's API; nothing of this machine."""

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
        return JSONResponse(_error("the server failed on this request, its log says why", "InternalServerError"), 500)
