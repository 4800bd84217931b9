"""First-error accuracy and ProcessBench F1, as a module of the `evaluate` library: a thin layer over [`~trl_mprm.evaluation.metrics.step_metrics`]."""

from trl_mprm.evaluate_modules import checked


DESCRIPTION = """
Whether the first step that is reported as incorrect is the first that is labelled so: the accuracy over all solutions,
over those with and without an error, and ProcessBench's F1, the harmonic mean of the latter two, of all solutions
together and as the mean over sources, which ProcessBench prints.
"""
CITATION = """
@article{zheng2024processbench,
  title   = {ProcessBench: Identifying Process Errors in Mathematical Reasoning},
  author  = {Zheng, Chujie and Zhang, Zhenru and Zhang, Beichen and Lin, Runji and Lu, Keming and Yu, Bowen and Liu, Dayiheng and Zhou, Jingren and Lin, Junyang},
  journal = {arXiv preprint arXiv:2412.06559},
  year    = {2024}
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
    `dict`: `first_error_accuracy`, `first_error_accuracy_erroneous`, `first_error_accuracy_correct`, `processbench_f1`, `processbench_f1_source_mean`; `None` what is undefined.
"""
MEASURES = (
    "first_error_accuracy",
    "first_error_accuracy_erroneous",
    "first_error_accuracy_correct",
    "processbench_f1",
    "processbench_f1_source_mean",
)


class FirstError(checked.StepModule):
    DESCRIPTION, CITATION, INPUTS, MEASURES = DESCRIPTION, CITATION, INPUTS, MEASURES
