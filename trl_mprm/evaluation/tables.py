"""Results as tables and files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_output, write_json
from .benchmarks import BENCHMARKS, Benchmark
from .metrics import prmbench_scores
from .published_results import TABLES
from .run import compare_models, measure, read_scores


OVERALL_ROWS = {
    "macro_f1_step_weighted": "overall, step-weighted (the paper)",
    "macro_f1_pooled": "overall, pooled (VisualPRM)",
    "macro_f1_source_mean": "overall, mean of sources",
}

MEASURE_ROWS = {
    "auc": "AUC",
    "average_precision_correct": "average precision, correct steps",
    "average_precision_incorrect": "average precision, incorrect steps",
    "brier": "Brier score (lower is better)",
    "calibration_error": "calibration error, 15 bins (lower is better)",
    "first_error_accuracy": "first-error accuracy",
    "processbench_f1": "ProcessBench F1, all solutions together",
    "processbench_f1_source_mean": "ProcessBench F1, mean of sources",
}

BEST_OF_N_ROWS = {
    "accuracy_mean": "best of N by mean",
    "accuracy_min": "best of N by min",
    "accuracy_product": "best of N by product",
    "accuracy_last": "best of N by last step",
    "pass_at_1": "blind choice (pass@1)",
    "pass_at_n": "perfect choice (pass@N)",
}

PROTOCOLS = {
    "fixed": "set beforehand (`fixed`)",
    "held_out": "tuned on other questions, five folds (`held_out`)",
    "oracle": "tuned on the very items that are measured (`oracle`), which flatters",
    None: "not stated by the source",
}


# ---- tables


def table_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Lay metrics out as a table of strings, in percent: header, a row per source, a row per overall convention.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.tables import table_rows
    >>> from trl_mprm.evaluation.metrics import step_metrics
    >>> metrics = step_metrics([[1, -1], [1, 1, -1]], [[0.9, 0.2], [0.8, 0.4, 0.3]], threshold=0.5)
    >>> for row in table_rows(metrics):
    ...     print(" | ".join(row))
    source | steps | F1 correct | F1 incorrect | macro-F1 (fixed threshold) | 95% interval | AUC
    all | 5 | 80.00 | 80.00 | 80.00 | - | 100.00
    overall, step-weighted (the paper) | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00
    overall, pooled (VisualPRM) | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00
    overall, mean of sources | 5 | - | - | 80.00 | 66.67 to 100.00 | 100.00

    ```
    """
    header = ["source", "steps", "F1 correct", "F1 incorrect"]
    rows = [[*header, f"macro-F1 ({metrics['threshold_protocol']} threshold)", "95% interval", "AUC"]]
    for name, source in metrics["sources"].items():
        f1 = [_percent(source[key]) for key in ("f1_correct", "f1_incorrect", "macro_f1")]
        rows.append([name, str(source["n_steps"]), *f1, "-", _percent(source["auc"])])
    for key, name in OVERALL_ROWS.items():
        steps, auc = str(metrics["n_steps"]), _percent(metrics["auc"])
        rows.append([name, steps, "-", "-", _percent(metrics[key]), _low_to_high(metrics, key), auc])
    return rows


