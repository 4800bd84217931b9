"""
Annotate rollouts by Monte Carlo sampling: questions or rollouts become rows with step scores.

    {"prompt": "add red blue", "answer": "2", "completions": ["from 0", "red is 7 total 7", "blue is 5 total 2"]}
    ->  {..., "mc_scores": [0.8125, 0.9375, 1.0], "mc_counts": [13, 15, 16], "mc_total": 16, "draws": [...]}

`budget="all"` draws N continuations of every step. `budget="bis"` returns the rows that a selection by BIS would keep
after all draws, each with all its draws, and draws for the others only until they are ruled out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.rows import question_key
from ..files import write_json
from ..selection.rules import CutSpec
from .budget import Race, Tally, next_draws
from .checkers import Checker, find_checker
from .drawing import Drawing, cost
from .opening import open_policy
from .output import annotated_row, evidence, raw_record, to_dataset, write_jsonl, write_parquet
from .policies import Policy
from .progress import Progress
from .questions import Rollout, from_rows
from .second import agreement, second_opinion


RACE_BATCH = 64  # rollouts of a source that are annotated at once
MAX_STEPS = 12  # of a sampled solution, as in VisualPRM400K


def annotate(
    rows: Iterable[Mapping[str, Any]],
    policy: str | Callable[..., list[str]] | Policy,
    *,
    checker: str | Checker | None = None,
    n: int = 16,
    solutions: int = 4,
    budget: Literal["all", "bis"] = "all",
    fraction: float = 0.1,
    alpha: float = 0.2,
    mode: Literal["exact", "confident"] = "exact",
    error: float = 0.01,
    seed: int = 0,
    output: str | os.PathLike,
    format: Literal["rows", "visualprm-raw"] = "rows",
    second: str | Callable[..., list[str]] | Policy | None = None,
    price: float | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int = 8,
    **sampling: Any,
) -> Dataset:
    """
    Score every step by `n` continuations of a policy, and write the rows to `output`.

    Two files are written beside the output: `NAME.draws.jsonl` with the draws that were paid for, and
    `NAME.annotation.json` with what was spent per source. An interrupted run is finished by running it again: no draw is
    paid for twice, and the result is that of an uninterrupted run.

    Args:
        rows (`Iterable[Mapping]`):
            Rows with `prompt` and `answer`, and optionally `images`, `completions`, `source` and `rollout_id`.
            Questions without `completions` are solved first.
        policy (`str`, `Callable` or [`Policy`]):
            The URL of an OpenAI-compatible server (`http://...`), the Hub id or folder of a model, or a function
            `policy(images, prompt, steps, n, seed) -> list[str]` that returns the `n` continuations after `steps`;
            continuation `i` must depend on `seed + i` alone.
        checker (`str` or `Callable`, *optional*):
            `"math"` (the default), `"exact"`, `"choice"`, `"numeric"`, or a function that takes the text of a whole
            solution and the answer, and returns whether the solution is right.
        n (`int`, *optional*, defaults to 16):
            Number of continuations per step. A last step that states the final answer is checked and not sampled. A
            draw that was cut off is lost: it counts neither as right nor as wrong.
        solutions (`int`, *optional*, defaults to 4):
            Number of solutions to sample for a question that has none.
        budget (`str`, *optional*, defaults to `"all"`):
            `"all"` annotates every row, `"bis"` those rows that `top_fraction(rows, fraction)` would keep by BIS.
        fraction (`float`), alpha (`float`):
            Parameters of that selection.
        mode (`str`, *optional*, defaults to `"exact"`):
            `"exact"` always returns the rows that all draws would give. `"confident"` gives a row up when its BIS would
            reach the cut with a probability of at most `error`, by the Beta posterior of its draws.
        error (`float`, *optional*, defaults to 0.01):
            Error probability of the confident mode, per row.
        seed (`int`, *optional*, defaults to 0):
            Seed of all draws.
        output (`str` or path):
            File to write, `*.jsonl` or `*.parquet`.
        format (`str`, *optional*, defaults to `"rows"`):
            `"rows"`, or `"visualprm-raw"` for the schema of VisualPRM400K-v1.1-Raw, in JSONL.
        second (as `policy`, *optional*):
            Another policy, or the folder of a process reward model as a judge. Adds a column `agreement`, which is 1.0
            for each step that both find good or both find bad.
        price (`float`, *optional*):
            Price of a million computed tokens, for the cost.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"`, or `"ray"` for a policy on every worker of a Ray cluster, with the same result.
        workers (`int`, *optional*, defaults to 8):
            Number of rollouts that a server continues at the same time.
        sampling:
            `temperature`, `top_p`, `top_k` and `max_new_tokens` of a policy that is a server or a model.

    Returns:
        [`~datasets.Dataset`]: the rows, ready for `add_bis`, with the evidence for each step in a column `draws`.

    Raises:
        `ValueError`: a row lacks a question, an answer or an image, the policy cannot be used, or the checker raises.
        `OSError`: the policy did not answer some requests; run again to finish.

    Examples:
    ```python
    >>> import tempfile
    >>> from trl_mprm.annotation.annotate import annotate
    >>> def policy(images, prompt, steps, n, seed):
    ...     return ["Answer: 2" if "It is 2." in steps or (seed + i) % 2 else "Answer: 3" for i in range(n)]
    >>> row = {"prompt": "1 + 1?", "answer": "2", "completions": ["Let me see.", "It is 2.", "Answer: 2"]}
    >>> file = tempfile.mkdtemp() + "/rows.jsonl"
    >>> annotate([row], policy, checker="exact", n=4, output=file)[0]["mc_scores"]
    [0.5, 1.0, 1.0]

    ```
    """
    plan = Plan(n, solutions, budget, fraction, alpha, mode, error, seed, format, price, engine, workers)
    return annotate_rollouts(from_rows(rows), policy, output, plan, checker=checker, second=second, **sampling)[0]


@dataclass(frozen=True)
class Plan:
    """The request for an annotation, as [`annotate`] explains it."""

    n: int = 16
    solutions: int = 4
    budget: str = "all"
    fraction: float = 0.1
    alpha: float = 0.2
    mode: str = "exact"
    error: float = 0.01
    seed: int = 0
    format: str = "rows"
    price: float | None = None
    engine: str = "local"
    workers: int = 8

    def __post_init__(self):
        for name in ("n", "solutions", "workers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, known in (
            ("budget", ("all", "bis")),
            ("mode", ("exact", "confident")),
            ("format", ("rows", "visualprm-raw")),
            ("engine", ("local", "ray")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.error < 1:
            raise ValueError(f"error must lie between 0 and 1, got {self.error!r}")
        CutSpec("bis", fraction=self.fraction, alpha=self.alpha, seed=self.seed)  # checks these

    def check_output(self, output: Path) -> None:
        if output.suffix not in (".jsonl", ".parquet") or (self.format != "rows" and output.suffix != ".jsonl"):
            raise ValueError(f"output must be *.jsonl, or *.parquet with the format rows, got {str(output)!r}")


def annotate_rollouts(
    rollouts: list[Rollout],
    policy: str | Callable[..., list[str]] | Policy,
    output: str | os.PathLike,
    plan: Plan,
    *,
    checker: str | Checker | None = None,
    second: str | Callable[..., list[str]] | Policy | None = None,
    **sampling: Any,
) -> tuple[Dataset, dict[str, Any]]:
    """Do what [`annotate`] does for rollouts that are already read; also return the content of `NAME.annotation.json`."""
    output = Path(output)
    plan.check_output(output)
    checker_name, check = find_checker(checker)
    with (
        _policy(policy, plan, sampling) as policy,
        Progress(
            output.with_name(f"{output.stem}.draws.jsonl"),
            settings := {"policy": policy.name, "checker": checker_name, "seed": plan.seed, **sampling},
        ) as progress,
        tqdm(unit="draw", delay=1, desc="drawing") as bar,
    ):
        drawing = Drawing(policy, check, progress, plan.seed, bar, plan.price)
        todo, lost = _solved(rollouts, drawing, plan.solutions)
        tallies = drawing.tallies(todo, plan.n)
        kept = drawing.draw_all(todo, tallies) if plan.budget == "all" else _draw_race(todo, tallies, drawing, plan)
        drawing.stop_if_parked(output)
        if not kept:
            raise ValueError(_nothing_measured(output, todo, progress, lost))
        report = settings | asdict(plan) | {"output": output.name, "lost_solutions": dict(lost)}
        report |= {"spent": dict(drawing.spent), "sources": _by_source(todo, tallies, kept, progress)}
        if plan.price is not None:
            report["cost"] = cost(drawing.spent, plan.price)
        rows = _rows(todo, tallies, kept, progress, checker_name)
        if second is not None:
            others = second_opinion(
                [todo[index] for index in kept], second, check, output, plan.n, plan.seed, sampling
            )
            report["second"] = others.name
            for row, labels in zip(rows, others.labels, strict=True):
                row["agreement"] = agreement(row["mc_scores"], labels)
        data = _write([(todo[index], tallies[index]) for index in kept], rows, plan, output)
        write_json(report, output.with_name(f"{output.stem}.annotation.json"))
    return data, report


@contextmanager
def _policy(policy: str | Callable[..., list[str]] | Policy, plan: Plan, sampling: dict[str, Any]) -> Iterator[Policy]:
    if plan.engine == "local":
        yield open_policy(policy, plan.workers, **sampling)
        return
    if isinstance(policy, Policy):
        raise ValueError("with the engine ray every worker opens its own policy: give a model, a URL or a callable")
    from .engine_ray import RayPolicy  # here: Ray is an extra

    workers = RayPolicy(policy, **sampling)
    try:
        yield workers
    finally:
        workers.close()


def _nothing_measured(output: Path, rollouts: list[Rollout], progress: Progress, lost: Counter[str]) -> str:
    lost = lost.copy()
    for rollout in rollouts:
        for step in range(rollout.sampled):
            for record in progress.draws.get((rollout.id, rollout.key, step), []):
                lost.update(record["finish"])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common())
    return (
        f"{output} is not written: not one step was measured ({reasons}): if draws end by `length`, raise "
        "max_new_tokens, or set the end-of-turn token of the model"
    )


def _rows(
    rollouts: list[Rollout], tallies: list[Tally], kept: list[int], progress: Progress, checker: str
) -> list[dict[str, Any]]:
    confidence, rows = _self_confidence(rollouts, tallies), []
    for index in kept:
        rollout, tally = rollouts[index], tallies[index]
        draws = [evidence(rollout, step, tally, progress, checker) for step in range(len(rollout.steps))]
        rows.append(annotated_row(rollout, tally, draws))
        rows[-1]["self_confidence"] = confidence[question_key(rollout.prompt, rollout.images)]
    return rows


def _self_confidence(rollouts: list[Rollout], tallies: list[Tally]) -> dict[tuple[str, ...], float | None]:
    """Compute how often the policy solves a question: the mean score of the last measured step of its rollouts."""
    ends: dict[tuple[str, ...], list[float]] = {}
    for rollout, tally in zip(rollouts, tallies, strict=True):
        known = [score for score in tally.scores() if score is not None]
        ends.setdefault(question_key(rollout.prompt, rollout.images), []).extend(known[-1:])
    return {question: sum(scores) / len(scores) if scores else None for question, scores in ends.items()}


def _write(kept: list[tuple[Rollout, Tally]], rows: list[dict[str, Any]], plan: Plan, output: Path) -> Dataset:
    data = to_dataset(rows, [_opened(rollout.images) for rollout, _ in kept])
    if plan.format == "visualprm-raw":
        write_jsonl([raw_record(rollout, tally) for rollout, tally in kept], output)
    elif output.suffix == ".jsonl":
        write_jsonl(rows, output)
    else:
        write_parquet(data, output)
    return data


def _solved(rollouts: list[Rollout], drawing: Drawing, solutions: int) -> tuple[list[Rollout], Counter[str]]:
    """Return all rollouts in the order of their rows, with questions replaced by their sampled solutions."""
    questions = [rollout for rollout in rollouts if not rollout.steps]
    lost: Counter[str] = Counter()
    by_question: dict[str, list[Rollout]] = {}
    if questions:
        drawing.bar.set_description("solving")
        solved, lost = drawing.solve(questions, solutions, MAX_STEPS)
        for rollout in solved:
            by_question.setdefault(rollout.id.rpartition(":")[0], []).append(rollout)
        drawing.bar.set_description("drawing")
    return [
        item for rollout in rollouts for item in ([rollout] if rollout.steps else by_question.get(rollout.id, []))
    ], lost


def _draw_race(rollouts: list[Rollout], tallies: list[Tally], drawing: Drawing, plan: Plan) -> list[int]:
    error = plan.error if plan.mode == "confident" else 0.0
    places: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        places.setdefault(rollout.source, []).append(index)
    races = [
        (Race([tallies[index] for index in indices], plan.fraction, plan.alpha, error), indices)
        for indices in places.values()
    ]
    while batch := list(_next_batch(races)):
        visits = [(rollouts[indices[i]], race.tallies[i], next_draws(race.tallies[i])) for race, i, indices in batch]
        for (race, index, _), came in zip(batch, drawing.draw(visits), strict=True):
            if came:
                race.put_back(index)
    return sorted(indices[index] for race, indices in races for index in race.kept())


def _next_batch(races: list[tuple[Race, list[int]]]) -> Iterator[tuple[Race, int, list[int]]]:
    """Take a few rollouts of each race: among many, some would be drawn on that one more answer rules out."""
    for race, indices in races:
        for index in race.take(max(1, min(RACE_BATCH, race.quota // 8))):
            yield race, index, indices


def _by_source(
    rollouts: list[Rollout], tallies: list[Tally], kept: list[int], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Count the draws that were planned, made, saved and lost, by source."""
    sources: dict[str, Counter[str]] = {}
    for rollout, tally in zip(rollouts, tallies, strict=True):
        counts = sources.setdefault(rollout.source, Counter())
        drawn = sum(tally.asked[: rollout.sampled])
        counts.update(rollouts=1, draws_with_all=tally.n * rollout.sampled, draws=drawn)
        counts.update(steps_checked=len(rollout.steps) - rollout.sampled, not_measured=int(not tally.known))
        for step in range(rollout.sampled):
            for record in progress.draws.get((rollout.id, rollout.key, step), []):
                counts.update(f"lost_{finish}" for finish in record["finish"] if finish != "stop")
                counts["tokens"] += sum(tokens or 0 for tokens in record["tokens"])
    kept_of = Counter(rollouts[index].source for index in kept)
    return {
        source: dict(counts) | {"kept": kept_of[source], "draws_saved": counts["draws_with_all"] - counts["draws"]}
        for source, counts in sources.items()
    }


def _opened(images: list[Any]) -> list[Any]:
    return [
        {"path": os.fspath(image), "bytes": None} if isinstance(image, str | os.PathLike) else image
        for image in images
    ]
