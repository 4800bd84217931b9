"""
Score waiting requests together.

While the model works on some requests, others arrive. All that wait are handed to the model at once, which runs a shared
picture and question only once:

    arriving    q1a q1b . . . q2a q1c q1d . .
    scored      [q1a]  [q1b q2a q1c q1d]
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


Rows = list[dict[str, Any]]
Scores = list[list[float]]


class Busy(Exception):
    """Raised when more solutions wait than the server may hold."""


class ScoringQueue:
    """
    Hands all waiting requests to a model together.

    Args:
        score_batch (`Callable`):
            Maps rows to the scores of their steps, like [`ProcessRewardModel.score_batch`]. Called in one thread.
        max_waiting (`int`):
            Solutions that may wait; more raise [`Busy`].
        max_together (`int`, *optional*, defaults to `64`):
            Limit on the solutions handed over at once, so that no request waits very long for its turn.

    Examples:
    ```python
    >>> import asyncio
    >>> from trl_mprm.serving.queue import ScoringQueue
    >>> async def two():
    ...     async with ScoringQueue(lambda rows: [[0.5] * len(row["completions"]) for row in rows], 8) as queue:
    ...         return await asyncio.gather(*(queue.score([{"completions": ["a"] * n}]) for n in (1, 2)))
    >>> asyncio.run(two())
    [[[0.5]], [[0.5, 0.5]]]

    ```
    """

    def __init__(self, score_batch: Callable[[Rows], Scores], max_waiting: int, max_together: int = 64):
        self.score_batch, self.max_waiting, self.max_together = score_batch, max_waiting, max_together
        self.jobs: deque[tuple[Rows, asyncio.Future]] = deque()
        self.waiting = 0

    async def __aenter__(self) -> "ScoringQueue":
        self.arrived = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "scoring")
        self.task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        self.thread.shutdown(cancel_futures=True)

    async def score(self, rows: Rows) -> Scores:
        """Wait for the scores of some rows. Raises [`Busy`], or the model's exception for these rows."""
        if self.waiting + len(rows) > self.max_waiting:
            raise Busy(
                f"{self.waiting} solutions are already waiting, and the limit is {self.max_waiting}: try again later"
            )
        answer = asyncio.get_running_loop().create_future()
        self.jobs.append((rows, answer))
        self.waiting += len(rows)
        self.arrived.set()
        return await answer

    async def _work(self) -> None:
        while True:
            await self.arrived.wait()
            jobs = self._take()
            if not jobs:
                self.arrived.clear()
                continue
            outcomes = await asyncio.get_running_loop().run_in_executor(self.thread, self._score, [r for r, _ in jobs])
            for (_, answer), outcome in zip(jobs, outcomes, strict=True):
                if answer.done():  # the client is gone
                    continue
                if isinstance(outcome, Exception):
                    answer.set_exception(outcome)
                else:
                    answer.set_result(outcome)

    def _take(self) -> list[tuple[Rows, asyncio.Future]]:
        jobs: list[tuple[Rows, asyncio.Future]] = []
        taken = 0
        while self.jobs and (not jobs or taken + len(self.jobs[0][0]) <= self.max_together):
            rows, answer = self.jobs.popleft()
            self.waiting -= len(rows)
            if not answer.done():
                jobs.append((rows, answer))
                taken += len(rows)
        return jobs

    def _score(self, jobs: list[Rows]) -> list[Scores | Exception]:
        """Score each job. If scoring them together fails, each is scored alone, so that a bad job does not fail others."""
        try:
            scores = iter(self.score_batch([row for rows in jobs for row in rows]))
            return [[next(scores) for _ in rows] for rows in jobs]
        except Exception as error:  # any exception of the model is the answer to the request that caused it
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self._score([job])]
