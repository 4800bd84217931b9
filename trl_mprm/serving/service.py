"""Handle requests that a server has read: open pictures, score solutions, count them."""

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..data.aggregates import AGGREGATES
from ..data.splitting import split_steps
from ..prompting.tokens import tokenizer_of
from ..scoring import ProcessRewardModel
from .messages import solution_of
from .pictures import Limits, Pictures
from .queue import ScoringQueue


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


class Service:
    """
    Answers requests, given in plain types, with one model.

    Args:
        prm ([`ProcessRewardModel`]):
            The model.
        name (`str`):
            Name under which the model is offered.
        pictures ([`Pictures`]):
            Opens pictures.
        limits ([`Limits`]):
            Limits on requests.
    """

    def __init__(self, prm: ProcessRewardModel, name: str, pictures: Pictures, limits: Limits):
        self.prm, self.name, self.pictures, self.limits = prm, name, pictures, limits
        self.queue = ScoringQueue(prm.score_batch, limits.waiting)
        self.metrics = Metrics(self.queue)
        self.tokenizer = tokenizer_of(prm.processing_class)

    async def pooling(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Score one solution, in the form of vLLM's `/pooling`."""
        prompt, images, steps = solution_of(messages, self.prm.step_format)
        question = prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else prompt
        row = {"images": await self._opened(images), "prompt": question, "completions": steps}
        (scores,), tokens = await self._scored([row])
        pairs = [[1 - score, score] for score in scores]
        return {
            "id": f"pool-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self.name,
            "data": [{"index": 0, "object": "pooling", "data": pairs}],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    async def best_of_n(
        self, question: str, images: list[str], candidates: list[str | list[str]], aggregate: str, split: str
    ) -> dict[str, Any]:
        """Rank the candidates of one question, best first; its pictures and text are run only once."""
        if len(candidates) > self.limits.candidates:
            raise ValueError(f"{len(candidates)} candidates came, at most {self.limits.candidates} are ranked")
        opened = await self._opened(images)
        steps = [split_steps(text, split) if isinstance(text, str) else text for text in candidates]
        rows = [
            {"images": opened, "prompt": question, "completions": own, "rollout_id": f"candidate {index}"}
            for index, own in enumerate(steps)
        ]
        scores, _ = await self._scored(rows)
        ranking = [
            {"index": index, "score": AGGREGATES[aggregate](own), "step_scores": own, "steps": steps[index]}
            for index, own in enumerate(scores)
        ]
        return {"model": self.name, "ranking": sorted(ranking, key=lambda candidate: -candidate["score"])}

    def models(self) -> dict[str, Any]:
        """List the one model that is served, with the marker and the joiner that a client needs."""
        layout = {"step_marker": self.prm.step_format.marker, "step_joiner": self.prm.step_format.joiner}
        entry = {"id": self.name, "object": "model", "owned_by": "trl-mprm", "reads_images": self.prm.reads_images}
        return {"object": "list", "data": [entry | layout]}

    async def _scored(self, rows: list[dict[str, Any]]) -> tuple[list[list[float]], int]:
        counts = [_text_tokens(self.tokenizer, row) for row in rows]
        if max(counts) > self.limits.tokens:
            raise ValueError(
                f"a solution has {max(counts)} tokens of text, at most {self.limits.tokens} are read: shorten it"
            )
        scores = await self.queue.score(rows)
        self.metrics.solutions.inc(len(scores))
        self.metrics.steps.inc(sum(map(len, scores)))
        return scores, sum(counts)

    async def _opened(self, names: list[str]) -> list[dict[str, Any]]:
        if len(names) > self.limits.images:
            raise ValueError(f"{len(names)} images came, at most {self.limits.images} are read")
        return [await asyncio.to_thread(self.pictures.open, image) for image in names]


def _text_tokens(tokenizer: Callable, row: dict[str, Any]) -> int:
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return sum(map(len, tokenizer([*texts, *row["completions"]], add_special_tokens=False)["input_ids"]))
