"""Brier score and calibration error of step scores, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

from trl_mprm.evaluate_modules import checked


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
    predictions (`list` of `list` of `float`): P(step good) of each step, one list per solution.
    references (`list` of `list` of `int`): label of each step: 1 correct, 0 neutral (ignored), -1 incorrect.
    sources, groups, threshold (*optional*): as in `step_f1`, for `evaluate.combine`; these measures need none of them.

Returns:
    `dict`: `brier`, `calibration_error`; `None` what is undefined.
"""
MEASURES = (
    "brier",
    "calibration_error",
)


class StepCalibration(checked.StepModule):
    DESCRIPTION, CITATION, INPUTS, MEASURES = DESCRIPTION, CITATION, INPUTS, MEASURES
