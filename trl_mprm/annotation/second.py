"""
Get a second opinion on steps, from another policy or from a process reward model as a judge.

    first   MC scores 0.75, 0.0, 0.5     good, bad, good
    second  P(good)   0.9,  0.7, 0.8     good, good, good
    agreement         1.0,  0.0, 1.0
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from .checkers import Checker
from .drawing import Drawing
from .opening import open_policy
from .policies import Policy
from .progress import Progress
from .questions import Rollout


class SecondOpinion(NamedTuple):
    """Judgements of each step of each rollout: good, bad, or None if it is not known."""

    name: str
    labels: list[list[bool | None]]


def agreement(scores: Sequence[float | None], labels: Sequence[bool | None]) -> list[float | None]:
    """
    Compare scores with judgements: 1.0 for a score above 0 of a good step or a score of 0 of a bad one, else 0.0.

    Examples:
    ```python
    >>> from trl_mprm.annotation.second import agreement
    >>> agreement([0.75, 0.0, 0.5, None], [True, True, None, True])
    [1.0, 0.0, None, None]

    ```
    """
    pairs = zip(scores, labels, strict=True)
    return [None if score is None or good is None else float((score > 0) == good) for score, good in pairs]


def second_opinion(
    rollouts: Sequence[Rollout],
    second: str | Callable[..., list[str]] | Policy,
    checker: Checker,
    output: Path,
    n: int,
    seed: int,
    sampling: dict[str, Any],
) -> SecondOpinion:
    """
    Judge the steps of `rollouts`: by `n` draws of a policy (see [`open_policy`]), kept in `NAME.second.draws.jsonl`, or,
    if `second` is the folder of a process reward model, by its scores, of which those above 0.5 mean good.
    """
    if isinstance(second, str) and Path(second).is_dir():
        from ..prompting.step_format import StepFormat  # here: it takes torch
        from ..scoring import ProcessRewardModel

        if (Path(second) / StepFormat.FILE_NAME).is_file():
            judge = ProcessRewardModel.from_pretrained(second)
            bar = tqdm(rollouts, unit="rollout", delay=1, desc="judging")
            scores = [judge.score(rollout.images, rollout.prompt, list(rollout.steps)) for rollout in bar]
            return SecondOpinion(second, [[score > 0.5 for score in steps] for steps in scores])
    sampling = {} if callable(second) or isinstance(second, Policy) else sampling
    policy = open_policy(second, **sampling)
    settings = {"policy": policy.name, "seed": seed, **sampling}
    with (
        Progress(output.with_name(f"{output.stem}.second.draws.jsonl"), settings) as progress,
        tqdm(unit="draw", delay=1, desc="second policy") as bar,
    ):
        drawing = Drawing(policy, checker, progress, seed, bar)
        tallies = drawing.tallies(rollouts, n)
        drawing.draw_all(rollouts, tallies)
        drawing.stop_if_parked(output)
    labels = [[None if score is None else score > 0 for score in tally.scores()] for tally in tallies]
    return SecondOpinion(policy.name, labels)
