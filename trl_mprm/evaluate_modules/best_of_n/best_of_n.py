"""Accuracy of best-of-N by step scores, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics`]."""

import datasets

from trl_mprm.evaluate_modules import checked
from trl_mprm.evaluation.metrics import best_of_n_metrics, check_candidates


DESCRIPTION = """
How often the candidate that the step scores rank first has the correct answer, by mean, lowest, product and last of its
step scores, beside blind and perfect choice. Candidates that tie for the first place share it.
"""
CITATION = """
@article{lightman2023lets,
  title   = {Let's Verify Step by Step},
  author  = {Lightman, Hunter and Kosaraju, Vineet and Burda, Yura and Edwards, Harri and Baker, Bowen and Lee, Teddy and Leike, Jan and Schulman, John and Sutskever, Ilya and Cobbe, Karl},
  journal = {arXiv preprint arXiv:2305.20050},
  year    = {2023}
}
"""
INPUTS = """
Args:
    predictions (`list` of `list` of `float`): P(step good) of each step, one list per candidate.
    references (`list` of `bool`): whether the answer of each candidate is correct.
    groups (`list` of `str`): question of each candidate.

Returns:
    `dict`: `accuracy_mean`, `accuracy_min`, `accuracy_product`, `accuracy_last`, `pass_at_1`, `pass_at_n`.
"""
MEASURES = ("accuracy_mean", "accuracy_min", "accuracy_product", "accuracy_last", "pass_at_1", "pass_at_n")


class BestOfN(checked.CheckedModule):
    DESCRIPTION, CITATION, INPUTS, MEASURES = DESCRIPTION, CITATION, INPUTS, MEASURES
    REFERENCES = datasets.Value("float64")

    def check(self, references, predictions) -> None:
        check_candidates(references, predictions)

    def _compute(self, predictions, references, groups):
        metrics = best_of_n_metrics(references, predictions, groups, n_resamples=0)
        return {name: metrics[name] for name in self.MEASURES}
