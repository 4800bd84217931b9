"""AUC and average precision of step scores, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

from trl_mprm.evaluate_modules import checked


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
    predictions (`list` of `list` of `float`): P(step good) of each step, one list per solution.
    references (`list` of `list` of `int`): label of each step: 1 correct, 0 neutral (ignored), -1 incorrect.
    sources, groups, threshold (*optional*): as in `step_f1`, for `evaluate.combine`; these measures need none of them.

Returns:
    `dict`: `auc`, `average_precision_correct`, `average_precision_incorrect`; `None` what is undefined.
"""
MEASURES = (
    "auc",
    "average_precision_correct",
    "average_precision_incorrect",
)


class StepAuc(checked.StepModule):
    DESCRIPTION, CITATION, INPUTS, MEASURES = DESCRIPTION, CITATION, INPUTS, MEASURES
