"""
Write a page that shows what a selection kept: a self-contained HTML file without scripts that loads nothing.

It is made of the report of `trl-mprm select` (the content of `selection.json`), the numbers of rollouts of each kind that
were read and kept (the summaries of the passes), and a few rollouts to read:

    {"rule": "bis", "fraction": 0.1, "total": {"read": 8000, "kept": 798, ...}, "sources": {"Geometry3K": {...}}}
    4,083 rollouts of 5 steps, 5 positive, sum 5.0, of them 310 kept; 12 of 4 steps, 2 positive, sum 1.5, all kept; ...
    {"rollout_id": "Geometry3K:0", "prompt": "Find x.", "completions": ["x = 5."], "mc_scores": [0.125], ...}

The page shows the distribution of BIS; mixture p_pos (1 - p_pos) against reliability R, the kept region shaded; the
share of mixed rollouts before and after, the cut and its ties by source; kept and dropped rollouts with their pictures
and their steps coloured by Monte Carlo score. Charts are inline SVG, each in a wide version and in one for phones. The
scatter is a histogram of at most 520 cells, so ten million rollouts make no larger page than ten.
"""

import os
from math import log, log10
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.formats import parse, to_row
from ..data.hub import public_name
from ..data.images import ImageFinder, find_images
from ..data.rows import Refused, image_list, own_text
from ..data.shards import Shard, lines_at
from ..pages import colour, render_page, thumbnail
from ..text import plain
from .bis import score_of_sums
from .engine import LocalRun
from .report import all_wrong_warning
from .rules import rule_of_report
from .summary import Scores, Summary, reason_of_kinds
from .threshold import Cut, kept_rows


class Size(NamedTuple):
    """The size of both charts in SVG units, and the most labels on an axis."""

    name: str
    width: int
    histogram_height: int
    region_height: int
    left: int  # room for the labels of the vertical axis
    labels: int


# The text of a chart has the same size in both, and a phone shows 350 units at about their size.
SIZES = (Size("on-wide", 780, 220, 400, 72, 12), Size("on-narrow", 270, 170, 260, 66, 5))

BINS, MIXTURE_CELLS, RELIABILITY_CELLS = 60, 26, 20

# Limits for a corpus with many sources, and for a long rollout.
N_EXAMPLES, MAX_SOURCES, MAX_PROMPT, MAX_STEPS, MAX_STEP, MAX_IMAGES = 10, 100, 400, 10, 300, 2

THUMBNAIL = 160  # pixels on the longer side


def draw_selection_report(report: dict, valid: Summary, kept: Summary, cut: Cut, run: LocalRun) -> str:
    """
    Write the page of a selection while the scores of its shards are in memory.

    The rollouts to read are drawn with the seed of the selection, so they are the same for every engine and any number
    of shards.
    """
    counts = run.map(bis_counts, cut)
    wanted, order = {}, {"kept": [], "dropped": []}
    for name, drawn in order.items():
        values, numbers = zip(*(shard[name] for shard in counts), strict=True)
        for shard, *which in draw(values, numbers, N_EXAMPLES, report["seed"]):
            wanted.setdefault(shard, []).append((name, *which))
            drawn.append((shard, len(wanted[shard]) - 1))
    rows = run.map(read_examples, cut, wanted, run.image_root)
    examples = {name: [rows[shard][number] for shard, number in drawn] for name, drawn in order.items()}
    return render_selection_report(report, valid, kept, examples, cut.spec.alpha, cut.check_images)


