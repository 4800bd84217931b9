"""
Policies, which continue solutions.

A policy gets visits. A visit is one rollout with some of its steps, in rising order, so that the prefix that was computed
for one step serves the next:

    [Request(images, "add red blue", ["from 0"], n=4, seed=71), Request(images, "add red blue", ["from 0", "red is 7"], ...)]

It answers each request with `n` draws, or parks it with a reason. Draw `i` of a request has the seed `seed + i`, so that
it does not depend on the draws that are made together with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


STOP = "stop"  # the finish reason of a draw that ended by itself; any other draw is lost


class Request(NamedTuple):
    """A request for `n` continuations after `steps`. `name` names the row and the step in messages."""

    name: str
    images: Sequence[Any]
    prompt: str
    steps: Sequence[str]
    n: int
    seed: int


class Draw(NamedTuple):
    """One continuation: its text, the reason why it ended (`STOP` or another), and its number of tokens, if that is known."""

    text: str
    finish: str
    tokens: int | None = None


class Reply(NamedTuple):
    """
    All draws of a request, the number of tokens of the prefix, how many of these came from a cache, and the number of
    generated tokens, if the draws do not have it.
    """

    draws: list[Draw]
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: int | None = None


class Parked(NamedTuple):
    """A request that has no answer yet; the next run sends it again."""

    reason: str


class Policy(ABC):
    """
    The base class of whatever continues solutions. `name` stands for it in the evidence.
    """

    name: str

    @abstractmethod
    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply | Parked]]:
        """Yield (visit, request, reply) in any order, as the replies come."""


class CallablePolicy(Policy):
    """
    Wraps a function `policy(images, prompt, steps, n, seed) -> list[str]` that returns the `n` continuations after
    `steps`. If continuation `i` depends on `seed + i` alone, draws do not depend on how many are requested at once.
    """

    def __init__(self, function: Callable[..., list[str]]):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply]]:
        for place, visit in enumerate(visits):
            for number, request in enumerate(visit):
                yield place, number, self._reply(request)

    def _reply(self, request: Request) -> Reply:
        name, *arguments = request
        try:
            texts = self.function(*arguments)
        except Exception as error:  # of any kind: it is the user's own code
            raise ValueError(
                f"{name}: the policy raised {type(error).__name__} ({error}): correct it and run "
                "again; the draws so far are kept"
            ) from error
        if not isinstance(texts, list) or len(texts) != request.n or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: the policy returned {texts!r:.80}, expected a list of {request.n} texts")
        return Reply([Draw(text, STOP) for text in texts])
