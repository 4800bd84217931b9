"""A policy on every worker of a Ray cluster gives what one process gives, also when a worker is killed."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from trl_mprm.annotation.annotate import annotate


def rows(n: int) -> list[dict]:
    return [
        {"prompt": f"question {i}?", "answer": "1", "rollout_id": f"a:{i}"}
        | {"completions": [f"step {k} is good with {0.3 * (i % 3) + 0.1 * k}" for k in range(1 + i % 4)]}
        for i in range(n)
    ]


class Deadly:
    """A policy that kills its own process once, at the first draw of question 5."""

    __name__ = "policy"

    def __init__(self, flag: Path | None):
        self.flag = flag

    def __call__(self, images, prompt, steps, n, seed):
        if self.flag is not None and prompt == "question 5?" and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        chance = float(steps[-1].split()[-1])
        return ["Answer: 1" if np.random.default_rng(seed + i).random() < chance else "Answer: 0" for i in range(n)]


@pytest.mark.slow
def test_ray_gives_what_one_process_gives_and_outlives_a_worker(tmp_path):
    options = {"checker": "exact", "budget": "bis", "fraction": 0.3}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not see the tests
    annotate(rows(24), Deadly(None), output=tmp_path / "local.jsonl", **options)
    annotate(rows(24), Deadly(tmp_path / "died"), output=tmp_path / "ray.jsonl", engine="ray", **options)
    assert (tmp_path / "died").exists()
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()
