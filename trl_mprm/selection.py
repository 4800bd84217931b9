"""
Exact top fraction of the rollouts of each source, by one of the rules of the paper (arXiv 2602.04145), with evidence.

    rule      a rollout ranks by                            ties
    bis       BIS                                           file order, or a seeded hash
    mixed     1 if it has good and bad steps, else 0        a seeded hash (the paper fills up at random)
    reliable  R, the mean score of its positive steps       file order, or a seeded hash
    low_mc    minus its mean score (lowest first)           file order, or a seeded hash
    random    0                                             a seeded hash

A rule is a score for each rollout; the cut is the same for all: `max(1, int(m * fraction))` of the `m` valid rollouts
of a source, or of the whole corpus, the highest scores first.
"""

import ctypes
import errno
import fcntl
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from .bis import step_scores, step_sums
from .cut import (
    KIND,
    REASONS,
    RULES,
    UNKNOWN,
    Cut,
    Scores,
    Summary,
    Ties,
    describe,
    describe_refused,
    find_cut,
    kept_rows,
    merge,
    settle,
    summarize,
    tie_counts,
    ties_of_sources,
)
from .outputs import Outputs
from .rollouts import local_inputs
from .scan import Emitted, emit, group_hash, score_shard
from .shards import Paths, Shard, plan_shards


logger = logging.getLogger(__name__)

SELECTION_VERSION = "2"
SHARES = ("mixed_share", "error_step_share", "mean_mc", "mean_group_size")
POOL_BYTES = 2**25  # a corpus above this size is worth a process a core


@dataclass(frozen=True)
class Selection:
    """
    The rollouts that a rule kept. Called with a row, a batch or an Arrow table, it tells which of them are kept:
    `dataset.filter(selection)`. Picklable, with a fingerprint that is the same in every process.

    Attributes:
        kept (`tuple[str]`): `rollout_id` of the kept rollouts, in file order.
        indices (`tuple[int]`): Their row numbers: `dataset.select(selection.indices)`.
        report (`dict`): What `selection.json` holds: rule, parameters, and per source the counts and the cut.
    """

    kept: tuple[str, ...]
    indices: tuple[int, ...]
    report: dict = field(repr=False)
    version: str = SELECTION_VERSION

    def __post_init__(self):
        object.__setattr__(self, "_kept", frozenset(self.kept))

    def __reduce__(self):  # without the set: its order, and so its pickle, differs from process to process
        return Selection, (self.kept, self.indices, self.report, self.version)

    def __call__(self, row: dict | pa.Table) -> bool | list[bool] | pa.Array:
        ids = row["rollout_id"]
        if isinstance(row, pa.Table):
            return pa.array([rollout_id in self._kept for rollout_id in ids.to_pylist()], pa.bool_())
        return ids in self._kept if isinstance(ids, str) else [rollout_id in self._kept for rollout_id in ids]


def top_fraction(
    scored: Dataset | IterableDataset,
    fraction: float,
    *,
    by: str | None = "source",
    score: str = "bis",
    ties: str = "first",
    seed: int = 0,
) -> Selection:
    """
    Keep exactly `max(1, int(m * fraction))` of the `m` rollouts of each source that have a score.

    The product is taken in floating point, as the paper's script does: 0.29 of 100 rollouts is 28, because
    `100 * 0.29` is 28.999999999999996.

    Args:
        scored (`Dataset` or `IterableDataset`):
            Rows with `rollout_id` (unique) and the columns `by` and `score`; see [`add_bis`]. Any format. A stream is
            read once.
        fraction (`float`):
            Share to keep, above 0 and at most 1.
        by (`str`, *optional*, defaults to `"source"`):
            The column whose values are cut one by one. None: one cut for all rows; the report tells of each source.
        score (`str`, *optional*, defaults to `"bis"`):
            The column to rank by, highest first. Rows with null or NaN are not valid.
        ties (`str`, *optional*, defaults to `"first"`):
            Among equal scores, `"first"` takes the rows that come first, as the paper's code does. `"hash"` takes
            them by a seeded hash of `rollout_id`, whatever the order of the rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the hash.

    Returns:
        [`Selection`]: A predicate for `.filter` (with `batched=True` in arrow format), with `.report`.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm import top_fraction
    >>> rows = {"rollout_id": ["a", "b", "c", "d"], "source": ["x"] * 4, "bis": [0.05, 0.15, 0.05, None]}
    >>> best = top_fraction(Dataset.from_dict(rows), 0.7)  # int(3 * 0.7) = 2 of the 3 with a score
    >>> best.kept, best.report["total"]["ties_at_cut"], best.report["total"]["ties_kept"]
    (('a', 'b'), 2, 1)

    ```
    """
    check_cut(fraction, ties, seed=seed)
    return _select(_batches(scored, by, score), by, score, score, fraction=fraction, alpha=None, ties=ties, seed=seed)


