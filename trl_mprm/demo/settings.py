"""
Every number of the miniature in one place: frozen before its final seeds ran, and the same for every subset.

How they were chosen: on calibration seeds that the demo does not use, looking only at zero-shot, random, full and true
labels. F1 (step-weighted macro-F1 x 100, held-out threshold) / AUC x 100, one epoch, all weights but the vision
encoder's.

First round, seeds 101 to 103 (batch 16; three bases, the last one with fresh "Yes" and "No" rows):

    setting                             seed  zero-shot   random10    true10      random25    full        true-full
    first base, 1e-3                    101   51.2/51.4   58.1/62.6   59.8/64.6   60.6/64.2   -           -
    second base, 1e-3, 24k rollouts     101   61.3/64.2   56.2/61.4   65.8/70.3   54.3/58.6   56.5/61.9   -
    fresh rows, 3e-4, 24k               101   49.3/45.6   67.9/73.1   68.8/74.1   -           -           -
    the same, 18k                       102   -           67.8/70.7   68.6/73.5   -           71.5/80.9   -
    the same, more options, 18k         102   -           70.4/74.1   68.0/72.9   -           62.2/70.2   -
    the same, 16k: frozen               103   -           68.8/70.1   69.0/72.7   -           67.8/77.1   79.1/87.3
    LoRA r 16, 2e-3 (6e-3)              103   -           60.3/63.4 (54.6/57.2)   -           -           -

Measured once on seeds 1 to 5: zero-shot 48.7, random10 66.1, bis10 66.9, full 75.2 (three seeds: 63.8, 84.3, 77.5),
true10 67.9, true-full 81.0. BIS-10% against random-10% +0.8 (-3.3 to +4.8): inconclusive. The regime was not the
paper's: 10% gave 100 updates, too few to learn from any labels (true labels +2 over random10), and full was 9 points
ahead of random10 (the paper: 2.3).

Second round, seeds 105 to 107, world unchanged. The base was trained anew, now also on whether all statements so far
were sound, so that ten percent of the data can teach the task; batch and learning rate were chosen again.

    batch, learning rate                seed  zero-shot   random10    true10      random25    full
    16, 3e-4                            105   41.4/37.5   66.5/68.8   70.4/77.2   87.7/91.7   91.3/93.9
    16, 1e-3                            105   -           56.7/61.0   57.2/63.1   56.3/60.9   -
    8, 3e-4                             106   -           63.4/69.4   88.0/92.8   -           -
    8, 3e-4                             107   -           64.2/66.1   67.3/72.0   74.8/81.1   54.9/61.4
    4, 2e-4                             106   -           78.4/85.2   89.2/93.4   -           -
    4, 2e-4: FROZEN                     107   -           61.2/64.3   67.9/71.7   82.3/85.1   83.9/88.7

Chosen because there random 25% is within two points of full, true labels are clearly better than Monte Carlo labels on
the same rows, and full is not overtaken by less data. Runs jump by seed: some find "all so far sound", some do not.
The learning rate of the adapter was not calibrated again. The first round has been seen when the second was made; the
demo runs on seeds 11 to 15, which nothing had seen. Zero-shot 41.4 was the luck of the two fresh rows; for the demo they
were drawn again, nearest to chance on seed 105 (50.6/47.6).

The paper's corpus: error steps 3.6%, mixed rollouts 7.7%, mean score .857; ours 3.9%, 10.7%, .888.
"""

from dataclasses import dataclass, field, replace

from .world import Policy


@dataclass(frozen=True)
class Settings:
    """World, noise, sizes and hyper-parameters of the demo."""

    # The policy that is annotated: errors sit on one hard tile per problem.
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
    benchmark_problems: int = 400  # per policy

    # The paper's 10% and its alpha for 10% (README of its code).
    fraction: float = 0.10
    alpha: float = 0.2

    learning_rate: float = 2e-4
    batch_size: int = 4
    # One more run of BIS-10%, as an adapter.
    lora_learning_rate: float = 1e-3
    lora_rank: int = 16

    # Subset -> seeds. Data, selection and training all take the seed. `random25` and `true-full`, which the table above
    # has too, can be named here as well.
    seeds: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "zero-shot": (11, 12, 13),
            "random10": (11, 12, 13, 14, 15),
            "bis10": (11, 12, 13, 14, 15),
            "full": (11, 12, 13),
            "true10": (11, 12, 13),
            "bis10-lora": (11,),
        }
    )


DEMO = Settings()
QUICK = replace(
    DEMO,
    problems=1200,
    benchmark_problems=150,
    seeds={subset: (11,) for subset in ("zero-shot", "random10", "bis10", "full", "true10")},
)
