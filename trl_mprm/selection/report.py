"""The evidence of a selection: its report, messages and tables made from it, and finding the report of given rows."""

import math
import os
from bisect import bisect_left
from pathlib import Path

import numpy as np

from ..data.evidence import content_hash, read_report, report_path, reports_beside
from ..data.hub import hub_snapshot, is_hub_id
from ..data.shards import input_files
from ..text import one_line
from .rules import rule_of_report, score_of_kinds
from .summary import REASONS, UNKNOWN, Summary, reason_of_kinds
from .threshold import Cut


SELECTION_VERSION = "3"

FACTS = ("all_wrong", "mixed_share", "error_step_share", "mean_mc", "mean_group_size")

# A selection warns if the share of kept rows without a positive step is above this.
MANY_ALL_WRONG = 0.1


# ---- evidence


def describe_refused(summary: Summary, cut: Cut) -> list[str]:
    """Write one line per reason: how many rows were refused, from which sources, and the place of the first."""
    reasons = reason_of_kinds(summary.kinds, cut.check_images)
    first: dict[int, tuple[int, int]] = {}
    for (reason, unread), line in summary.first.items():
        number = reason if cut.check_images else unread
        first[number] = min(line, first.get(number, line))
    lines = []
    for reason, (shard, line) in sorted(first.items(), key=lambda item: item[1]):
        if reason >= 0:
            mine = reasons == reason
            count = np.bincount(summary.kinds["source"][mine], summary.count[mine], len(summary.sources)).astype(int)
            sources = ", ".join(f"{name} {n:,}" for name, n in zip(summary.sources, count, strict=True) if n)
            where = f"{summary.lines[shard][0]}:{cut.first_line[shard] + line + 1}"
            lines.append(
                one_line(f"{REASONS[reason]}: refused {count.sum():,} rows ({sources}), the first at {where}")
            )
    return lines


def ties_of_sources(summary: Summary, cut: Cut) -> np.ndarray:
    """Count the rows of each source whose score is exactly the cut of their stratum."""
    kinds = summary.kinds
    score = score_of_kinds(cut.spec, kinds, summary.value)
    at = score == cut.cut_score[cut.stratum[kinds["source"]]]
    at &= reason_of_kinds(kinds, cut.check_images) < 0
    return np.bincount(kinds["source"][at], summary.count[at], len(cut.sources)).astype(np.int64)


def describe(summary: Summary, check_images: bool = True, source: str | None = None) -> dict[str, float | None]:
    """
    Count the usable rows of a summary, all or those of one source.

    Returns:
        `dict`: `n` rows, their `n_steps`, and (None where there is nothing to count or divide by) `all_wrong`, the
        number of rows without a positive step, `mixed_share`, `error_step_share`, `mean_mc`, and `mean_group_size`, the
        mean number of rows that share an image and a question.
    """
    kinds, count = summary.kinds, summary.count
    if source is not None:  # sources are sorted, and so are kinds, by source first
        number = bisect_left(summary.sources, source)
        mine = slice(*np.searchsorted(kinds["source"], [number, number + 1]))
        kinds, count = kinds[mine], count[mine]
    rows = reason_of_kinds(kinds, check_images) < 0
    kinds, count = kinds[rows], count[rows].astype(np.int64)
    n_steps, n_pos = kinds["n_steps"].astype(np.int64), kinds["n_pos"].astype(np.int64)
    n, steps = int(count.sum()), int((count * n_steps).sum())
    numbers = {"n": n, "n_steps": steps} | dict.fromkeys(FACTS)
    if n and not (kinds["mc_sum"] == UNKNOWN).any():
        numbers["all_wrong"] = int(count[n_pos == 0].sum())
        numbers["mixed_share"] = int(count[(n_pos > 0) & (n_pos < n_steps)].sum()) / n
        numbers["error_step_share"] = 1 - int((count * n_pos).sum()) / max(steps, 1)
        numbers["mean_mc"] = math.fsum(count * kinds["mc_sum"]) / max(steps, 1)  # exact, so independent of order
    names = summary.sources if source is None else [source]
    # A row without images counts as having found all of them.
    found = [len(summary.groups.get((name, seen), ())) for name in names for seen in {True, check_images}]
    if n:
        numbers["mean_group_size"] = n / max(sum(found) * 2**summary.halved, 1)
    return numbers


