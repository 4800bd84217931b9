"""
What continues a solution.

A policy gets visits. A visit is one rollout with some of its steps, in rising order, so that what was computed for the
prefix of one step serves the next:

    [Request(images, "add red blue", ["from 0"], n=4, seed=71), Request(images, "add red blue", ["from 0", "red is 7"], ...)]

and answers each request with `n` draws, or parks it with a reason. Draw `i` of a request has the seed `seed + i`, so
that it is the same draw in whatever company it is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


STOP = "stop"  # the finish reason of a draw that ended by itself; any other draw is lost


class Request(NamedTuple):
    """`n` continuations of a solution that begins with `steps`. `name` tells people which row and step it is."""

    name: str
    images: Sequence[Any]
    prompt: str
    steps: Sequence[str]
    n: int
    seed: int


class Draw(NamedTuple):
    """One continuation: its text, why it ended (`STOP` or not), and how many tokens it has, where that is known."""

    text: str
    finish: str
    tokens: int | None = None


class Reply(NamedTuple):
    """
    All draws of a request; tokens of the prefix, how many of these were not computed again, and generated tokens where
    the draws do not tell.
    """

    draws: list[Draw]
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: int | None = None


class Parked(NamedTuple):
    """A request without an answer, for now: the next run asks again."""

    reason: str


class Policy(ABC):
    """
    Whatever can continue a solution. `name` says in the evidence what it was.
    """

    name: str

    @abstractmethod
    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply | Parked]]:
        """Yield (visit, request, reply), in any order, as replies come."""


class CallablePolicy(Policy):
    """
    A function `policy(images, prompt, steps, n, seed) -> list[str]`: the `n` continuations after `steps`. Continuation
    `i` should depend on `seed + i` alone, then draws do not depend on how many are asked for at once.
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
                f"{name}: the policy raised {type(error).__name__} ({error}): mend it and run again, "
                "draws so far are kept"
            ) from error
        if not isinstance(texts, list) or len(texts) != request.n or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: the policy returned {texts!r:.80}, expected a list of {request.n} texts")
        return Reply([Draw(text, STOP) for text in texts])