def select(
    rollouts: Dataset | IterableDataset,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = 0.05,
    ties: str = "first",
    seed: int = 0,
    by: str | None = "source",
) -> Selection:
    """
    Keep the top `fraction` of each source, or with `by=None` of all rows together, by one of the rules `bis`, `random`,
    `mixed`, `reliable`, `low_mc`.

    `select(rollouts, "bis", fraction=f, alpha=a)` keeps what `top_fraction(rollouts.map(add_bis, ...), f)` keeps. The
    arguments are those of [`top_fraction`]; `alpha` is the paper's, for the rule `bis`; `random` and `mixed` always
    break ties by the seeded hash.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm import select
    >>> scores = [[1.0, 1.0], [0.75, 0.0], [0.25, 0.5]]
    >>> rows = Dataset.from_dict({"rollout_id": ["a", "b", "c"], "source": ["x"] * 3, "mc_scores": scores})
    >>> [select(rows, rule, fraction=0.34).kept for rule in ("bis", "mixed", "reliable", "low_mc")]
    [('b',), ('b',), ('a',), ('b',)]

    ```
    """
    check_cut(fraction, ties, rule, alpha, seed)
    return _select(_batches(rollouts, by), by, None, rule, fraction=fraction, alpha=alpha, ties=ties, seed=seed)


