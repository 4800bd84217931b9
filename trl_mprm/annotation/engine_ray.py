"""
Run a policy on every worker of a Ray cluster, for `--engine ray`.

The visits of a round are distributed to the workers, each with a policy of its own; each reply is sent back at once, and
the driver records it. Draws depend on their seeds alone, so that the result is that of a single process. Ray restarts a
worker that dies, and its unfinished visit is drawn again.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .opening import open_policy
from .policies import Parked, Policy, Reply, Request


try:
    import ray
except ImportError as error:
    raise ImportError('the engine ray needs Ray: pip install "trl-mprm[ray]"') from error


class RayPolicy(Policy):
    """
    Runs the policy of [`open_policy`] once per worker.

    Args:
        policy (`str` or `Callable`):
            As [`open_policy`] takes it; every node must be able to open it.
        workers (`int`, *optional*):
            Number of workers. Defaults to one per GPU of the cluster, or one per core if it has no GPU.
        sampling:
            As in [`open_policy`].
    """

    def __init__(self, policy: str | Callable[..., list[str]], workers: int | None = None, **sampling: Any):
        self.started = not ray.is_initialized()
        if self.started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start sends no usage statistics
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        workers = workers or gpus or max(1, int(resources.get("CPU", 1)))
        actor = ray.remote(num_gpus=1 if gpus else 0, num_cpus=0 if gpus else 1, max_restarts=3, max_task_retries=3)
        self.workers = [actor(_Worker).remote(policy, sampling) for _ in range(workers)]
        self.name = _get(self.workers[0].name.remote())

    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply | Parked]]:
        free, running = list(self.workers), {}
        places = iter(range(len(visits)))
        while True:
            while free and (place := next(places, None)) is not None:
                worker = free.pop()
                running[worker.run.remote(list(visits[place]))] = place, worker
            if not running:
                return
            [done], _ = ray.wait(list(running), num_returns=1)
            place, worker = running.pop(done)
            free.append(worker)
            for number, reply in _get(done):
                yield place, number, reply

    def close(self) -> None:
        """Release the workers, and stop the cluster if it was started here."""
        for worker in self.workers:
            ray.kill(worker)
        if self.started:
            ray.shutdown()


class _Worker:
    def __init__(self, policy: str | Callable[..., list[str]], sampling: dict[str, Any]):
        self.policy = open_policy(policy, **sampling)

    def name(self) -> str:
        return self.policy.name

    def run(self, visit: list[Request]) -> list[tuple[int, Reply | Parked]]:
        return [(number, reply) for _, number, reply in self.policy.run([visit])]


def _get(result: Any) -> Any:
    try:
        return ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as the policy raises it in one process
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray could not finish ({type(error).__name__}: {' '.join(str(error).split())[:200]}): look at the cluster, "
            "then run again"
        ) from error
