"""
The names of measures wherever they are shown: in the tables of the command, reports, pages and cards.

Macro-F1 is the mean of the F1 of correct and of incorrect steps. Three figures go by the name "overall"; each paper
prints one of them, and only figures of the same kind are comparable:

    macro_f1_step_weighted   mean over sources, weighted by steps (arXiv 2602.04145 prints it as micro-F1)
    macro_f1_pooled          all steps together (VisualPRM prints it)
    macro_f1_source_mean     plain mean over sources
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """
    The wording of a measure.

    Args:
        name (`str`):
            Its name.
        note (`str`, *optional*):
            Something that a reader needs to know about it.
        short (`str`, *optional*):
            Its name in narrow tables. Defaults to name and note.
        task (`str`, *optional*):
            The task it measures, in a card's `model-index`.
        on_card (`bool`, *optional*, defaults to `True`):
            Whether cards show it.
    """

    name: str
    note: str = ""
    short: str = ""
    task: str = "Step correctness"
    on_card: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name

    @property
    def row(self) -> str:
        return self.short or self.label


_CHOICE = "Best of N"

MEASURES = {
    "macro_f1_step_weighted": Measure(
        "macro-F1, step-weighted mean over sources", "the paper's micro-F1", "overall, step-weighted (the paper)"
    ),
    "macro_f1_pooled": Measure("macro-F1, pooled", "VisualPRM's convention", "overall, pooled (VisualPRM)"),
    "macro_f1_source_mean": Measure("macro-F1, plain mean over sources", short="overall, mean of sources"),
    "auc": Measure("AUC"),
    "average_precision_correct": Measure("average precision, correct steps to find", on_card=False),
    "average_precision_incorrect": Measure("average precision, incorrect steps to find"),
    "brier": Measure("Brier score", "lower is better"),
    "calibration_error": Measure("calibration error, 15 bins", "lower is better"),
    "first_error_accuracy": Measure("first-error accuracy"),
    "processbench_f1": Measure("ProcessBench F1, all solutions together", on_card=False),
    "processbench_f1_source_mean": Measure("ProcessBench F1, mean over sources"),
    "accuracy_mean": Measure("best-of-N accuracy, mean of step scores", "", "best of N by mean", _CHOICE),
    "accuracy_min": Measure("best-of-N accuracy, lowest step score", "", "best of N by min", _CHOICE),
    "accuracy_product": Measure("best-of-N accuracy, product of step scores", "", "best of N by product", _CHOICE),
    "accuracy_last": Measure("best-of-N accuracy, last step score", "", "best of N by last step", _CHOICE),
    "pass_at_1": Measure("accuracy of blind choice", "pass@1", "blind choice (pass@1)", _CHOICE),
    "pass_at_n": Measure("accuracy of perfect choice", "pass@N", "perfect choice (pass@N)", _CHOICE),
}

F1_CONVENTIONS = ("macro_f1_step_weighted", "macro_f1_pooled", "macro_f1_source_mean")
