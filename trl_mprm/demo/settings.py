"""
Every number of the miniature in one place: frozen before its final seeds ran, and the same for every subset.

How they were chosen. On seeds 101 to 103, which the demo does not use, looking at zero-shot, random, full and true
labels only; no BIS run was made before these numbers were frozen. F1 (step-weighted macro-F1 x 100, held-out
threshold) / AUC x 100, batch 16, one epoch, all weights but the vision encoder's:

    setting                                     seed  zero-shot   random10    true10      full        true-full
    first base (judges only before "?"), 1e-3   101   51.2/51.4   58.1/62.6   59.8/64.6   -           -
    the same, 3e-3                              101   -           -           54.7/56.5   -           -
    the same, 1e-3, batch 4                     101   -           -           57.6/61.7   -           -
    second base, 1e-3, 24k rollouts             101   61.3/64.2   56.2/61.4   65.8/70.3   56.5/61.9   -
    fresh "Yes" and "No" rows, 3e-4             101   49.3/45.6   67.9/73.1   68.8/74.1   -           -
    the same, 18k rollouts                      102   -           67.8/70.7   68.6/73.5   71.5/80.9   -
    the same, more options, less noticing       102   -           70.4/74.1   68.0/72.9   62.2/70.2   -
    the same as above it but one, 16k: FROZEN   103   -           68.8/70.1   69.0/72.7   67.8/77.1   79.1/87.3
    LoRA r 16, 2e-3 (6e-3)                      103   -           60.3/63.4 (54.6/57.2)   -           -

The first three rows had rollouts without their opening step and a benchmark with 43% wrong steps.

What failed: with the first base the skill was out of reach (the first wrong step of a solution told at AUC 50), so it
was trained on with idle words in place of the question mark. Its second form was above chance before any training, by
luck of two rows that it never uses; they are fresh now. At 1e-3 training broke what the base knew. With 40% options
and little noticing full fell below random10, which is not the paper's regime. LoRA lagged behind, so the study trains
all weights and one adapter is trained beside it. In the calibration the benchmark had one policy, with 31% wrong
steps; the frozen one has three. The paper's corpus: error steps 3.6%, mixed 7.7%, mean score .857; ours 4.1%, 10.8%,
.887.
"""

from dataclasses import dataclass, field, replace

from .world import Policy


@dataclass(frozen=True)
class Settings:
    """World, noise, sizes and hyper-parameters of the demo."""

    # The policy that is annotated: errors sit on one hard tile a problem.
    policy: Policy = Policy(
        hard_rates=(0.02, 0.2, 0.6, 0.98),
        hard_weights=(0.53, 0.40, 0.05, 0.02),
        slip=0.003,
        notice_rates=(0.0, 0.05, 0.3),
        notice_weights=(0.15, 0.55, 0.3),
    )
    options: tuple[tuple[int, float], ...] = ((0, 0.65), (2, 0.175), (4, 0.175))
    wrong_reference: float = 0.012
    problems: int = 4000
    rollouts: int = 4
    num_mc: int = 16
    validation_problems: int = 150

    # The benchmark's policies slip more: about 30% of its steps are wrong, as in VisualProcessBench.
    benchmark_policies: dict[str, Policy] = field(
        default_factory=lambda: {
            "hasty": Policy((0.2, 0.8), (0.5, 0.5), 0.03, (0.0, 0.2), (0.5, 0.5)),
            "stubborn": Policy((0.2, 0.9), (0.5, 0.5), 0.01, (0.0,), (1.0,)),
            "careful": Policy((0.2, 0.8), (0.5, 0.5), 0.02, (0.05, 0.3), (0.5, 0.5)),
        }
    )
    benchmark_problems: int = 400  # a policy

    # The paper's 10% and its alpha for 10% (README of its code).
    fraction: float = 0.10
    alpha: float = 0.2

    learning_rate: float = 3e-4
    batch_size: int = 16
    # One more run of BIS-10%, as an adapter.
    lora_learning_rate: float = 2e-3
    lora_rank: int = 16

    # Subset -> seeds. Data, selection and training all take the seed.
    seeds: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "zero-shot": (1, 2, 3),
            "random10": (1, 2, 3, 4, 5),
            "bis10": (1, 2, 3, 4, 5),
            "full": (1, 2, 3),
            "true10": (1, 2, 3),
            "true-full": (1,),
            "bis10-lora": (1,),
        }
    )


DEMO = Settings()
QUICK = replace(
    DEMO,
    problems=1200,
    benchmark_problems=150,
    seeds={subset: (1,) for subset in ("zero-shot", "random10", "bis10", "full", "true10")},
)
