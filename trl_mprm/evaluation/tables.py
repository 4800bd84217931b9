"""Format results as tables of strings."""

from typing import Any

from ..cards.measures import F1_CONVENTIONS, MEASURES


def table_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Format metrics as a table of strings in percent: header, a row per source, a row per overall convention.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.tables import table_rows
    >>> from trl_mprm.evaluation.metrics import step_metrics
    >>> metrics = step_metrics([[1, -1], [1, 1, -1]], [[0.9, 0.2], [0.8, 0.4, 0.3]], threshold=0.5)
    >>> for row in table_rows(metrics):
    ...     print(" | ".join(row))
    source | steps | F1 correct | F1 incorrect | macro-F1 | 95% interval
    all | 5 | 80.00 | 80.00 | 80.00 | -
    overall, step-weighted (the paper) | 5 | - | - | 80.00 | 66.67 to 100.00
    overall, pooled (VisualPRM) | 5 | - | - | 80.00 | 66.67 to 100.00
    overall, mean of sources | 5 | - | - | 80.00 | 66.67 to 100.00

    ```
    """
    rows = [["source", "steps", "F1 correct", "F1 incorrect", "macro-F1", "95% interval"]]
    for name, source in metrics["sources"].items():
        f1 = [percent(source[key]) for key in ("f1_correct", "f1_incorrect", "macro_f1")]
        rows.append([name, str(source["n_steps"]), *f1, "-"])
    for key in F1_CONVENTIONS:
        overall = [str(metrics["n_steps"]), "-", "-", percent(metrics[key]), _low_to_high(metrics, key)]
        rows.append([MEASURES[key].row, *overall])
    return rows


def measure_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """
    Format the measures other than F1 as a table of strings in percent; for best-of-N, the accuracies.

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
    rows = [["measure", "value", "95% interval"]]
    beside = (key for key in MEASURES if key in metrics and key not in F1_CONVENTIONS)
    return rows + [[MEASURES[key].row, percent(metrics[key]), _low_to_high(metrics, key)] for key in beside]


def comparison_rows(tests: dict[str, dict]) -> list[list[str]]:
    """Format a result of [`~records.compare_models`] as a table of strings in percent."""
    rows = [["measure", "this model", "other model", "difference", "95% interval", "p"]]
    for key, measure in MEASURES.items():
        if key in tests:
            test = tests[key]
            values = [percent(test[column]) for column in ("first", "second", "difference")]
            low_high = " to ".join(map(percent, test["interval"])) if test["interval"] else "-"
            rows.append([measure.row, *values, low_high, f"{test['p_value']:.3f}"])
    return rows


def _low_to_high(metrics: dict[str, Any], key: str) -> str:
    low_high = metrics["intervals"].get(key)
    return " to ".join(map(percent, low_high)) if low_high else "-"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