def render_selection_report(
    report: dict,
    valid: Summary,
    kept: Summary,
    examples: dict[str, list[dict]],
    alpha: float,
    check_images: bool = True,
) -> str:
    """
    Render the page as text.

    Args:
        report (`dict`):
            The report of a selection.
        valid, kept ([`~trl_mprm.selection.summary.Summary`]):
            Summaries of the rollouts that were read, and of those that were kept.
        examples (`dict`):
            Rows to show as `kept` and as `dropped`, see [`read_examples`].
        alpha (`float`):
            The paper's alpha, for the distribution of BIS (the report of a rule other than `bis` has none).
        check_images (`bool`, *optional*, defaults to `True`):
            Whether rows were refused for missing images.

    Examples:
    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from trl_mprm.selection.summary import KIND, Summary
    >>> from trl_mprm.selection.datasets import select
    >>> from trl_mprm.selection.page import render_selection_report
    >>> rows = {"rollout_id": ["a", "b", "c"], "source": ["x"] * 3, "mc_scores": [[1.0, 1.0], [1.0, 1.0], [0.75, 0.0]]}
    >>> report = select(Dataset.from_dict(rows), "bis", fraction=0.4, alpha=0.2).report
    >>> kinds = np.array([(0, -1, -1, 2, 1, 0.75), (0, -1, -1, 2, 2, 2.0)], KIND)
    >>> valid, kept = Summary(("x",), kinds, np.array([1, 2])), Summary(("x",), kinds[:1], np.array([1]))
    >>> page = render_selection_report(report, valid, kept, {"kept": [], "dropped": []}, alpha=0.2)
    >>> "<title>1 of 3 rollouts kept by bis</title>" in page, "//" in page
    (True, False)

    ```
    """
    columns = [_kinds(some, alpha, check_images) for some in (valid, kept)]
    sources = _largest_sources(report)
    return render_page(
        "selection_report.html",
        report=report,
        rule=rule_of_report(report),
        total=report["total"],
        inputs=[public_name(item) for item in report["inputs"]],
        warning=all_wrong_warning(report),
        alpha=alpha,
        charts=[_charts(size, columns, report, alpha) for size in SIZES],
        cuts=_cuts(sources) if rule_of_report(report).of_bis else [],
        sources=sources,
        examples={name: [_example(row) for row in rows] for name, rows in examples.items()},
    )


def _kinds(summary: Summary, alpha: float, check_images: bool) -> dict[str, np.ndarray]:
    usable = reason_of_kinds(summary.kinds, check_images) < 0
    kinds = summary.kinds[usable]
    columns = score_of_sums(*(kinds[name].astype(float) for name in ("n_steps", "n_pos", "mc_sum")), alpha)
    return columns | {"count": summary.count[usable].astype(np.int64)}


# ---- rollouts to read


