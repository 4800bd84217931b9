"""
Requests that wait, scored together.

While the model works on some requests, others arrive; all that wait are handed to the model at once, which runs picture
and question of those that share a question once:

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
    """More solutions wait than the server is willing to hold."""


class ScoringQueue:
    """
    Hands waiting requests to a model, as many together as there are.

    Args:
        score_batch (`Callable`):
            From rows to the scores of their steps, as [`ProcessRewardModel.score_batch`]. Called in one thread.
        max_waiting (`int`):
            Solutions that may wait; more raise [`Busy`].
        max_together (`int`, *optional*, defaults to `64`):
            Solutions handed over at once, so that no request waits for a very long turn.

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
        """Wait for the scores of some rows. Raises what the model raises for these rows, and [`Busy`]."""
        if self.waiting + len(rows) > self.max_waiting:
            raise Busy(
                f"{self.waiting} solutions are waiting already, at most {self.max_waiting} may: try again later"
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
                if answer.done():  # who asked is gone
                    continue
                if isinstance(outcome, Exception):
                    answer.set_exception(outcome)
                else:
                    answer.set_result(outcome)

    def _take(self) -> list[tuple[Rows, asyncio.Future]]:
        jobs, taken = [], 0
        while self.jobs and (not jobs or taken + len(self.jobs[0][0]) <= self.max_together):
            rows, answer = self.jobs.popleft()
            self.waiting -= len(rows)
            if not answer.done():
                jobs.append((rows, answer))
                taken += len(rows)
        return jobs

    def _score(self, jobs: list[Rows]) -> list[Scores | Exception]:
        """Scores of each job. A job that cannot be scored fails alone: with others it would take them along."""
        try:
            scores = iter(self.score_batch([row for rows in jobs for row in rows]))
            return [[next(scores) for _ in rows] for rows in jobs]
        except Exception as error:  # whatever a model raises is the answer to the request that caused it
            if len(jobs) == 1:
                return [error]
            return [outcome for job in jobs for outcome in self._score([job])]