def measure_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Lay the measures that stand beside F1 out as a table of strings, in percent; for best-of-N its accuracies.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.tables import measure_rows
    >>> from trl_mprm.evaluation.metrics import best_of_n_metrics
    >>> for row in measure_rows(best_of_n_metrics([True, False], [[0.9], [0.2]], ["q", "q"]))[:3]:
    ...     print(" | ".join(row))
    measure | value | 95% interval
    best of N by mean | 100.00 | -
    best of N by min | 100.00 | -

    ```
    """
    names = BEST_OF_N_ROWS if "pass_at_n" in metrics else MEASURE_ROWS
    rows = [["measure", "value", "95% interval"]]
    return rows + [[name, _percent(metrics[key]), _low_to_high(metrics, key)] for key, name in names.items()]


def comparison_rows(tests: dict[str, dict]) -> list[list[str]]:
    """Lay a result of [`compare_models`] out as a table of strings, in percent."""
    rows = [["measure", "this model", "other model", "difference", "95% interval", "p"]]
    for key, name in (OVERALL_ROWS | MEASURE_ROWS).items():
        if key in tests:
            test = tests[key]
            values = [_percent(test[column]) for column in ("first", "second", "difference")]
            low_high = " to ".join(map(_percent, test["interval"])) if test["interval"] else "-"
            rows.append([name, *values, low_high, f"{test['p_value']:.3f}"])
    return rows


def _low_to_high(metrics: dict[str, Any], key: str) -> str:
    low_high = metrics["intervals"].get(key)
    return " to ".join(map(_percent, low_high)) if low_high else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


# ---- files


def write_report(
    folder: str | os.PathLike, benchmark: Benchmark, model_name: str, compare: str | os.PathLike | None = None
) -> list[Path]:
    """
    Write what people read of an evaluation, from the `results.json` and `scores.jsonl` in `folder`.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of [`evaluate_model`].
        benchmark ([`Benchmark`]):
            What was evaluated.
        model_name (`str`):
            Name of the model, a Hub id or of a local folder its name.
        compare (`str` or `os.PathLike`, *optional*):
            `scores.jsonl` of another model; the result of [`compare_models`] joins the report and `results.json`.

    Returns:
        `list[Path]`: `results.md`, tables beside the published rows in their own convention, with `model-index` entries
        as front matter; `evaluation.html`, single solutions with their step scores; and, for results on all records of
        a published dataset, `.eval_results/{benchmark}.yaml` for the model's repository on the Hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from ..cards.model_card import eval_results, eval_results_yaml
    from .page import evaluation_page

    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    records = read_scores(folder / "scores.jsonl")
    if compare is not None:
        if "pass_at_n" in results:
            raise ValueError("two models are compared by their step labels, and best-of-N has none")
        tests = compare_models(folder / "scores.jsonl", compare, _protocol(results))
        results["comparison"] = {"other": Path(compare).parent.name or str(compare), "tests": tests}
        write_json(results, folder / "results.json")
    entries = eval_results(benchmark.hub_id, results, benchmark.title)
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
    Lay results out in Markdown, beside the published rows, each table in one convention.

    Args:
        results (`dict`):
            What [`evaluate_model`] returned.
        records (`Sequence[dict]`):
            Lines of `scores.jsonl`: where a published table tunes its threshold, the model is measured that way too.
        model_name (`str`):
            Name of the model.
    """
    report = results["benchmark"]
    name = report["name"]
    lines = [f"# {model_name} on {report['title']}", ""]
    if "pass_at_n" in results:
        fewest, most = results["n_candidates"]
        candidates = str(most) if fewest == most else f"{fewest} to {most}"
        lines += [f"{results['n_questions']:,} questions with {candidates} candidates each, figures in percent.", ""]
    else:
        protocol = PROTOCOLS[results["threshold_protocol"]]
        lines += [
            f"{results['n_solutions']:,} solutions, {results['n_steps']:,} labelled steps, figures in percent. "
            f"Threshold: {protocol}.",
            "",
        ]
    notes = [f"{count} refused: {reason}" for reason, count in report["refused"].items()]
    notes += [f"{len(report['failed'])} not scored, for an error"] if report["failed"] else []
    notes += [f"{count:,} {quirk.replace('_', ' ')}" for quirk, count in report["quirks"].items()]
    if notes:
        lines += [f"Of the benchmark: {'; '.join(notes)}.", ""]
    if "pass_at_n" not in results:
        lines += [*_markdown(table_rows(results)), ""]
    lines += [*_markdown(measure_rows(results)), ""]
    if "comparison" in results:
        lines += [f"## Against {results['comparison']['other']}", ""]
        lines += ["Paired bootstrap by question over the items that both scored.", ""]
        lines += [*_markdown(comparison_rows(results["comparison"]["tests"])), ""]
    for table in TABLES.get(name, ()):
        threshold = table.threshold if table.threshold == "oracle" else _protocol(results)
        measured = measure(records, threshold, n_resamples=0)
        own = {column: source["macro_f1"] for column, source in measured["sources"].items()}
        if name == "prmbench":
            own = prmbench_scores(measured)
        figures = [measured[table.overall], *(own.get(column) for column in table.columns)]
        ours = [f"**{model_name}**", *(f"**{_percent(figure)}**" for figure in figures)]
        rows = [(100 * (figures[0] or 0), ours)]
        for model, *printed in table.shown():
            cells = ("-" if figure is None else f"{figure:.{table.decimals}f}" for figure in printed)
            rows.append((printed[0], [model, *cells]))
        rows = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
        lines += [f"## Beside {table.source}", "", f"Overall: {table.convention}."]
        ours_is = PROTOCOLS[measured["threshold_protocol"]]
        if table.threshold == measured["threshold_protocol"]:
            lines += [f"Threshold of all rows: {ours_is}.", ""]
        else:
            lines += [f"Threshold of the published rows: {PROTOCOLS[table.threshold]}; of this model: {ours_is}.", ""]
        lines += [*_incomplete(results), *_markdown([["model", "overall", *table.columns], *rows]), ""]
    return "\n".join(lines)


def _protocol(results: dict[str, Any]) -> float | str:
    """The threshold argument that gave `results`."""
    return results["threshold"] if results["threshold_protocol"] == "fixed" else results["threshold_protocol"]


def _incomplete(results: dict[str, Any]) -> list[str]:
    """A caveat where the published rows stand on other or on more solutions."""
    report = results["benchmark"]
    expected = BENCHMARKS[report["name"]].n_records
    if report["hub_id"] is None:
        return [
            f"This run read {report['read']:,} records, and the published rows stand on {expected:,}: the row of this "
            "model does not compare with them.",
            "",
        ]
    if results["n_solutions"] < expected:
        return [
            f"The row of this model stands on {results['n_solutions']:,} solutions, the others on {expected:,}.",
            "",
        ]
    return []


def _markdown(rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    align = ["---", *("---:" for _ in rows[0][1:])]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], align, *escaped[1:])]
