"""AUC and average precision of step scores, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

import datasets
import evaluate

from trl_mprm.evaluation.metrics import step_metrics


DESCRIPTION = """
How well step scores rank correct above incorrect steps, whatever the threshold: AUC, and average precision with the
correct or the incorrect steps as those to find.
"""
CITATION = """
@article{li2026training,
  title   = {Training Data Efficiency in Multimodal Process Reward Models},
  author  = {Li, Jinyuan and Huang, Chengsong and Huang, Langlin and Xu, Shaoyang and Liu, Haolin and Zhang, Wenxuan and Huang, Jiaxin},
  journal = {arXiv preprint arXiv:2602.04145},
  year    = {2026}
}
"""
INPUTS = """
Args:
    predictions (`list` of `list` of `float`): P(step good) of each step, one list a solution.
    references (`list` of `list` of `int`): label of each step: 1 correct, 0 neutral (ignored), -1 incorrect.

Returns:
    `dict`: `auc`, `average_precision_correct`, `average_precision_incorrect`; `None` what is undefined.
"""
MEASURES = (
    "auc",
    "average_precision_correct",
    "average_precision_incorrect",
)


class StepAuc(evaluate.Metric):
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