def draw(bis: list[np.ndarray], count: list[np.ndarray], n: int, seed: int = 0) -> list[tuple[int, float, int]]:
    """
    Draw `n` rollouts from the highest BIS to the lowest: one at random from each of `n` equal shares.

    Args:
        bis (`list` of `np.ndarray`):
            The different values of BIS in each shard, in corpus order.
        count (`list` of `np.ndarray`):
            How many rollouts have each of these values.

    Returns:
        `list` of `(shard, bis, k)`: the k-th rollout, from 0, of that shard with that value. How the corpus was divided
        into shards makes no difference.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.selection.page import draw
    >>> draw([np.array([0.05, 0.25]), np.array([0.05])], [np.array([1, 1]), np.array([1])], n=3)
    [(0, 0.25, 0), (0, 0.05, 0), (1, 0.05, 0)]

    ```
    """
    shard = np.repeat(np.arange(len(bis)), [len(values) for values in bis])
    bis, ends = np.concatenate(bis), np.concatenate(count)
    order = np.lexsort((shard, -bis))
    starts = np.concatenate([[0], np.cumsum(ends[order])])
    total, rng = int(starts[-1]), np.random.default_rng(seed)
    n = min(n, total)
    ranks = [int(rng.integers(total * share // n, total * (share + 1) // n)) for share in range(n)]
    drawn = np.searchsorted(starts, ranks, side="right") - 1
    return [
        (int(shard[order[index]]), float(bis[order[index]]), rank - int(starts[index]))
        for rank, index in zip(ranks, drawn, strict=True)
    ]


def bis_counts(shard: Shard, scores: Scores, cut: Cut) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The distinct values of BIS among the kept and the dropped rollouts of a shard, and the count of each."""
    bis, rows = _bis_of_lines(scores, cut)
    return {name: np.unique(bis[lines], return_counts=True) for name, lines in rows.items()}


def read_examples(
    shard: Shard,
    scores: Scores,
    cut: Cut,
    wanted: dict[int, list[tuple[str, float, int]]],
    image_root: str | os.PathLike | None,
) -> list[dict]:
    """Read the wanted rows of a shard: `(name, bis, k)` is the k-th `kept` or `dropped` rollout with that BIS."""
    if shard.index not in wanted:
        return []
    bis, rows = _bis_of_lines(scores, cut)
    numbers = [int(rows[name][bis[rows[name]] == value][k]) for name, value, k in wanted[shard.index]]
    ordered = np.unique(numbers)
    lines = (line for line, _ in lines_at(shard, ordered, scores.length))
    lines = dict(zip(ordered.tolist(), lines, strict=True))
    finder = ImageFinder(Path(shard.file).parent if image_root is None else image_root)
    return [_read(scores, cut, number, lines[number], finder) for number in numbers]


def _bis_of_lines(scores: Scores, cut: Cut) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """BIS of each line of a shard, NaN where it has none, and the numbers of its kept and dropped lines."""
    sums = (scores.kinds[name].astype(float) for name in ("n_steps", "n_pos", "mc_sum"))
    usable = reason_of_kinds(scores.kinds, cut.check_images) < 0
    bis = np.append(np.where(usable, score_of_sums(*sums, cut.spec.alpha)["bis"], np.nan), np.nan)[scores.kind]
    kept = kept_rows(scores, cut)
    return bis, {"kept": kept, "dropped": np.setdiff1d(np.flatnonzero(~np.isnan(bis)), kept)}


def _read(scores: Scores, cut: Cut, number: int, line: bytes, finder: ImageFinder) -> dict:
    kind, record = scores.kinds[scores.kind[number]], parse(line)
    columns = score_of_sums(*(float(kind[name]) for name in ("n_steps", "n_pos", "mc_sum")), cut.spec.alpha)
    return {
        "rollout_id": own_text(record, "rollout_id") or f"{scores.source}:{cut.first_line[scores.shard] + number}",
        "n_images": len(image_list(record)),
        "thumbnails": _thumbnails(record, finder) if cut.check_images else [],
        **to_row(record, scores.drop_answer_step),
        **{name: float(value) for name, value in columns.items()},
    }


def _thumbnails(record: dict, finder: ImageFinder) -> list[dict | None]:
    try:
        images = find_images(record, finder)
    except Refused:  # the file was there when the row was scored
        return []
    return [thumbnail(image, THUMBNAIL) for image in images[:MAX_IMAGES]]


# ---- geometry: numbers in, coordinates of the SVG out


def _charts(size: Size, columns: list[dict[str, np.ndarray]], report: dict, alpha: float) -> dict:
    return {
        "size": size,
        "histogram": _bis_histogram(*columns, alpha, size),
        "cells": _mixture_cells(*columns, size),
        "region": _kept_region(report, alpha, size),
    }


def _log_height(count: float, top: float, height: float) -> float:
    """Height of a bar on a logarithmic scale, on which 1 stays visible beside 1,000,000; 0 has no height."""
    return height * log(1 + count) / log(1 + top)


def _bis_histogram(valid: dict[str, np.ndarray], kept: dict[str, np.ndarray], alpha: float, size: Size) -> dict:
    height = size.histogram_height
    highest = 0.25 + alpha  # (p (1 - p) + alpha) R is largest at p = 1/2, R = 1
    edges = np.linspace(0, highest, BINS + 1)
    counts, counts_kept = (
        np.histogram(part["bis"], edges, weights=part["count"])[0].astype(int) for part in (valid, kept)
    )
    top, step = max(int(counts.max()), 1), size.width / BINS
    bars = [
        {
            "x": round(index * step, 2),
            "width": round(0.85 * step, 2),
            "height": round(_log_height(counts[index], top, height), 2),
            "height_kept": round(_log_height(counts_kept[index], top, height), 2),
            "title": f"BIS {edges[index]:.3f} to {edges[index + 1]:.3f}: {counts[index]:,} rollouts, "
            f"{counts_kept[index]:,} kept",
        }
        for index in np.flatnonzero(counts)
    ]
    spacing = next(step for step in (0.05, 0.1, 0.25, 0.5, 1.0, highest) if highest / step <= size.labels)
    return {
        "bars": bars,
        "ticks_x": [(round(x / highest * size.width, 2), f"{x:.4g}") for x in np.arange(0, highest + 1e-9, spacing)],
        "ticks_y": [
            (round(height - _log_height(10**power, top, height), 2), f"{10**power:,}")
            for power in range(int(log10(top)) + 1)
        ],
    }


def _mixture_cells(valid: dict[str, np.ndarray], kept: dict[str, np.ndarray], size: Size) -> list[dict]:
    edges = np.linspace(0, 0.25, MIXTURE_CELLS + 1), np.linspace(0, 1, RELIABILITY_CELLS + 1)
    counts, counts_kept = (
        np.histogram2d(
            part["bis_p_pos"] * (1 - part["bis_p_pos"]), part["bis_reliability"], edges, weights=part["count"]
        )[0].astype(int)
        for part in (valid, kept)
    )
    step_x, step_y = size.width / MIXTURE_CELLS, size.region_height / RELIABILITY_CELLS
    top = max(int(counts.max(initial=0)), 2)
    cells = []
    for column, row in zip(*np.nonzero(counts), strict=True):
        count, n_kept = int(counts[column, row]), int(counts_kept[column, row])
        side = (0.3 + 0.66 * log(count) / log(top)) * step_y  # side by the count, on a log scale
        cells.append(
            {
                "x": round((column + 0.5) * step_x - side / 2, 1),
                "y": round(size.region_height - (row + 0.5) * step_y - side / 2, 1),
                "side": round(side, 1),
                "share": round(100 * n_kept / count),
                "title": f"mixture {edges[0][column]:.3f} to {edges[0][column + 1]:.3f}, R {edges[1][row]:.2f} to "
                f"{edges[1][row + 1]:.2f}: {count:,} rollouts, {n_kept:,} kept",
            }
        )
    return cells


def _kept_region(report: dict, alpha: float, size: Size) -> list[str]:
    """Paths of the regions above the lowest and the highest cut of the sources; empty for a rule without such a cut."""
    cuts, lowest_reliability = _cuts(report["sources"]), rule_of_report(report).lowest_reliability
    if not cuts or lowest_reliability is None:
        return []
    mixture = np.linspace(0, 0.25, 101)
    paths = []
    for cut in sorted({cuts[0], cuts[-1]}):
        lowest = lowest_reliability(mixture, cut, alpha)
        points = [*zip(mixture, lowest, strict=True), (0.25, 1), (0, 1)]
        paths.append(
            "M" + "L".join(f"{m / 0.25 * size.width:.1f} {(1 - r) * size.region_height:.1f}" for m, r in points) + "Z"
        )
    return paths


def _cuts(sources: dict[str, dict]) -> list[float]:
    return sorted({row["cut_score"] for row in sources.values() if row["cut_score"] is not None})


def _largest_sources(report: dict) -> dict[str, dict]:
    sources = sorted(report["sources"].items(), key=lambda item: -item[1]["read"])[:MAX_SOURCES]
    return dict(sorted(sources))


# ---- text of the page


def _example(row: dict) -> dict:
    scores, steps = row["mc_scores"], row["completions"]
    return row | {
        "prompt": plain(row["prompt"], MAX_PROMPT),
        "steps": [
            {"text": plain(text, MAX_STEP), "score": score, "colour": None if score is None else colour(score)}
            for text, score in list(zip(steps, scores, strict=True))[:MAX_STEPS]
        ],
        "more_steps": max(0, len(steps) - MAX_STEPS),
    }
