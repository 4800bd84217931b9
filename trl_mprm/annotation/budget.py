"""
Find the draws that can still change a selection by BIS: a race of rollouts, with exact or likely bounds.

A rollout of three steps, N = 16 draws per step planned, alpha 0.2; so far

    step   right  measured  left     score at the end
    1      4      4         12       4/16 to 16/16, positive for sure
    2      3      4         12       3/16 to 15/16, positive for sure
    3      0      4         12       0, or positive and at most 12/16

    all positive:  (1 * 0 + 0.2) * mean(1, 15/16, 12/16)      = 0.179
    step 3 is 0:   (2/3 * 1/3 + 0.2) * mean(1, 15/16)         = 0.409    its BIS after all draws is at most this

The rollout with the highest bound gets the next draws; ties go to the one that comes first. The race of a source is over
when its quota of finished rollouts beats the bounds of all others: all draws would have kept the same rollouts. Every
kept rollout has all N draws of every step, so that no stopping rule biases its scores.
"""

import heapq
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


@dataclass
class Tally:
    """
    The draws of one rollout by step: of `n` planned draws, `asked` were made, `measured` of these ended by themselves,
    and `right` of those reached the answer.
    """

    n: int
    right: list[int]
    measured: list[int]
    asked: list[int]

    @classmethod
    def new(cls, n_steps: int, n: int) -> "Tally":
        return cls(n, [0] * n_steps, [0] * n_steps, [0] * n_steps)

    def add(self, step: int, outcomes: Sequence[bool | None]) -> None:
        """Add draws of a step: True for right, False for wrong, None for a lost draw."""
        self.asked[step] += len(outcomes)
        self.measured[step] += sum(outcome is not None for outcome in outcomes)
        self.right[step] += sum(outcome is True for outcome in outcomes)

    @property
    def finished(self) -> bool:
        return all(asked == self.n for asked in self.asked)

    @property
    def known(self) -> bool:
        """Whether a selection can use the rollout, i.e. at least one step is measured."""
        return any(self.measured)

    def scores(self) -> list[float | None]:
        """The Monte Carlo score of each step; None where no draw was measured."""
        return [right / of if of else None for right, of in zip(self.right, self.measured, strict=True)]


def bis(n_steps: int, n_pos: int, mc_sum: float, alpha: float) -> float:
    """Compute the BIS of one rollout, equal to the last bit to [`~selection.bis.score_of_sums`]."""
    p_pos = n_pos / n_steps
    return (p_pos * (1 - p_pos) + alpha) * (mc_sum / n_pos if n_pos else 1.0)


def final_bis(tally: Tally, alpha: float) -> float:
    """
    Return the BIS of a finished rollout, as `add_bis` gives it; -1 if nothing was measured.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally, final_bis
    >>> final_bis(Tally(16, [9, 11, 11, 1, 0, 0, 0, 0], [16] * 8, [16] * 8), alpha=0.05)
    0.15

    ```
    """
    scores = [score for score in tally.scores() if score is not None]
    if not scores:
        return -1.0
    return bis(len(scores), sum(score > 0 for score in scores), _sum(scores), alpha)


def highest_bis(tally: Tally, alpha: float) -> float:
    """
    Return the highest BIS that a rollout can have after all draws, whatever they are; -1 if it can have none.

    The bound is exact: no outcome of the remaining draws gives more and, if no draw is lost, one outcome gives this much.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally, highest_bis
    >>> round(highest_bis(Tally(16, [4, 3, 0], [4, 4, 4], [4, 4, 4]), alpha=0.2), 3)
    0.409

    ```
    """
    zeros, sure, maybe, unseen, whole = 0, [], [], 0, True
    for right, measured, asked in zip(tally.right, tally.measured, tally.asked, strict=True):
        left = tally.n - asked
        if right:
            sure.append((right + left) / (measured + left))
        elif measured and left:  # 0, or positive
            maybe.append(left / (measured + left))
        elif measured:
            zeros += 1
        elif left:  # 0, positive with up to 1, or every draw is lost and it is not measured
            unseen += 1
    maybe.sort(reverse=True)
    # Sums of such fractions are exact in any order; others are rounded, in an order that is not the final one.
    whole = all((score * 2**20).is_integer() for score in (*sure, *maybe))
    best, sum_sure = -1.0, _sum(sure)
    for ones in range(unseen + 1):
        for more in range(len(maybe) + 1):
            n_pos = len(sure) + ones + more
            total = sum_sure + ones + _sum(maybe[:more])
            for lost in range(unseen - ones + 1):
                n_steps = zeros + len(sure) + len(maybe) + unseen - lost
                if n_steps:
                    best = max(best, bis(n_steps, n_pos, total, alpha))
    return best if whole else best * (1 + 1e-12)


