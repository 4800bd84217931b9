"""
The tasks by which the items of a benchmark are measured: by the labels of their steps or, where candidates of a question
are known to be right or wrong, by the candidate that the scores rank first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.aggregates import AGGREGATES
from .metrics import best_of_n_metrics, step_metrics
from .tables import measure_rows, table_rows


Record = dict[str, Any]  # a line of scores.jsonl

GOOD_VERDICTS = ("found", "clean", "correct")


@dataclass(frozen=True)
class Task:
    """
    How items are measured, and how tables and page show it.

    Args:
        labelled (`bool`):
            Whether steps have labels; if so, there is a threshold, and two models can be compared step by step.
        measure (`Callable`):
            `(records, threshold, **kwargs) -> metrics`.
        summary (`Callable`):
            Says from the metrics, in words, what was measured.
        tables (`tuple[Callable, ...]`):
            Each makes a table of the result from the metrics.
        source_columns (`tuple[tuple[str, str], ...]`):
            Heading and key of each column in the page's table of sources; the first share is drawn as a bar.
        card_of (`str`):
            The key of a record by which the page groups records into cards.
        misjudged (`Callable`):
            Maps `(records of a card, threshold)` to how it is judged: whether the verdict is wrong, the share of wrong
            judgments, the mean distance of the scores from the truth. The largest is the worst.
        verdict (`Callable`):
            Maps `(record, labelled steps below the threshold)` to a verdict, a key of the page's `VERDICTS`.
    """

    labelled: bool
    measure: Callable[..., dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]
    tables: tuple[Callable[[dict[str, Any]], list[list[str]]], ...]
    source_columns: tuple[tuple[str, str], ...]
    card_of: str
    misjudged: Callable[[Sequence[Record], float | None], tuple[bool, float, float]]
    verdict: Callable[[Record, list[int]], str]


def task_of(records: Sequence[Record]) -> Task:
    """The task that records belong to; only those of best-of-N say whether an answer is correct."""
    return BEST_OF_N if all("correct" in record for record in records) else STEP_CORRECTNESS


# ---- labels of steps


def _measure_steps(records: Sequence[Record], threshold: float | str, **kwargs: Any) -> dict[str, Any]:
    scored = [record for record in records if record["scores"] is not None]
    columns = ([record[key] for record in scored] for key in ("labels", "scores", "source", "group"))
    return step_metrics(*columns, threshold=threshold, **kwargs)


def _misjudged_solution(records: Sequence[Record], threshold: float) -> tuple[bool, float, float]:
    """
    Whether the first error is missed or seen elsewhere, the share of labelled steps on the wrong side of the threshold,
    and the mean distance of scores from labels.
    """
    (record,) = records
    pairs = [(label, score) for label, score in zip(record["labels"], record["scores"], strict=True) if label != 0]
    steps = enumerate(zip(record["labels"], record["scores"], strict=True))
    below = [index for index, (label, score) in steps if label != 0 and score < threshold]
    wrong = [misjudged_step(label, score, threshold) is not None for label, score in pairs]
    distances = [abs((label == 1) - score) for label, score in pairs]
    share, distance = (sum(wrong) / len(pairs), sum(distances) / len(pairs)) if pairs else (0.0, 0.0)
    return _verdict_on_steps(record, below) not in GOOD_VERDICTS, share, distance


def misjudged_step(label: int, score: float, threshold: float | None) -> str | None:
    """
    Say in what way a step is judged wrongly: `missed` or `false alarm`; `None` if it is not, or cannot be.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.tasks import misjudged_step
    >>> [misjudged_step(label, score, 0.5) for label, score in ((1, 0.9), (1, 0.2), (-1, 0.9), (0, 0.2))]
    [None, 'false alarm', 'missed', None]

    ```
    """
    if threshold is None or label == 0 or (label == 1) == (score >= threshold):
        return None
    return "false alarm" if label == 1 else "missed"


def _verdict_on_steps(record: Record, below: list[int]) -> str:
    if -1 not in record["labels"]:
        return "false" if below else "clean"
    if not below:
        return "missed"
    return "found" if below[0] == record["labels"].index(-1) else "other"


STEP_CORRECTNESS = Task(
    labelled=True,
    measure=_measure_steps,
    summary=lambda metrics: f"{metrics['n_solutions']:,} solutions, {metrics['n_steps']:,} labelled steps",
    tables=(table_rows, measure_rows),
    source_columns=(
        ("solutions", "n_solutions"),
        ("steps", "n_steps"),
        ("incorrect", "n_incorrect"),
        ("macro-F1", "macro_f1"),
        ("F1 correct", "f1_correct"),
        ("F1 incorrect", "f1_incorrect"),
        ("AUC", "auc"),
        ("first error", "first_error_accuracy"),
    ),
    card_of="id",
    misjudged=_misjudged_solution,
    verdict=_verdict_on_steps,
)


# ---- candidates that are right or wrong


def _measure_choice(records: Sequence[Record], threshold: float | str, **kwargs: Any) -> dict[str, Any]:
    """Measure the questions whose candidates all have scores, since the best is unknown otherwise. No threshold applies."""
    failed = {record["group"] for record in records if record["scores"] is None}
    whole = [record for record in records if record["group"] not in failed]
    columns = ([record[key] for record in whole] for key in ("correct", "scores", "group", "source"))
    return best_of_n_metrics(*columns, **kwargs)


def _misjudged_choice(records: Sequence[Record], threshold: None) -> tuple[bool, float, float]:
    """Whether a wrong answer is ranked above a correct one, and the mean distance of mean scores from the truth."""
    means = [AGGREGATES["mean"](record["scores"]) for record in records]
    correct = [record["correct"] for record in records]
    wrong = any(correct) and not correct[means.index(max(means))]
    return wrong, float(wrong), sum(abs(mean - right) for mean, right in zip(means, correct, strict=True)) / len(means)


def _candidates(metrics: dict[str, Any]) -> str:
    fewest, most = metrics["n_candidates"]
    return f"{metrics['n_questions']:,} questions with {most if fewest == most else f'{fewest} to {most}'} candidates each"


BEST_OF_N = Task(
    labelled=False,
    measure=_measure_choice,
    summary=_candidates,
    tables=(measure_rows,),
    source_columns=(
        ("questions", "n_questions"),
        ("by mean", "accuracy_mean"),
        ("by min", "accuracy_min"),
        ("by product", "accuracy_product"),
        ("by last", "accuracy_last"),
        ("blind", "pass_at_1"),
        ("perfect", "pass_at_n"),
    ),
    card_of="group",
    misjudged=_misjudged_choice,
    verdict=lambda record, below: "correct" if record["correct"] else "wrong",
)
