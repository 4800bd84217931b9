"""Brier score and calibration error of step scores, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

import datasets
import evaluate

from trl_mprm.evaluation.metrics import step_metrics


DESCRIPTION = """
Whether step scores are probabilities: the Brier score, and the calibration error (ECE) over 15 bins of equal width,
an edge belonging to the bin below it, weighted by steps.
"""
CITATION = """
@inproceedings{guo2017calibration,
  title     = {On Calibration of Modern Neural Networks},
  author    = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {International Conference on Machine Learning},
  year      = {2017}
}
"""
INPUTS = """
Args:
    predictions (`list` of `list` of `float`): P(step good) of each step, one list a solution.
    references (`list` of `list` of `int`): label of each step: 1 correct, 0 neutral (ignored), -1 incorrect.

Returns:
    `dict`: `brier`, `calibration_error`; `None` what is undefined.
"""
MEASURES = (
    "brier",
    "calibration_error",
)


class StepCalibration(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references):
        metrics = step_metrics(references, predictions, threshold=0.5, n_resamples=0)
        return {name: metrics[name] for name in MEASURES}