def _sum(values: Sequence[float]) -> float:
    total = 0.0  # one after the other as `np.bincount` does; `sum` compensates in newer Pythons
    for value in values:
        total += value
    return total


# ---- likely bounds


@lru_cache(maxsize=100_000)
def beta_binomial(right: int, measured: int, left: int, prior: tuple[float, float]) -> np.ndarray:
    """Compute the probability of 0 to `left` more right draws, given `right` of `measured`, from the Beta posterior."""
    a, b = prior[0] + right, prior[1] + measured - right
    pmf = np.ones(left + 1)
    for more in range(1, left + 1):
        pmf[more] = pmf[more - 1] * (left - more + 1) / more * (a + more - 1) / (b + left - more)
    return pmf / pmf.sum()


def fit_prior(tallies: Sequence[Tally]) -> tuple[float, float]:
    """
    Find the Beta prior, on a grid, under which the draws of all steps are most likely. The decision when to stop depends
    on these draws alone and so does not bias the likelihood.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally, fit_prior
    >>> [round(value, 2) for value in fit_prior([Tally(4, [4, 4, 0, 4], [4] * 4, [4] * 4)])]
    [0.03, 0.01]

    ```
    """
    pairs = [pair for tally in tallies for pair in zip(tally.right, tally.measured, strict=True) if pair[1]]
    right, measured = np.array(pairs, int).reshape(-1, 2).T
    longest = measured.max(initial=0) + 1
    grid = np.geomspace(0.01, 20, 30)

    def rising(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Sum log(start (start + 1) ... (start + count - 1)) over `counts`, for each `start`."""
        logs = np.log(start[..., None] + np.arange(longest)).cumsum(-1)
        return np.insert(logs, 0, 0.0, axis=-1) @ np.bincount(counts, minlength=longest + 1)

    likelihood = rising(grid, right)[:, None] + rising(grid, measured - right)[None, :]
    likelihood -= rising(grid[:, None] + grid[None, :], measured)
    a, b = np.unravel_index(likelihood.argmax(), likelihood.shape)
    return float(grid[a]), float(grid[b])


def likely_bis(tally: Tally, alpha: float, error: float, prior: tuple[float, float]) -> float:
    """
    Return the value that the final BIS of a rollout exceeds with a probability of at most `error`, by the Beta posterior.

    The steps are taken to be independent, and no remaining draw to be lost.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally, likely_bis
    >>> tally = Tally(16, [4, 3, 0], [4, 4, 4], [4, 4, 4])
    >>> [round(likely_bis(tally, 0.2, error, (0.5, 0.5)), 3) for error in (0.0, 0.01, 0.5)]
    [0.409, 0.409, 0.251]

    ```
    """
    n, steps = (
        tally.n,
        [step for step in range(len(tally.asked)) if tally.measured[step] or tally.asked[step] < tally.n],
    )
    if not steps:
        return -1.0
    # chance[p, s]: p steps are positive, and their scores add up to s / n
    chance = np.zeros((len(steps) + 1, len(steps) * n + 1))
    chance[0, 0] = 1.0
    for step in steps:
        right, measured, left = tally.right[step], tally.measured[step], n - tally.asked[step]
        after = np.zeros_like(chance)
        for more, probability in enumerate(beta_binomial(right, measured, left, prior)):
            score = -(-(right + more) * n // (measured + left))  # rounded up where draws were lost
            if right + more == 0:
                after += probability * chance
            else:
                after[1:, score:] += probability * chance[:-1, : chance.shape[1] - score]
        chance = after
    n_pos, total = np.nonzero(chance)
    p_pos = n_pos / len(steps)
    values = (p_pos * (1 - p_pos) + alpha) * np.where(n_pos, total / n / np.maximum(n_pos, 1), 1.0)
    order = np.argsort(-values, kind="stable")
    above = np.cumsum(chance[n_pos, total][order])
    return float(values[order][np.searchsorted(above, error, side="right").clip(max=len(order) - 1)])


# ---- the race


def next_draws(tally: Tally) -> list[tuple[int, int]]:
    """
    Choose the draws of a rollout that lower its bound soonest, as pairs (step, number of draws) in step order.

    Steps without a right draw come first, and their number of draws doubles each time: one right draw shows that a step
    is positive. After these comes the step with the lowest share of right draws.

    Examples:
    ```python
    >>> from trl_mprm.annotation.budget import Tally, next_draws
    >>> next_draws(Tally.new(3, 16)), next_draws(Tally(16, [1, 0, 1], [1, 2, 1], [1, 2, 1]))
    ([(0, 1), (1, 1), (2, 1)], [(1, 2)])

    ```
    """
    open_steps = [step for step, asked in enumerate(tally.asked) if asked < tally.n]
    never = [step for step in open_steps if not tally.right[step]]
    if never:
        return [(step, min(max(1, tally.asked[step]), tally.n - tally.asked[step])) for step in never]
    step = min(open_steps, key=lambda step: ((tally.right[step] + 1) / (tally.measured[step] + 2), step))
    return [(step, min(2, tally.n - tally.asked[step]))]


@dataclass
class Race:
    """
    The race of one source. Its rollouts are in file order, which decides among equal scores.

    Args:
        tallies (`list[Tally]`):
            The draws of each rollout; the caller updates them.
        fraction (`float`), alpha (`float`):
            Parameters of the selection: `max(1, int(m * fraction))` of the `m` rollouts with a measured step are kept.
        error (`float`, *optional*, defaults to `0.0`):
            At 0 the race is exact, with the bounds of [`highest_bis`]. Above 0 it is confident, with the bounds of
            [`likely_bis`] at this error, from a Beta prior that is fitted again whenever the draws have doubled.
    """

    tallies: list[Tally]
    fraction: float
    alpha: float
    error: float = 0.0
    finished: list[tuple[float, int]] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)
    prior: tuple[float, float] = (0.5, 0.1)
    refit_at: int = 0

    def __post_init__(self):
        self.refit_at = 2 * sum(len(tally.asked) for tally in self.tallies)  # one draw per step says too little
        self._known: set[int] = set()
        self._measured = [0] * len(self.tallies)
        for index in range(len(self.tallies)):
            self.put_back(index)

    def put_back(self, index: int) -> None:
        """Update the bound of a rollout that [`take`] gave out, after its draws."""
        tally = self.tallies[index]
        self._measured[index] = sum(tally.measured)
        if tally.known:
            self._known.add(index)
        if tally.finished:
            insort(self.finished, (-final_bis(tally, self.alpha), index))
        else:  # it counts for the quota only once a step is measured
            heapq.heappush(self.waiting, (-self._bound(tally) if tally.known else -np.inf, index))

    def take(self, limit: int) -> list[int]:
        """Give out at most `limit` rollouts to draw on, best first; none when the race is over."""
        if self.error:
            self._refit()
        batch: list[int] = []
        while self.waiting and len(batch) < limit and not self._beaten(self.waiting[0]):
            batch.append(heapq.heappop(self.waiting)[1])
        return batch

    def kept(self) -> list[int]:
        """Return the rollouts that the selection keeps, once the race is over."""
        valid = [index for key, index in self.finished if key <= 0]
        return sorted(valid[: self.quota])

    @property
    def quota(self) -> int:
        return max(1, int(len(self._known) * self.fraction))

    def _bound(self, tally: Tally) -> float:
        if self.error:
            return likely_bis(tally, self.alpha, self.error, self.prior)
        return highest_bis(tally, self.alpha)

    def _beaten(self, key: tuple[float, int]) -> bool:
        quota = self.quota
        return len(self.finished) >= quota and self.finished[quota - 1] < key

    def _refit(self) -> None:
        spent = sum(self._measured)
        if spent < self.refit_at:
            return
        self.refit_at, self.prior = 2 * spent, fit_prior(self.tallies)
        waiting, self.waiting = self.waiting, []
        for _, index in waiting:
            self.put_back(index)
