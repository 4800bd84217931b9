"""
Published figures on VisualProcessBench and PRMBench, each with its source and its convention.

A row holds a model and its figures in percent, as printed:

    InternVL2.5-8B BIS-10%             65.46 66.90 65.07 63.35 65.56 65.10

Figures are comparable only within one convention; [`TABLES`] keeps conventions apart.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """
    Rows of one source in one convention.

    Args:
        source (`str`):
            Where the rows were printed.
        convention (`str`):
            How the overall figure is computed.
        overall (`str`):
            Key of [`~metrics.step_metrics`] for the overall figure.
        threshold (`str` or `None`):
            Threshold protocol of the rows; `None` if the publication does not state it.
        columns (`tuple[str, ...]`):
            The benchmark's sources, one per column after the overall figure.
        rows (`list`):
            `(model, overall, *figures)`; a figure is `None` where none is printed.
        decimals (`int`):
            Digits after the point, as printed.
        headline (`tuple[str, ...]`):
            Models to show beside a result; all if empty.
    """

    source: str
    convention: str
    overall: str
    threshold: str | None
    columns: tuple[str, ...]
    rows: list[tuple]
    decimals: int
    headline: tuple[str, ...] = ()

    def shown(self) -> list[tuple]:
        return [row for row in self.rows if not self.headline or row[0] in self.headline]


def _parse(text: str, n_columns: int) -> list[tuple]:
    rows = [line.rsplit(maxsplit=n_columns + 1) for line in text.strip().splitlines()]
    return [(name, *(None if figure == "-" else float(figure) for figure in figures)) for name, *figures in rows]


# Labelled steps of the test set by source: correct, incorrect. Neutral steps are not counted.
VISUALPROCESSBENCH_STEPS = {
    "MathVision_MINI": (3875, 2350),
    "MathVerse_MINI_Vision_Only": (5767, 2960),
    "MMMU_DEV_VAL": (1698, 708),
    "DynaMath": (3469, 1091),
    "WeMath": (1776, 582),
}

# arXiv 2602.04145, Tables 2, 4 and 5. The printed overall of InternVL2.5-8B Random-5% does not follow from its own
# columns, which give 63.39.
_BIS_PAPER = """
InternVL2.5-8B Base                52.28 52.40 52.04 50.21 54.85 49.95
InternVL2.5-8B Full Hard 0         65.12 65.77 65.43 61.84 66.17 63.56
InternVL2.5-8B Full Hard 1/N       64.26 64.91 63.91 61.07 65.44 64.80
InternVL2.5-8B Full Hard 2/N       63.02 61.61 62.92 59.70 65.83 65.09
InternVL2.5-8B Full Soft           61.54 60.78 60.47 62.05 62.91 64.38
InternVL2.5-8B Random-5%           63.34 64.95 62.42 58.94 65.91 62.57
InternVL2.5-8B BIS-5%              64.51 66.66 64.53 60.30 63.80 64.40
InternVL2.5-8B Random-10%          62.86 64.65 62.14 60.25 62.98 63.25
InternVL2.5-8B BIS-10%             65.46 66.90 65.07 63.35 65.56 65.10
InternVL2.5-8B Random-15%          63.27 65.06 63.00 57.23 64.17 63.96
InternVL2.5-8B BIS-15%             64.98 67.09 64.44 61.80 64.58 65.40
InternVL2.5-8B Random-25%          63.37 64.49 62.60 58.32 65.83 63.67
InternVL2.5-8B BIS-25%             65.46 67.98 64.86 60.49 65.72 65.59
InternVL2.5-8B Random-35%          63.52 65.50 63.49 58.01 64.00 63.08
InternVL2.5-8B BIS-35%             64.98 67.25 64.47 59.61 65.79 64.82
InternVL2.5-8B Random-50%          64.02 64.55 63.94 60.25 65.38 64.14
InternVL2.5-8B BIS-50%             65.00 65.84 63.79 63.03 66.66 66.03
Qwen2.5-VL-7B Base                 49.68 50.22 49.58 49.85 49.62 48.51
Qwen2.5-VL-7B Full Hard 0          65.57 66.05 65.29 63.23 66.24 66.40
Qwen2.5-VL-7B Full Hard 1/N        65.27 66.17 64.53 63.83 66.60 64.55
Qwen2.5-VL-7B Full Hard 2/N        62.72 62.33 62.18 62.56 63.37 64.65
Qwen2.5-VL-7B Full Soft            62.23 62.17 61.25 61.44 62.88 65.55
Qwen2.5-VL-7B Random-5%            53.54 54.38 52.82 55.85 52.80 53.04
Qwen2.5-VL-7B BIS-5%               64.42 66.69 64.20 62.72 63.34 63.12
Qwen2.5-VL-7B Random-10%           61.99 63.42 61.85 58.37 62.24 61.97
Qwen2.5-VL-7B BIS-10%              64.63 66.05 64.14 61.33 64.64 66.05
Qwen2.5-VL-7B Random-15%           59.82 59.32 60.58 54.97 61.32 60.36
Qwen2.5-VL-7B BIS-15%              65.29 66.50 64.03 66.40 64.80 66.58
Qwen2.5-VL-7B Random-25%           64.44 65.87 63.38 61.99 66.32 63.44
Qwen2.5-VL-7B BIS-25%              65.53 66.84 64.48 63.60 66.19 66.66
Qwen2.5-VL-7B Random-35%           64.77 66.45 64.43 60.47 65.34 64.84
Qwen2.5-VL-7B BIS-35%              65.69 66.77 65.50 63.37 65.65 65.99
Qwen2.5-VL-7B Random-50%           64.54 66.52 64.27 59.74 65.73 62.89
Qwen2.5-VL-7B BIS-50%              65.02 67.22 64.30 60.80 65.62 64.99
InternVL2.5-8B Mixed-25%           64.70 66.32 64.78 58.65 65.66 64.51
InternVL2.5-8B Reliable-25%        62.75 62.12 63.14 60.52 63.85 63.14
InternVL2.5-8B Low-MC-25%          64.18 66.31 64.31 59.40 64.16 62.97
InternVL2.5-8B BIS-25% alpha 0.02  64.84 66.63 64.69 60.49 64.78 65.27
InternVL2.5-8B BIS-25% alpha 0.08  64.86 67.10 64.47 59.96 64.88 65.35
"""

# arXiv 2503.10291. The overall figure, a pooled macro-F1, is higher than the step-weighted mean of the columns.
_VISUALPRM_PAPER = """
Gemini-2.0-Flash     62.3 60.1 62.8 58.5 66.7 58.7
VisualPRM-8B         62.0 62.1 61.0 58.5 62.7 61.8
Qwen2.5-VL-72B       60.5 59.0 59.7 59.2 62.9 62.3
GPT-4o               60.3 60.2 59.7 56.3 59.0 63.3
GPT-4o-mini          57.9 58.9 57.1 53.6 56.7 58.5
InternVL2.5-78B      52.6 - - - - -
LLaVA-OV-72B         52.3 - - - - -
Qwen2.5-VL-7B        51.0 - - - - -
InternVL2.5-38B      50.8 - - - - -
MiniCPM-V2.6         50.4 - - - - -
InternVL2.5-26B      49.2 - - - - -
InternVL2.5-8B       48.0 - - - - -
LLaVA-OV-7B          44.4 - - - - -
"""

# Leaderboard in the README of github.com/ssmisya/PRMBench, PRMScore: overall, NR, NCL, ES, SC, DC, CI, PS, DR, MS.
_PRMBENCH_README = """
Skywork-PRM-1.5B          31.7 31.4 35.8 32.4 25.7 26.0 30.2 33.1 32.3 81.1
Skywork-PRM-7B            36.2 35.7 41.2 36.7 29.1 30.6 34.4 36.8 37.4 88.8
Llemma-PRM800k-7B         52.0 49.3 53.4 56.4 47.1 46.7 53.3 51.0 53.5 93.6
MathShepherd-Mistral-7B   47.0 44.0 50.3 49.4 44.5 41.3 47.7 47.2 48.6 86.1
ReasonEval-7B             60.0 61.0 50.1 62.1 65.9 61.5 66.0 55.6 58.0 99.5
RLHFlow-PRM-Mistral-8B    54.4 46.1 47.3 56.6 55.1 54.4 63.8 51.5 56.2 97.9
RLHFlow-PRM-Deepseek-8B   54.2 46.4 48.9 55.7 55.0 53.2 66.2 49.0 55.4 99.8
ReasonEval-34B            60.5 54.8 48.1 66.4 60.3 57.8 67.5 57.7 64.3 97.2
"""

TABLES = {
    "visualprocessbench": (
        PublishedTable(
            source="Training Data Efficiency in Multimodal Process Reward Models, arXiv 2602.04145, Tables 2, 4, 5",
            convention="mean over sources of macro-F1, weighted by steps; printed there as micro-F1",
            overall="macro_f1_step_weighted",
            threshold="oracle",
            columns=tuple(VISUALPROCESSBENCH_STEPS),
            rows=_parse(_BIS_PAPER, 5),
            decimals=2,
            headline=tuple(
                f"{model} {setting}"
                for model in ("InternVL2.5-8B", "Qwen2.5-VL-7B")
                for setting in ("Base", "Full Hard 0", "Random-10%", "BIS-10%", "Random-25%", "BIS-25%", "BIS-35%")
            ),
        ),
        PublishedTable(
            source="VisualPRM, arXiv 2503.10291",
            convention="macro-F1 of all steps together (pooled)",
            overall="macro_f1_pooled",
            threshold=None,
            columns=tuple(VISUALPROCESSBENCH_STEPS),
            rows=_parse(_VISUALPRM_PAPER, 5),
            decimals=1,
        ),
    ),
    "prmbench": (
        PublishedTable(
            source="README of PRMBench, github.com/ssmisya/PRMBench, and arXiv 2501.03124",
            convention="PRMScore: half the F1 of correct, half the F1 of incorrect steps, all steps together; "
            "multi_solutions: F1 of correct steps",
            overall="macro_f1_pooled",
            threshold="fixed",
            columns=(
                *("redundency", "circular"),
                *("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
                *("missing_condition", "deception", "multi_solutions"),
            ),
            rows=_parse(_PRMBENCH_README, 9),
            decimals=1,
        ),
    ),
}