def select_files(
    inputs: Paths,
    output: str | os.PathLike,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = 0.05,
    ties: str = "first",
    seed: int = 0,
    by: str = "source",
    image_root: str | os.PathLike | None = None,
    drop_answer_step: bool = False,
    strict: bool = False,
    save_to_disk: bool = False,
    push_to_hub: str | None = None,
    license: str | None = None,
    engine: str = "local",
    page: str | os.PathLike | None = None,
) -> dict:
    """
    Select from files to files: the rows that [`select`] keeps of [`load_rollouts`], in their own format.

    Writes, each whole or not at all, the kept rows, `selection.json` beside them, and `refused.jsonl` (file, line,
    reason) if a row was refused. `*.jsonl` takes the kept lines as they are, byte by byte; `*.parquet` takes them in
    the row type of [`load_rollouts`], with further fields as text; any other name is a folder with one JSONL file for
    each input file. A run that is killed leaves nothing under these names, and a later one gives the same bytes.

    Args:
        inputs (`str`, path, or `list` of paths):
            As in [`load_rollouts`].
        output (`str` or path):
            `*.jsonl`, `*.parquet`, or a folder.
        by (`str`, *optional*, defaults to `"source"`):
            `"source"`: the top fraction of each source; `"corpus"`: of all rows together.
        image_root (`str` or path, *optional*):
            Folder of the images. Defaults to the folder of each file; if not one image is found there, the annotations
            came without them, and images are not checked (the report says so).
        drop_answer_step (`bool`, *optional*, defaults to `False`):
            Take a last step that states the final answer for not measured. JSONL lines stay as they are: pass the same
            to [`load_rollouts`].
        strict (`bool`, *optional*, defaults to `False`):
            Raise at the first refused row, and write nothing.
        save_to_disk (`bool`, *optional*, defaults to `False`):
            Make `output` a folder for `datasets.load_from_disk`.
        push_to_hub (`str`, *optional*):
            Also publish the kept rows, with their images and a card, as this dataset of the Hub.
        license (`str`, *optional*):
            Licence on that card, as a Hub identifier. Defaults to that of the source, where it is a dataset on the Hub.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"`: a process for each core; `"ray"`: the workers of a Ray cluster. Both give the same bytes.
        page (`str` or path, *optional*):
            Also write one HTML page about the selection there, see [`~trl_mprm.selection_report`].

    Returns:
        `dict`: The content of `selection.json`. [`report_table`] makes table rows of it.

    Examples:
    ```python
    >>> import json, pathlib, tempfile
    >>> from trl_mprm.selection import select_files
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [{"prompt": "?", "completions": ["a", "b"], "labels": labels} for labels in ([1, 1], [1, 0], ["1", 0])]
    >>> _ = (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    >>> report = select_files(folder / "toy.jsonl", folder / "kept", fraction=0.5)
    >>> print((folder / "kept" / "toy.jsonl").read_text().strip())
    {"prompt": "?", "completions": ["a", "b"], "labels": [1, 0]}
    >>> report["total"]["read"], report["total"]["refused"], report["total"]["kept"]
    (3, {'score_not_a_number': 1}, 1)

    ```
    """
    check_cut(fraction, ties, rule, alpha, seed)
    by = column_of(by)
    shards = plan_shards(local_inputs(inputs))
    outputs = Outputs(Path(output), shards, inputs, save_to_disk, image_root, page)

    with find_engine(engine)(shards, image_root, drop_answer_step) as run:
        summary = merge(run.summaries(strict))
        cut = find_cut(
            summary,
            rule,
            fraction=fraction,
            alpha=alpha,
            ties=ties,
            seed=seed,
            by=by,
            images_required=image_root is not None,
        )
        refused = describe_refused(summary, cut)
        if strict and refused:
            raise ValueError(f"{inputs}: {refused[0]}, and strict allows none")
        for line in refused:
            logger.warning(line)
        if not cut.check_images:
            logger.warning("%s: not one image of these rollouts is on this disk: selecting without them", inputs)
        if not cut.valid.any():
            raise ValueError(f"{inputs}: no row can be used. {'; '.join(refused) or 'No rows at all.'}")
        while not cut.settled:
            cut = settle(cut, run.ties(cut))
        outputs.folder.mkdir(parents=True, exist_ok=True)
        with _room_left(outputs.folder), _work_folder(outputs.folder) as parts:
            emitted = run.emit(cut, parts)
            kept = merge(part.summary for part in emitted)
            report = build_report(cut, summary, kept) | {
                "inputs": outputs.inputs,
                "images": "checked" if cut.check_images else "not checked",
                "drop_answer_step": drop_answer_step,
            }
            text = None
            if page is not None:
                from .selection_report import draw_selection_report

                text = draw_selection_report(report, summary, kept, cut, run, alpha)
            outputs.write(report, emitted, parts, text)
            if push_to_hub is not None:
                outputs.push_to_hub(push_to_hub, report, emitted, parts, license)
    return report


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """
    A hidden folder for the parts, deleted at the end. It is locked while this process lives; one whose lock is free is
    of a run that was killed, and is deleted here.
    """
    for left in folder.glob(".select.*.part"):
        with suppress(OSError), _locked(left):  # in use, or no locks on this file system: leave it
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".select.", suffix=".part", dir=folder) as name, ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(Path(name)))
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def _room_left(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder}: expected room for the kept rows and for a copy of them, got {error.strerror!r}: free some and "
            "run again; no output was touched"
        ) from error


def find_engine(name: str) -> type:
    if name == "local":
        return LocalRun
    if name == "ray":
        from .ray_engine import RayRun

        return RayRun
    raise ValueError(f"engine must be local or ray, got {name!r}")


class LocalRun:
    """The passes over all shards, in this process or, where that is quicker, in one process a core."""

    def __init__(
        self,
        shards: list[Shard],
        image_root: str | os.PathLike | None = None,
        drop_answer_step: bool = False,
        words: bool = False,
    ):
        self.shards, self.image_root = shards, image_root
        self.options = {"drop_answer_step": drop_answer_step, "words": words}
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

    def emit(self, cut: Cut, folder: Path) -> list[Emitted]:
        return self.map(_emit_parts, cut, folder)

    def _each(self, function: Callable, *columns: Iterable) -> Iterator:
        if self.pool is None:
            yield from map(function, *columns)
            return
        try:
            yield from self.pool.map(function, *columns)
        except BrokenProcessPool as error:
            raise OSError("a worker process was killed, perhaps for want of memory: run again") from error


def _start_worker() -> None:
    gc.freeze()  # what the parent made is not looked through, and so not copied
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed parent leaves no worker behind


def _count_ties(shard: Shard, scores: Scores, cut: Cut) -> Ties:
    return tie_counts(scores, cut)


