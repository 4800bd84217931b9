"""Write results as files for people to read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards.model_card import eval_results, eval_results_yaml
from ..files import atomic_output, write_json
from ..text import markdown
from .benchmarks import BENCHMARKS, Benchmark, BenchmarkEntry
from .page import evaluation_page
from .published_results import PublishedTable
from .records import check_comparable, compare_models, read_scores
from .tables import comparison_rows, percent


PROTOCOLS = {
    "fixed": "set beforehand (`fixed`)",
    "held_out": "tuned on other questions, five folds (`held_out`)",
    "oracle": "tuned on the same items that are measured (`oracle`), which makes the figures too high",
    None: "not stated by the source",
}


def write_report(
    folder: str | os.PathLike, benchmark: Benchmark, model_name: str, compare: str | os.PathLike | None = None
) -> list[Path]:
    """
    Write the report of an evaluation from the `results.json` and `scores.jsonl` in `folder`.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of [`evaluate_model`].
        benchmark ([`Benchmark`]):
            The benchmark.
        model_name (`str`):
            Name of the model: a Hub id, or the name of a local folder.
        compare (`str` or `os.PathLike`, *optional*):
            `scores.jsonl` of another model; the result of [`compare_models`] is added to the report and `results.json`.

    Returns:
        `list[Path]`: `results.md`, with tables beside the published rows in their own convention and `model-index`
        entries as front matter; `evaluation.html`, with single solutions and their step scores; and, for results on all
        records of a published dataset, `.eval_results/{benchmark}.yaml` for the model's repository on the Hub.
    """
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = read_scores(folder / "scores.jsonl")
    if compare is not None:
        check_comparable(benchmark, compare)
        tests = compare_models(folder / "scores.jsonl", compare, _protocol(results))
        results["comparison"] = {"other": Path(compare).parent.name or str(compare), "tests": tests}
        write_json(results, folder / "results.json")
    entries = eval_results(benchmark.hub_id, results, results["benchmark"]["title"])
    card = ModelCard(f"---\n{ModelCardData(model_name=model_name, eval_results=entries)}\n---\n")
    texts = {
        folder / "results.md": f"{card}{results_markdown(results, records, model_name)}",
        folder / "evaluation.html": evaluation_page(benchmark, records, results, model_name),
    }
    if benchmark.hub_id:
        texts[folder / ".eval_results" / f"{benchmark.name}.yaml"] = eval_results_yaml(benchmark.hub_id, results)
    for path, text in texts.items():
        with atomic_output(path) as part:
            part.write_text(text, encoding="utf-8")
    return list(texts)


def results_markdown(results: dict[str, Any], records: Sequence[dict[str, Any]], model_name: str) -> str:
    """
    Format results as Markdown beside the published rows, with one convention per table.

    Args:
        results (`dict`):
            Result of [`evaluate_model`].
        records (`Sequence[dict]`):
            Lines of `scores.jsonl`; beside a published table with a tuned threshold the model is measured likewise.
        model_name (`str`):
            Name of the model.
    """
    report = results["benchmark"]
    entry = BENCHMARKS[report["name"]]
    lines = [
        f"# {markdown(model_name)} on {report['title']}",
        "",
        f"{entry.task.summary(results)}, figures in percent.",
    ]
    if entry.task.labelled:
        lines[-1] += f" Threshold: {PROTOCOLS[results['threshold_protocol']]}."
    lines += ["", *_notes(report)]
    for table in entry.task.tables:
        lines += [*_markdown(table(results)), ""]
    if "comparison" in results:
        lines += [f"## Against {markdown(results['comparison']['other'])}", ""]
        lines += ["Paired bootstrap by question over the items that both scored.", ""]
        lines += [*_markdown(comparison_rows(results["comparison"]["tests"])), ""]
    if entry.published and report["hub_id"] is None:
        lines += [
            f"The published rows stand on the {entry.n_records:,} records of {entry.hub_id}, and this run read "
            f"{report['read']:,} records of other data: they do not compare, and none is shown.",
            "",
        ]
    else:
        for table in entry.published:
            lines += _beside(table, entry, results, records, model_name)
    return "\n".join(lines)


def _notes(report: dict[str, Any]) -> list[str]:
    notes = [f"{count} refused: {reason}" for reason, count in report["refused"].items()]
    notes += [f"{len(report['failed'])} not scored, for an error"] if report["failed"] else []
    notes += [f"{count:,} {quirk.replace('_', ' ')}" for quirk, count in report["quirks"].items()]
    return [f"About the benchmark: {'; '.join(notes)}.", ""] if notes else []


def _beside(
    table: PublishedTable,
    entry: BenchmarkEntry,
    results: dict[str, Any],
    records: Sequence[dict[str, Any]],
    model_name: str,
) -> list[str]:
    """A published table with an added row for this model, measured in the convention of the table."""
    threshold = table.threshold if table.threshold == "oracle" else _protocol(results)
    measured = entry.task.measure(records, threshold, n_resamples=0)
    own = {column: source["macro_f1"] for column, source in measured["sources"].items()}
    if entry.own_scores is not None:
        own = entry.own_scores(measured)
    figures = [measured[table.overall], *(own.get(column) for column in table.columns)]
    ours = [model_name, *map(percent, figures)]
    rows = [(100 * (figures[0] or 0), ours)]
    for model, *printed in table.shown():
        cells = ("-" if figure is None else f"{figure:.{table.decimals}f}" for figure in printed)
        rows.append((printed[0], [model, *cells]))
    rows = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    lines = [f"## Beside {table.source}", "", f"Overall: {table.convention}."]
    ours_is = PROTOCOLS[measured["threshold_protocol"]]
    if table.threshold == measured["threshold_protocol"]:
        lines += [f"Threshold of all rows: {ours_is}.", ""]
    else:
        lines += [f"Threshold of the published rows: {PROTOCOLS[table.threshold]}; of this model: {ours_is}.", ""]
    return [
        *lines,
        *_incomplete(results, entry.n_records),
        *_markdown([["model", "overall", *table.columns], *rows], bold=ours),
        "",
    ]


def _protocol(results: dict[str, Any]) -> float | str:
    """The threshold argument that `results` were measured with."""
    return results["threshold"] if results["threshold_protocol"] == "fixed" else results["threshold_protocol"]


def _incomplete(results: dict[str, Any], expected: int) -> list[str]:
    """A caveat if the published rows are based on more solutions."""
    if results["n_solutions"] < expected:
        return [
            f"The row of this model is based on {results['n_solutions']:,} solutions, the others on {expected:,}.",
            "",
        ]
    return []


def _markdown(rows: list[list[str]], bold: list[str] | None = None) -> list[str]:
    """Format a Markdown table, escaping its cells; one row may be bold."""
    escaped = [[f"**{markdown(cell)}**" if row is bold else markdown(cell) for cell in row] for row in rows]
    align = ["---", *("---:" for _ in rows[0][1:])]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], align, *escaped[1:])]
