"""
Make Table 1 of the paper (arXiv 2602.04145) for any corpus: the subsets that the rules would keep, side by side.

The input is annotated rollouts, as [`~trl_mprm.load_rollouts`] takes them. The output is a few figures of the full data
and of the subset of each rule, e.g. for the paper's corpus at a fraction of 25%:

    {"rollouts": 565096, "steps": 3174394, "steps_per_rollout": 5.62, "words_per_step": 27.8, "error_step_share": 0.0357,
     "mean_mc": 0.8566, "mixed_share": 0.0767, "all_wrong_share": ..., "mean_group_size": ...}

The corpus is read once; every rule is applied to the few bytes that are kept per rollout. No text is kept.
"""

import os

import numpy as np

from ..data.formats import READ_KEYS, parse
from ..data.shards import Paths, Shard, line_batches, plan_shards
from ..data.splits import local_inputs
from .bis import ALPHA
from .engine import find_engine
from .report import describe
from .rules import COLUMN_RULES, STEP_RULES, CutSpec, column_to_cut_by
from .summary import Scores, Summary, merge, reason_of_kinds, summarize
from .threshold import Cut, find_cut, kept_rows, settle


# The rows of the paper's Table 1 and two more: their keys in the result of `compare_rules`, and their number formats.
METRICS = {
    "rollouts": ("rollouts", ","),
    "reasoning steps": ("steps", ","),
    "steps per rollout": ("steps_per_rollout", ".2f"),
    "words per step": ("words_per_step", ".1f"),
    "error-step ratio": ("error_step_share", ".2%"),
    "mean MC score per step": ("mean_mc", ".4f"),
    "mixed rollouts": ("mixed_share", ".2%"),
    "all-wrong rollouts": ("all_wrong_share", ".2%"),
    "rollouts per group": ("mean_group_size", ".2f"),
}


def compare_rules(
    inputs: Paths,
    *,
    fraction: float,
    alpha: float = ALPHA,
    ties: str = "first",
    seed: int = 0,
    by: str = "source",
    image_root: str | os.PathLike | None = None,
    drop_answer_step: bool = False,
    engine: str = "local",
    split: str = "train",
) -> dict[str, dict]:
    """
    Describe the full data and the subset of each rule that needs step scores alone.

    The arguments are those of [`~trl_mprm.selection.files.select_files`], and each rule keeps the same rollouts as there.

    Returns:
        `dict`: maps `full data` and the name of each rule to the figures that [`comparison_table`] shows: `rollouts`,
        `steps` (measured ones), `steps_per_rollout`, `words_per_step`, `error_step_share` (steps with a Monte Carlo
        score of 0), `mean_mc` (per step), `mixed_share` (rollouts with good and bad steps), `all_wrong_share` (rollouts
        without a positive step), `mean_group_size` (rollouts that share an image and a question).

    Examples:
    ```python
    >>> import json, pathlib, tempfile
    >>> from trl_mprm.selection.comparison import compare_rules
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "toy.jsonl"
    >>> rows = [{"prompt": "?", "completions": ["one two", "three"], "labels": labels} for labels in ([1, 1], [0.5, 0])]
    >>> _ = file.write_text("".join(json.dumps(row) + "\\n" for row in rows))
    >>> table = compare_rules(file, fraction=0.5, alpha=0.2)
    >>> table["full data"]["mixed_share"], table["bis"]["mixed_share"], table["reliable"]["mixed_share"]
    (0.5, 1.0, 0.0)

    ```
    """
    parameters = {"fraction": fraction, "alpha": alpha, "ties": ties, "seed": seed, "by": column_to_cut_by(by)}
    shards, table = plan_shards(local_inputs(inputs, split)), {}
    # The corpus is read once for all rules that need the steps alone, and once per rule whose column the rows have.
    readings = [[CutSpec(rule, **parameters) for rule in STEP_RULES]]
    readings += [[CutSpec(rule, **parameters)] for rule in COLUMN_RULES if _has_column(shards, rule)]
    for specs in readings:
        with find_engine(engine)(shards, image_root, drop_answer_step, words=True, spec=specs[0]) as run:
            summary = merge(run.summaries())
            for spec in specs:
                cut = find_cut(summary, spec, images_required=image_root is not None)
                if not cut.valid.any():
                    raise ValueError(f"{inputs}: no row can be used: select without --compare says why")
                while not cut.settled:
                    cut = settle(cut, run.ties(cut))
                kept, words, all_words = zip(*run.map(_kept, cut), strict=True)
                table.setdefault("full data", _describe(summary, cut, sum(all_words)))
                table[spec.rule] = _describe(merge(kept), cut, sum(words))
    return table


def _has_column(shards: list[Shard], name: str) -> bool:
    """Return whether the first row has a field."""
    lines = (line for _, lines in line_batches(shards[0], {*READ_KEYS, name}) for line in lines if line.strip())
    return (parse(next(lines, b"")) or {}).get(name) is not None


def comparison_table(table: dict[str, dict]) -> list[list]:
    """Format the result of [`compare_rules`] as table rows, header first, with a column per rule, as in the paper."""
    header = ["", *table]
    return [
        header,
        *([label, *(f"{row[key]:{style}}" for row in table.values())] for label, (key, style) in METRICS.items()),
    ]


def _kept(shard: Shard, scores: Scores, cut: Cut) -> tuple[Summary, int, int]:
    """Return for a shard the summary of the kept rows, the words in their steps, and the words in all usable rows."""
    rows = kept_rows(scores, cut)
    usable = np.append(reason_of_kinds(scores.kinds, cut.check_images) < 0, False)[scores.kind]
    return summarize(scores, rows), *(int(scores.words[some].sum(dtype=np.int64)) for some in (rows, usable))


def _describe(summary: Summary, cut: Cut, words: int) -> dict:
    numbers = describe(summary, cut.check_images)
    rollouts, steps = numbers.pop("n"), numbers.pop("n_steps")
    counts = {
        "rollouts": rollouts,
        "steps": steps,
        "steps_per_rollout": steps / rollouts,
        "words_per_step": words / steps,
        "all_wrong_share": numbers.pop("all_wrong") / rollouts,
    }
    return counts | numbers
