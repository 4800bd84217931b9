"""Run the passes of a selection in processes on this machine."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..data.shards import BATCH_BYTES, Shard
from .passes import KeptRows, emit, score_shard
from .rules import CutSpec
from .summary import Scores, Summary
from .threshold import Cut, Ties, tie_counts


POOL_BYTES = 2**25  # a corpus above this size is worth a process per core


def find_engine(name: str) -> type:
    if name == "local":
        return LocalRun
    if name == "ray":
        from .engine_ray import RayRun

        return RayRun
    raise ValueError(f"engine must be local or ray, got {name!r}")


class LocalRun:
    """Runs the passes over all shards, in this process or, where that is quicker, in one process per core."""

    def __init__(
        self,
        shards: list[Shard],
        image_root: str | os.PathLike | None = None,
        drop_answer_step: bool = False,
        words: bool = False,
        spec: CutSpec | None = None,
    ):
        self.shards, self.image_root = shards, image_root
        self.options = {"drop_answer_step": drop_answer_step, "words": words, "spec": spec}
        self.scores: list[Scores] = []

    def __enter__(self) -> "LocalRun":
        # A fork has everything imported already. Where it is not safe (macOS), or not worth it, one process does it all.
        processes = min(len(self.shards), len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
        self.pool = None
        if processes > 1 and sum(map(_size, self.shards)) > POOL_BYTES:
            self.pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker)
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def summaries(self, strict: bool = False) -> Iterator[Summary]:
        score = partial(score_shard, image_root=self.image_root, **self.options)
        with tqdm(total=sum(map(_size, self.shards)), unit="B", unit_scale=True, delay=2, desc="scoring") as bar:
            for shard, (scores, summary) in zip(self.shards, self._each(score, self.shards), strict=True):
                self.scores.append(scores)
                bar.update(_size(shard))
                yield summary
                if strict and (summary.kinds["unread"] >= 0).any():
                    return

    def map(self, function: Callable, *args: object) -> list:
        """`function(shard, scores, *args)` of each shard, in corpus order."""
        return list(self._each(function, self.shards, self.scores, *([arg] * len(self.shards) for arg in args)))

    def ties(self, cut: Cut) -> list[Ties]:
        return self.map(_count_ties, cut)

    def emit(self, cut: Cut, folder: Path) -> list[KeptRows]:
        return self.map(_write_kept, cut, folder)

    def _each(self, function: Callable, *columns: Iterable) -> Iterator:
        if self.pool is None:
            yield from map(function, *columns)
            return
        try:
            yield from self.pool.map(function, *columns)
        except BrokenProcessPool as error:
            time.sleep(1)  # Ctrl-C kills the workers and may reach them first: here the parent gets its own
            raise OSError("a worker process was killed, perhaps for want of memory: run again") from error
        except BaseException:
            # The other workers are still writing: they end before the folder that they write to is deleted
            self.pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    gc.freeze()  # what the parent made is not looked through, and so not copied
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them: the parent alone has something to say
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed parent leaves no worker behind


def _count_ties(shard: Shard, scores: Scores, cut: Cut) -> Ties:
    return tie_counts(scores, cut)


def _write_kept(shard: Shard, scores: Scores, cut: Cut, folder: Path) -> KeptRows:
    with (
        open(folder / f"{shard.index}.kept", "wb", BATCH_BYTES) as kept,
        open(folder / f"{shard.index}.refused", "wb") as refused,
    ):
        return emit(shard, scores, cut, kept, refused)


def _size(shard: Shard) -> int:
    return shard.stamp[0] if shard.stop is None else shard.stop - shard.start