def _emit_parts(shard: Shard, scores: Scores, cut: Cut, folder: Path) -> Emitted:
    with open(folder / f"{shard.index}.kept", "wb") as kept, open(folder / f"{shard.index}.refused", "wb") as refused:
        return emit(shard, scores, cut, kept, refused)


def _size(shard: Shard) -> int:
    return shard.stamp[0] if shard.stop is None else shard.stop - shard.start


def report_table(report: dict) -> list[list]:
    """The report of a selection as rows of a table, the header first, `total` last."""
    names = ["read", "refused", "valid", "kept", "cut_score", "ties_at_cut", "ties_kept"]
    table = [["source", *names, *SHARES]]
    for source, row in [*report["sources"].items(), ("total", report["total"])]:
        row = row | {"refused": sum(row["refused"].values())}
        table.append([source, *(row[name] for name in names), *(row[name] for name in SHARES)])
    return table


# ---- datasets


def _select(batches: Iterable[dict], by: str | None, score: str | None, rule: str, **parameters) -> Selection:
    """Rows of a dataset are one shard of the core in `cut`."""
    ids, scores = _score_rows(batches, by, score)
    summary = summarize(scores)
    cut = find_cut(summary, rule, by=by, **parameters)
    while not cut.settled:
        cut = settle(cut, [tie_counts(scores, cut)])
    rows = kept_rows(scores, cut)
    kept = tuple(ids[row] for row in rows)
    revision = xxhash.xxh3_128_hexdigest("\n".join(kept).encode())
    report = build_report(cut, summary, summarize(scores, rows)) | {"revision": revision}
    return Selection(kept, tuple(rows.tolist()), report)


def _score_rows(batches: Iterable[dict], by: str | None, score: str | None) -> tuple[list[str], Scores]:
    """Read once what a rule and its report need: a few numbers a row, whatever the length of the rows."""
    ids, groups, kind = [], [], []
    numbers: dict[str, int] = {}
    kinds: dict[tuple, int] = {}
    for batch in batches:
        for name in ("rollout_id", by, score):
            if name is not None and name not in batch:
                raise ValueError(
                    f"expected a column {name!r}, got {list(batch)}: read the rows with load_rollouts and, to cut by "
                    "bis, map add_bis"
                )
        n_rows = len(batch["rollout_id"])
        prompts, images = batch.get("prompt", [None] * n_rows), batch.get("images", [None] * n_rows)
        sources = [str(source) for source in batch.get(by or "source", ["all"] * n_rows)]
        ids += batch["rollout_id"]
        groups += [
            group_hash(source, str(prompt), row or ())
            for source, prompt, row in zip(sources, prompts, images, strict=True)
        ]
        if score is None or "mc_scores" in batch or "steps_with_score" in batch:
            n_steps, n_pos, mc_sum, valid = step_sums(*step_scores(batch))
        else:
            n_steps, n_pos, mc_sum, valid = np.zeros((4, n_rows), int)
            mc_sum = mc_sum + UNKNOWN
        values = np.zeros(n_rows)
        if score is not None:
            values = np.array([np.nan if value is None else value for value in batch[score]], dtype=np.float64)
            valid = ~np.isnan(values)
        place = [numbers.setdefault(source, len(numbers)) for source in sources]
        columns = (n_steps, n_pos, mc_sum, np.where(valid, values, 0))
        reason = np.where(valid, -1, REASONS.index("no_score")).tolist()
        for key in zip(place, reason, *(column.tolist() for column in columns), strict=True):
            kind.append(kinds.setdefault(key, len(kinds)))
    if not ids:
        raise ValueError("expected rollouts to select from, got no rows")
    _check_ids(ids)
    keys = [(source, reason, reason, *sums) for source, reason, *sums, _ in kinds]
    column = None if score is None else np.array([key[-1] for key in kinds])
    kind, group = np.array(kind, np.int32), np.array(groups, np.uint64)
    scores = Scores(0, "", "", tuple(numbers), np.array(keys, KIND), kind, group, score=column)
    return ids, replace(scores, ids=pa.array(ids, pa.string()))


def _check_ids(rollout_ids: list) -> None:
    seen: dict[str, int] = {}
    for row, rollout_id in enumerate(rollout_ids):
        if not isinstance(rollout_id, str) or seen.setdefault(rollout_id, row) != row:
            what = f"as row {seen[rollout_id]} has" if isinstance(rollout_id, str) else "which is no text"
            raise ValueError(
                f"row {row} has the rollout_id {rollout_id!r}, {what}, and kept rows are named by it: give unique "
                'ids, e.g. .map(lambda row, i: {"rollout_id": str(i)}, with_indices=True)'
            )


