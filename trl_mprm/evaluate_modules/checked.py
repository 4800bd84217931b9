"""
The base of the modules. Inputs are checked on arrival by the rules of the metric itself, because `evaluate` casts them to
the types of its features before `_compute` sees them, which would turn the labels `False` and `0.7` into neutral steps.
"""

from typing import Any

import datasets
import evaluate

from trl_mprm.evaluation.metrics import step_metrics
from trl_mprm.evaluation.step_counts import Steps


class CheckedModule(evaluate.Metric):
    """A metric whose `check(references, predictions)` raises `ValueError` before anything is cast."""

    DESCRIPTION: str
    CITATION: str
    INPUTS: str
    REFERENCES: Any

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=self.CITATION,
            inputs_description=self.INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": self.REFERENCES}
            ),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Check and add a batch: lists of predictions and of references."""  # `evaluate` appends to both docstrings
        self.check(references, predictions)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs) -> None:
        """Check and add one prediction and its reference."""
        given = {"predictions": prediction, "references": reference, **kwargs}
        self.check([given["references"]], [given["predictions"]])
        super().add(**given)


class StepModule(CheckedModule):
    """Some `MEASURES` of [`~trl_mprm.evaluation.metrics.step_metrics`]."""

    MEASURES: tuple[str, ...]
    REFERENCES = datasets.Sequence(datasets.Value("float64"))

    def check(self, references, predictions) -> None:
        Steps(references, predictions, None, None)

    def _compute(self, predictions, references, sources=None, groups=None, threshold=0.5):
        metrics = step_metrics(references, predictions, sources, groups, threshold=threshold, n_resamples=0)
        return {name: metrics[name] for name in self.MEASURES}
