"""Macro-F1 of the steps of solutions, in its three conventions, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

from trl_mprm.evaluate_modules import checked


DESCRIPTION = """
Macro-F1 of correct and incorrect steps in the three conventions in which papers print it: the mean over sources
weighted by steps (arXiv 2602.04145, printed there as micro-F1), all steps together (VisualPRM), and the plain mean over
sources.
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
    sources (`list` of `str`, *optional*): source of each solution. Default: one source.
    groups (`list` of `str`, *optional*): question of each solution; `held_out` keeps a question together.
    threshold (`float` or `str`, *optional*, defaults to 0.5): a number, `"held_out"` or `"oracle"`.

Returns:
    `dict`: `macro_f1_step_weighted`, `macro_f1_pooled`, `macro_f1_source_mean`; `None` what is undefined.
"""
MEASURES = (
    "macro_f1_step_weighted",
    "macro_f1_pooled",
    "macro_f1_source_mean",
)


class StepF1(checked.StepModule):
    DESCRIPTION, CITATION, INPUTS, MEASURES = DESCRIPTION, CITATION, INPUTS, MEASURES