def build_report(cut: Cut, summary: Summary, kept: Summary) -> dict:
    """
    What `selection.json` holds: for each source, and for all together, read = kept + dropped + refused.

    Args:
        cut ([`~trl_mprm.cut.Cut`]):
            The settled cut.
        summary, kept ([`~trl_mprm.cut.Summary`]):
            Of all rows that were read, and of those that were written.
    """
    kinds, count = summary.kinds, summary.count.astype(np.int64)
    reason = kinds["reason" if cut.check_images else "unread"]
    ends = np.searchsorted(kinds["source"], np.arange(len(cut.sources) + 1))
    ties, ties_kept = ties_of_sources(summary, cut), ties_of_sources(kept, cut)
    rows, whole = {}, cut.parameters["by"] == "corpus"  # else each source has a cut of its own
    for number, source in [*enumerate(cut.sources), (None, None)]:
        mine, at = (slice(None),) * 2 if source is None else (slice(*ends[number : number + 2]), [number])
        by_reason = np.bincount(reason[mine] + 1, count[mine], len(REASONS) + 1).astype(int).tolist()
        valid, refused = by_reason[0], {name: n for name, n in zip(REASONS, by_reason[1:], strict=True) if n}
        after, before = (describe(part, cut.check_images, source) for part in (kept, summary))
        rows[source] = {
            "read": sum(by_reason),
            "refused": refused,
            "valid": valid,
            "kept": after["n"],
            "dropped": valid - after["n"],
            "cut_score": float(cut.cut_score[cut.part[at]][0]) if valid and (source is not None or whole) else None,
            "ties_at_cut": int(ties[at].sum()),
            "ties_kept": int(ties_kept[at].sum()),
            **{name: after[name] for name in SHARES},
            "before": {name: before[name] for name in SHARES},
        }
    total = rows.pop(None)
    _check_quotas(cut, [row["valid"] for row in rows.values()], [row["kept"] for row in rows.values()])
    groups = "all" if not summary.halved else f"1 in {2**summary.halved}, by hash"
    report = {**cut.parameters, "version": SELECTION_VERSION, "inputs": [], "groups_counted": groups}
    return report | {"sources": rows, "total": total}


def _check_quotas(cut: Cut, valid: list[int], kept: list[int]) -> None:
    """What was written is what the cut asked for, or the core is wrong."""
    quotas = [max(1, int(m * cut.parameters["fraction"])) if m else 0 for m in cut.valid.tolist()]
    found = [np.bincount(cut.part, rows, len(quotas)).astype(int).tolist() for rows in (valid, kept)]
    if found != [cut.valid.tolist(), quotas]:
        raise RuntimeError(f"{cut.valid.tolist()} valid rows should give {quotas}, got {found[0]} and {found[1]}")


def column_of(by: str) -> str | None:
    """What `--by` says, for [`~trl_mprm.cut.find_cut`]."""
    if by not in ("source", "corpus"):
        raise ValueError(f'by must be "source" (each is cut on its own) or "corpus" (all rows together), got {by!r}')
    return None if by == "corpus" else by


def check_cut(fraction: float, ties: str, rule: str = "bis", alpha: float = 0.05, seed: int = 0) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1 (0.1 keeps a tenth), got {fraction!r}")
    if ties not in ("first", "hash"):
        raise ValueError(f'ties must be "first" (file order) or "hash" (seeded, any order), got {ties!r}')
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a number of at least 0 (the paper uses 0.05 and 0.2), got {alpha!r}")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")


def _batches(rows: Dataset | IterableDataset, by: str | None, score: str | None = None) -> Iterator[dict]:
    """The columns that `_columns` reads, as lists; images undecoded."""
    wanted = ("rollout_id", by or "source", score, "mc_scores", "steps_with_score", "prompt", "images")
    if rows.column_names is not None:  # None: a stream after `map`, which learns its columns only when it runs
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    if isinstance(rows, Dataset):
        yield from (table.to_pydict() for table in rows.with_format("arrow").iter(batch_size=1000))
        return
    rows = rows.with_format(None)
    yield from (rows if rows.features is None else rows.decode(False)).iter(batch_size=1000)
