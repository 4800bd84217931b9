"""
The passes of `trl-mprm select` on a Ray cluster: `--engine ray`.

The shards of a corpus stay where they are, and so do the scores of their lines:

    Shard("raw/AI2D.jsonl", bytes 0 to 16778020)   score ->  Scores (20 bytes per line, in Ray's object store), Summary
    the summaries of 1/8 of the shards             merge ->  one message of under 1 MB, to the driver (8 cores: 8 of them)
    Shard, Scores, the cut of the driver           emit  ->  the kept lines, in a part file beside the output; to the
                                                             driver their line numbers (8 bytes per kept row)

The driver finds the cut and joins the parts with the code of the local engine, so the output is identical to the byte.
When a worker dies, Ray runs its unfinished tasks again; a task writes a file whole or not at all. These are Ray tasks
rather than a Ray Data pipeline because scoring a shard has two results, one that travels and one that a later pass
needs on the same node. `map_batches` returns only one, and would carry the scores through every stage.
"""

import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from ..data.shards import BATCH_BYTES, Shard
from ..files import atomic_output
from .passes import KeptRows, emit, score_shard
from .rules import CutSpec
from .summary import Scores, Summary, merge
from .threshold import Cut, Ties, tie_counts


try:
    import ray
except ImportError as error:
    raise ImportError('the engine ray needs Ray: pip install "trl-mprm[ray]"') from error


class RayRun:
    """
    Run the passes over all shards on the cluster that `RAY_ADDRESS` names or that runs on this machine, or else on a
    local one, which is started here and stopped at the end.

    Args:
        shards (`list` of [`~trl_mprm.data.shards.Shard`]):
            Every node must see their files under the same path.
        image_root, drop_answer_step, words, spec:
            As in [`~trl_mprm.selection.passes.score_shard`].
    """

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
        self.scores: list[ray.ObjectRef] = []
        self.message_bytes: list[int] = []  # of each worker's message in the reduce

    def __enter__(self) -> "RayRun":
        self.started = not ray.is_initialized()
        if self.started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start sends no usage reports
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
            except Exception as error:  # Ray raises a plain Exception when a node does not come up in time
                raise OSError(
                    f"Ray did not start ({error}): look at RAY_ADDRESS and the cluster, then run again"
                ) from error
        return self

    def __exit__(self, *error: object) -> None:
        for scores in self.scores:
            ray.cancel(scores)  # may still be running when the driver gives up
        self.scores = []
        if self.started:
            ray.shutdown()

    def summaries(self, strict: bool = False) -> Iterator[Summary]:
        """One summary for each core of the cluster."""
        scored = [_score.remote(os.getcwd(), shard, self.image_root, self.options) for shard in self.shards]
        self.scores = [scores for scores, _ in scored]
        n_cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        shares = [[summary for _, summary in scored[core::n_cores]] for core in range(n_cores)]
        _wait([summary for _, summary in scored], "scoring")
        for message in _get([_merge.remote(*share) for share in shares if share]):
            self.message_bytes.append(len(message))
            yield unpack(message)

    def map(self, function: Callable, *args: object, what: str = "reading") -> list:
        """`function(shard, scores, *args)` of each shard, in corpus order."""
        args = [ray.put(arg) for arg in args]
        pairs = zip(self.shards, self.scores, strict=True)
        results = [_call.remote(os.getcwd(), function, *pair, *args) for pair in pairs]
        _wait(results, what)
        return _get(results)

    def ties(self, cut: Cut) -> list[Ties]:
        return self.map(_ties, cut, what="counting ties")

    def emit(self, cut: Cut, folder: Path) -> list[KeptRows]:
        emitted = self.map(_emit, cut, folder, what="writing")
        missing = next((shard for shard in self.shards if not (folder / f"{shard.index}.kept").is_file()), None)
        if missing is not None:
            raise FileNotFoundError(
                f"{folder}: the part of {missing.place} was written on another node and is not here: give an output on "
                "a file system that all nodes share"
            )
        return emitted


def pack(summary: Summary) -> bytes:
    """Compress a summary for sending. Its sorted kinds shrink to a tenth; its hashes of groups do not."""
    return zlib.compress(pickle.dumps(summary), level=1)


def unpack(message: bytes) -> Summary:
    return pickle.loads(zlib.decompress(message))


# ---- tasks


@ray.remote(num_returns=2)
def _score(folder: str, shard: Shard, image_root: str | os.PathLike | None, options: dict) -> tuple[Scores, Summary]:
    os.chdir(folder)  # the driver's folder, to which the names of files are relative
    return score_shard(shard, image_root, **options)


@ray.remote
def _merge(*summaries: Summary) -> bytes:
    return pack(merge(summaries))


@ray.remote
def _call(folder: str, function: Callable, shard: Shard, scores: Scores, *args: object) -> object:
    os.chdir(folder)
    return function(shard, scores, *args)


def _ties(shard: Shard, scores: Scores, cut: Cut) -> Ties:
    return tie_counts(scores, cut)


def _emit(shard: Shard, scores: Scores, cut: Cut, folder: Path) -> KeptRows:
    # Whole or not at all: a dying worker's partial file must not mix with what its successor writes.
    with (
        atomic_output(folder / f"{shard.index}.kept") as kept,
        atomic_output(folder / f"{shard.index}.refused") as refused,
    ):
        with open(kept, "wb", BATCH_BYTES) as kept_file, open(refused, "wb") as refused_file:
            return emit(shard, scores, cut, kept_file, refused_file)


# ---- results


def _wait(results: list[ray.ObjectRef], what: str) -> None:
    with tqdm(total=len(results), unit="shard", delay=2, desc=what) as bar:
        while results:
            done, results = ray.wait(results, fetch_local=False)
            bar.update(len(done))


def _get(results: list[ray.ObjectRef]) -> list:
    try:
        return ray.get(results)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as the local engine raises it
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray could not finish ({type(error).__name__}: {error}): look at the cluster, then run again"
        ) from error