def all_wrong_warning(report: dict) -> str | None:
    """Return a one-line warning if many of the kept rows have no positive step, else None."""
    n, kept = report["total"]["all_wrong"], report["total"]["kept"]
    if n is None or n <= MANY_ALL_WRONG * kept:
        return None
    line = f"{n:,} of {kept:,} kept rollouts ({n / kept:.0%}) have no positive step"
    if rule_of_report(report).of_bis:
        line += ": the paper sets R = 1 for these, so that they tie with the perfect ones at alpha"
    return f"{line}; a smaller fraction, or the rule mixed, keeps fewer"


def report_table(report: dict) -> list[list]:
    """
    Format the report of a selection as table rows, header first, `total` last, cut down to fit a terminal of 100 columns.
    """
    table = [["source", "read", "refused", "valid", "kept", "cut", "mixed", "errors", "all wrong"]]
    for source, row in [*report["sources"].items(), ("total", report["total"])]:
        shares = [None if row[name] is None else f"{row[name]:.1%}" for name in ("mixed_share", "error_step_share")]
        counts = [row["read"], sum(row["refused"].values()), row["valid"], row["kept"]]
        table.append([source, *counts, row["cut_score"], *shares, row["all_wrong"]])
    return table


def build_report(cut: Cut, summary: Summary, kept: Summary) -> dict:
    """
    Build the content of `selection.json`. For each source and in total, read = kept + dropped + refused.

    Args:
        cut ([`~trl_mprm.selection.threshold.Cut`]):
            The settled cut.
        summary, kept ([`~trl_mprm.selection.summary.Summary`]):
            Summaries of all rows that were read, and of those that were written.
    """
    kinds, count = summary.kinds, summary.count.astype(np.int64)
    reason = reason_of_kinds(kinds, cut.check_images)
    ends = np.searchsorted(kinds["source"], np.arange(len(cut.sources) + 1))
    ties, ties_kept = ties_of_sources(summary, cut), ties_of_sources(kept, cut)
    rows, whole = {}, cut.spec.by is None  # else each source has a cut of its own
    for number, source in [*enumerate(cut.sources), (None, None)]:
        mine, at = (slice(None),) * 2 if source is None else (slice(*ends[number : number + 2]), [number])
        by_reason = np.bincount(reason[mine] + 1, count[mine], len(REASONS) + 1).astype(int).tolist()
        valid, refused = by_reason[0], {name: n for name, n in zip(REASONS, by_reason[1:], strict=True) if n}
        after, before = (describe(some, cut.check_images, source) for some in (kept, summary))
        rows[source] = {
            "read": sum(by_reason),
            "refused": refused,
            "valid": valid,
            "kept": after["n"],
            "dropped": valid - after["n"],
            "cut_score": float(cut.cut_score[cut.stratum[at]][0]) if valid and (source is not None or whole) else None,
            "ties_at_cut": int(ties[at].sum()),
            "ties_kept": int(ties_kept[at].sum()),
            **{name: after[name] for name in FACTS},
            "before": {name: before[name] for name in FACTS},
        }
    total = rows.pop(None)
    _check_quotas(cut, [row["valid"] for row in rows.values()], [row["kept"] for row in rows.values()])
    groups = "all" if not summary.halved else f"1 in {2**summary.halved}, by hash"
    report = {**cut.spec.facts(), "version": SELECTION_VERSION, "inputs": [], "groups_counted": groups}
    return report | {"sources": rows, "total": total}


