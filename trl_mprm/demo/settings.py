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

Measured once on seeds 11 to 15, and for the first study on seeds 21 to 25: random10 66.5 and 71.1, bis10 80.6 and 77.2,
full 87.5 and 83.4. Single trainings jumped between about 65 and 85, so most comparisons were inconclusive.

Third round, QLoRA, seeds 201 to 206; the second round has been seen when it was made. What changed and why: "Yes" and
"No" keep their meaning, as in a real model, and the base is trained 700 updates more on following an error (`base.py`),
so that a training has to find how the marker asks and not what is asked; fewer policies notice their slips, so that less
of the label noise is random, and half of the questions have options (a third before), so that more of it is systematic;
fewer hard problems, for the same share of mixed rollouts. Chosen for trainings that agree between seeds, looking only at
zero-shot, random, full and true labels; whether it helps or hurts BIS was not known and not looked at.

    setting (QLoRA r 16, 16k rollouts)              seeds        zero-shot  random10                     full
    base of the second round, batch 16, 1e-3        201, 202     48.5       68.7, 68.2                   -
    new base, world of the second round: 1e-3       201          54.4       61.2                         -
      3e-4 (true10 88.4)                            201, 202     -          70.2, 67.3                   90.8
      1e-4 (true-full 90.6)                         201, 202     -          72.2, 73.6                   85.9
      3e-5                                          201, 202     -          61.8, 63.3                   -
      1e-4, batch 8                                 201, 202     -          72.2, 71.0                   -
      2e-4, r 4                                     201, 202     -          72.9, 58.4                   -
      1e-4, beta2 .95, no weight decay              201, 202     -          72.9, 73.5                   -
    new world without any noticing: 1e-4            201, 202     -          75.9, 78.0                   -
    new world: 1e-4 (true10 77.7)                   201, 202     -          73.9, 77.0                   88.6
    the same, projector trained and double quantisation from here on:
      1e-4; 2e-4 (true10 80.3)                      201          -          74.4; 76.6                   -
      3e-4                                          201, 202     -          86.1, 68.4                   -
      4e-4                                          201 to 203   -          86.6, 80.1, 87.0             -
      8e-4                                          201 to 203   -          71.8, 79.1, 88.4             -
      4e-4, batch 8                                 202, 204, 206  -        88.3, 86.6, 89.7             -
      4e-4, batch 4                                 201 to 203   -          84.8, 89.2, 86.9             -
      4e-4, batch 4, 8k rollouts                    201 to 203   -          85.1, 82.5, 60.1             -
      4e-4, batch 6, 12k rollouts                   201 to 205   -          77.5, 89.1, 84.4, 87.9, 87.5 -
    5e-4, batch 8, 12k rollouts: FROZEN             201 to 206   54.9       86.0, 83.6, 88.4, 86.8, 88.9, 87.0   90.5, 91.2, 90.7, 90.7, 91.9, 91.0
      true10 89.2, 90.1, 89.1 (201 to 203); true-full 94.7 (201); zero-shot 54.2 to 55.3
    all weights, 2e-4: frozen (5e-4)                201, 202     -          80.3, 88.6 (76.4, 85.5)      -

Standard deviation between seeds of the frozen setting: random10 1.9, full 0.5, (full - random10) 1.9 points. This is
the regime that was looked for: the random tenth comes within 4.2 points of full on average (the paper: 2.3 and 3.6).

Measured once on seeds 31 to 35 (the demo), 501 to 512 (the study) and 601 to 612 (its replication): trainings on all rollouts
agree on the first two (deviation 0.7 in the study) and on eleven of the last twelve (the other ended at 83.5), a random
quarter is 0.6 points behind them and true labels 4.1 ahead (501 to 505). But one in ten on a tenth does not learn the task
in one epoch (random tenths five of 29, BIS-10% one), and the deviation of random tenths is 6.4 and 7.6 points. Six
calibration seeds had not shown that.

The paper's corpus: error steps 3.6%, mixed rollouts 7.7%, mean score .857; ours 5.1%, 10.4%, .886.
"""

from dataclasses import dataclass, field, replace

from .world import Policy


@dataclass(frozen=True)
class Settings:
    """World, noise, sizes and hyper-parameters of the demo."""

    # The policy that is annotated: errors sit on one hard tile per problem.
    policy: Policy = Policy(
        hard_rates=(0.02, 0.2, 0.6, 0.98),
        hard_weights=(0.60, 0.34, 0.04, 0.02),
        slip=0.003,
        notice_rates=(0.0, 0.05, 0.3),
        notice_weights=(0.6, 0.3, 0.1),
    )
    options: tuple[tuple[int, float], ...] = ((0, 0.5), (2, 0.25), (4, 0.25))
    wrong_reference: float = 0.012
    problems: int = 3000
    rollouts: int = 4
    num_mc: int = 16

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

    batch_size: int = 8
    learning_rate: float = 5e-4  # of QLoRA
    lora_rank: int = 16
    full_learning_rate: float = 2e-4  # of training all weights

    # Subset -> seeds. Data, selection and training all take the seed. `true10`, `random25` and `true-full`, which the
    # tables above have too, can be named here as well.
    seeds: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            "zero-shot": (31, 32, 33),
            "random10": (31, 32, 33, 34, 35),
            "bis10": (31, 32, 33, 34, 35),
            "full": (31, 32, 33),
        }
    )


DEMO = Settings()
QUICK = replace(
    DEMO,
    problems=1200,
    benchmark_problems=150,
    seeds={subset: (31,) for subset in ("zero-shot", "random10", "bis10", "full")},
)
