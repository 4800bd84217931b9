"""
Offer the metrics of [`~trl_mprm.evaluation.metrics`] as modules of the `evaluate` library, without a download.

    import evaluate
    from trl_mprm import evaluate_modules

    step_f1 = evaluate.load(evaluate_modules.path("step_f1"))
    step_f1.compute(predictions=[[0.9, 0.2]], references=[[1, -1]])
    -> {"macro_f1_step_weighted": 1.0, "macro_f1_pooled": 1.0, "macro_f1_source_mean": 1.0}
    evaluate.combine([evaluate_modules.path(name) for name in ("step_f1", "step_auc", "step_calibration")])

Each folder is laid out as a Space of the Hub wants it: the module, `README.md` as its card, `app.py`, `requirements.txt`.
"""

from pathlib import Path


NAMES = ("step_f1", "step_auc", "step_calibration", "first_error", "best_of_n")


def path(name: str) -> str:
    """
    Return the path of a metric module, for `evaluate.load` and `evaluate.combine`.

    Examples:
    ```python
    >>> from trl_mprm import evaluate_modules
    >>> evaluate_modules.path("step_f1").split("/")[-2:]
    ['evaluate_modules', 'step_f1']

    ```
    """
    if name not in NAMES:
        raise ValueError(f"there is no metric module {name!r}, expected one of {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)