def _check_quotas(cut: Cut, valid: list[int], kept: list[int]) -> None:
    """Raise unless exactly the rows that the cut asks for were written; anything else is a bug."""
    quotas = [max(1, int(m * cut.spec.fraction)) if m else 0 for m in cut.valid.tolist()]
    found = [np.bincount(cut.stratum, rows, len(quotas)).astype(int).tolist() for rows in (valid, kept)]
    if found != [cut.valid.tolist(), quotas]:
        raise RuntimeError(f"{cut.valid.tolist()} valid rows should give {quotas}, got {found[0]} and {found[1]}")


# ---- the report of given rows


def find_report(dataset: str | os.PathLike, n_rows: int) -> tuple[dict | None, str]:
    """
    Find the report of exactly these rows, for the card of a model trained on them, or say why none applies.

    Args:
        dataset (`str` or path):
            Source of the rows: a file, a folder (also one written by `save_to_disk`), or a dataset on the Hub.
        n_rows (`int`):
            Number of rows that were read.

    Returns:
        `(report, "")` if each file is in the report and has the content that the selection wrote, and all its rows were
        read (for a dataset on the Hub the commit stands for the content); else `(None, why)`.

    Raises:
        `ValueError`: the file with the name of a report is not a report.

    Examples:
    ```python
    >>> import json, pathlib, tempfile
    >>> from trl_mprm.selection import select_files
    >>> from trl_mprm.selection.report import find_report
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> row = {"prompt": "?", "completions": ["a"], "labels": [1]}
    >>> _ = (folder / "raw.jsonl").write_text(json.dumps(row) + "\\n")
    >>> report = select_files(folder / "raw.jsonl", folder / "a.jsonl", fraction=1.0)
    >>> find_report(folder / "a.jsonl", n_rows=1)[0] == report
    True
    >>> _ = (folder / "a.jsonl").write_text(json.dumps(row | {"labels": [0]}) + "\\n")
    >>> find_report(folder / "a.jsonl", n_rows=1)[1].split("/")[-1]
    'a.selection.json: a.jsonl changed after the selection'

    ```
    """
    if is_hub_id(dataset):
        path = hub_snapshot(dataset, "selection.json") / "selection.json"
        if not path.is_file():
            return None, f"{dataset} has no selection.json"
        report = read_report(path)
        why = _why_not(report, [], n_rows)
        return (None, f"selection.json of {dataset}: {why}") if why else (report, "")
    path = Path(dataset)
    files = _files_of_rows(path)
    reports = [path / "selection.json", *map(report_path, files[:1] if len(files) == 1 else [])]
    reports = [file for file in reports if file.is_file()] if path.is_dir() else reports_beside(path)
    whys = []
    for file in reports:
        report = read_report(file)
        why = _why_not(report, files, n_rows)
        if not why:
            return report, ""
        whys.append(f"{file}: {why}")
    return None, "; ".join(whys) or f"{dataset}: no report of a selection beside these rows"


def _files_of_rows(path: Path) -> list[Path]:
    if (path / "state.json").is_file():
        return sorted(path.glob("*.arrow"))
    try:
        return input_files(path)
    except FileNotFoundError:  # rows in subfolders, such as those of splits, for which select writes no report
        return []


def _why_not(report: dict | None, files: list[Path], n_rows: int) -> str:
    if report is None:
        return "of an older version, without hashes"
    told, there = report["output"], {file.name for file in files}
    if files and there != set(told):
        missing, more = sorted(set(told) - there), sorted(there - set(told))
        return f"it also lists {missing[0]}" if missing else f"it does not list {more[0]}"
    for file in files:
        if content_hash(file)[0] != told[file.name]["xxh3_128"]:
            return f"{file.name} changed after the selection"
    kept = report["total"]["kept"]
    return "" if kept == n_rows else f"it counts {kept:,} rows, and {n_rows:,} were read"
