"""
Exact top fraction of the rollouts of each source, by one of the rules of the paper (arXiv 2602.04145), with evidence.

    rule      a rollout ranks by                            ties
    bis       BIS                                           file order, or a seeded hash
    mixed     1 if it has good and bad steps, else 0        a seeded hash (the paper fills up at random)
    reliable  R, the mean score of its positive steps       file order, or a seeded hash
    low_mc    minus its mean score (lowest first)           file order, or a seeded hash
    random    0                                             a seeded hash

A rule is a score for each rollout; the cut is the same for all: `max(1, int(m * fraction))` of the `m` valid rollouts
of a source, the highest scores first.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset

from .bis import balanced_information, step_scores
from .files import atomic_output
from .rollouts import (
    Paths,
    Refusal,
    Rollout,
    chunks,
    count,
    describe_refusals,
    image_list,
    prompt_text,
    read_lines,
    read_rollouts,
    rollout_files,
)


logger = logging.getLogger(__name__)

SELECTION_VERSION = "1"
RULES = ("bis", "random", "mixed", "reliable", "low_mc")


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
    by: str = "source",
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
            The column whose values are cut one by one.
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
    _check_cut(fraction, ties)
    columns = _columns(_batches(scored, by, score), by, score)
    parameters = {"rule": score, "fraction": fraction, "alpha": None, "ties": ties, "seed": seed}
    return _cut(columns, columns.get(score, np.array([])), parameters)


def select(
    rollouts: Dataset | IterableDataset,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = 0.05,
    ties: str = "first",
    seed: int = 0,
    by: str = "source",
) -> Selection:
    """
    Keep the top `fraction` of each source by one of the rules `bis`, `random`, `mixed`, `reliable`, `low_mc`.

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
    _check_cut(fraction, ties, rule)
    columns = _columns(_batches(rollouts, by), by, alpha=alpha)
    return _select(columns, rule, fraction, alpha, ties, seed)


def select_files(
    inputs: Paths,
    output: str | os.PathLike,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = 0.05,
    ties: str = "first",
    seed: int = 0,
    image_root: str | os.PathLike | None = None,
) -> dict:
    """
    Select from files to files: the rows that [`select`] keeps of [`load_rollouts`], in their own format.

    Writes, each whole or not at all, the kept rows, `selection.json` beside them, and `refused.jsonl` (file, line,
    reason) if a row was refused. `*.jsonl` takes the kept lines as they are, byte by byte; `*.parquet` takes their
    fields, with `source` and `rollout_id`; any other name is a folder with one JSONL file for each input file.

    Args:
        inputs (`str`, path, or `list` of paths):
            As in [`load_rollouts`].
        output (`str` or path):
            `*.jsonl`, `*.parquet`, or a folder.
        image_root (`str` or path, *optional*):
            Folder of the images. Defaults to the folder of each file; if not one image is found there, the annotations
            came without them, and images are not checked (the report says so).

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
    _check_cut(fraction, ties, rule)
    output, files = Path(output), rollout_files(inputs)
    single = output.suffix in {".jsonl", ".parquet"}
    folder = output.parent if single else output
    targets = [output] if single else [output / f"{file.stem}.jsonl" for file in files]
    _check_output(output, targets, files, inputs)

    columns, refusals, places = _read_files(inputs, image_root, alpha)
    unseen = {row.reason for row in refusals if row.reason.startswith("image_")} == {"image_missing"}
    check_images = bool(places) or image_root is not None or not unseen
    if not check_images:
        logger.warning("%s: not one image of these rollouts is on this disk: selecting without them", inputs)
        columns, refusals, places = _read_files(inputs, None, alpha, check_images=False)
    for line in describe_refusals(refusals):
        logger.warning(line)
    if not places:
        raise ValueError(
            f"{inputs}: no row can be used. {'; '.join(describe_refusals(refusals)) or 'No rows at all.'}"
        )
    selection = _select(columns, rule, fraction, alpha, ties, seed, refusals)
    report = selection.report
    report["inputs"] = [str(item) for item in (inputs if isinstance(inputs, list) else [inputs])]
    report["images"] = "checked" if check_images else "not checked"

    kept: dict[str, list[int]] = {str(file): [] for file in files}
    runs: dict[str, list] = {}
    for index in selection.indices:
        file, line, source = places[index]
        kept[file].append(line - 1)
        name = output.name if single else f"{Path(file).stem}.jsonl"
        if not runs.get(name) or runs[name][-1][0] != source:
            runs.setdefault(name, []).append([source, 0])
        runs[name][-1][1] += 1
    # A raw row says its source by its file name alone. Where that name is lost, load_rollouts finds the source here.
    moved = {name: run for name, run in runs.items() if {source for source, _ in run} != {Path(name).stem}}
    report["output"] = {} if output.suffix == ".parquet" else moved
    with ExitStack() as stack:  # leaves in reverse order: the report appears last, when all it tells of is there
        part = stack.enter_context(atomic_output(folder / "selection.json"))
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        if refusals:
            part = stack.enter_context(atomic_output(folder / "refused.jsonl"))
            rows = ({"file": row.file, "line": row.line, "reason": row.reason} for row in refusals)
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        parts = [stack.enter_context(atomic_output(target)) for target in targets]
        if output.suffix == ".parquet":
            names = [{name: columns[name][index] for name in ("source", "rollout_id")} for index in selection.indices]
            _write_parquet(parts[0], kept, names)
        else:
            for number, (file, lines) in enumerate(kept.items()):
                with open(parts[0 if single else number], "ab") as out:
                    out.writelines(line + b"\n" for line in _kept_lines(file, lines))
    if not refusals:
        (folder / "refused.jsonl").unlink(missing_ok=True)  # of an earlier run
    return report


def report_table(report: dict) -> list[list]:
    """The report of a selection as rows of a table, the header first, `total` last."""
    names = ["read", "refused", "valid", "kept", "cut_score", "ties_at_cut", "ties_kept"]
    shares = ["mixed_share", "error_step_share", "mean_mc", "mean_group_size"]
    table = [["source", *names, *shares]]
    for source, row in [*report["sources"].items(), ("total", report["total"])]:
        row = row | {"refused": sum(row["refused"].values())}
        table.append([source, *(row[name] for name in names), *(row[name] for name in shares)])
    return table


# ---- the core: columns -> scores -> cut


def _columns(batches: Iterable[dict], by: str, score: str | None = None, alpha: float = 0.05) -> dict:
    """Read once what a rule and its report need: a few numbers a row, whatever the length of the rows."""
    columns = {"rollout_id": [], "source": [], "group": []}
    numbers: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        for name in ("rollout_id", by, score):
            if name is not None and name not in batch:
                raise ValueError(
                    f"expected a column {name!r}, got {list(batch)}: read the rows with load_rollouts and, to cut by "
                    "bis, map add_bis"
                )
        n_rows = len(batch["rollout_id"])
        prompts, images = batch.get("prompt", [None] * n_rows), batch.get("images", [None] * n_rows)
        columns["rollout_id"] += batch["rollout_id"]
        columns["source"] += [str(source) for source in batch[by]]
        columns["group"] += [
            hash((str(prompt), *map(_image_key, row or ()))) for prompt, row in zip(prompts, images, strict=True)
        ]
        parts = {}
        if score is None or "mc_scores" in batch or "steps_with_score" in batch:
            parts = balanced_information(*step_scores(batch), alpha)
        if score is not None:
            parts[score] = np.array([np.nan if value is None else value for value in batch[score]], dtype=np.float64)
        for name, values in parts.items():
            numbers.setdefault(name, []).append(values)
    _check_ids(columns["rollout_id"])
    return columns | {name: np.concatenate(values) for name, values in numbers.items()}


def _check_ids(rollout_ids: list) -> None:
    seen: dict[str, int] = {}
    for row, rollout_id in enumerate(rollout_ids):
        if not isinstance(rollout_id, str) or seen.setdefault(rollout_id, row) != row:
            what = f"as row {seen[rollout_id]} has" if isinstance(rollout_id, str) else "which is no text"
            raise ValueError(
                f"row {row} has the rollout_id {rollout_id!r}, {what}, and kept rows are named by it: give unique "
                'ids, e.g. .map(lambda row, i: {"rollout_id": str(i)}, with_indices=True)'
            )


def _select(columns: dict, rule: str, fraction: float, alpha: float, ties: str, seed: int, refusals=()) -> Selection:
    score = np.array([])
    if columns["rollout_id"]:
        p_pos = columns["bis_p_pos"]
        valid = np.where(np.isnan(p_pos), np.nan, 0.0)
        score = {
            "bis": columns["bis"],
            "random": valid,
            "mixed": valid + ((p_pos > 0) & (p_pos < 1)),
            "reliable": columns["bis_reliability"],
            "low_mc": valid - columns["mc_sum"] / np.maximum(columns["bis_n_steps"], 1),
        }[rule]
    ties = "hash" if rule in ("random", "mixed") else ties
    alpha = alpha if rule == "bis" else None
    return _cut(
        columns, score, {"rule": rule, "fraction": fraction, "alpha": alpha, "ties": ties, "seed": seed}, refusals
    )


def _cut(columns: dict, score: np.ndarray, parameters: dict, refusals: Iterable[Refusal] = ()) -> Selection:
    fraction, ties, seed = parameters["fraction"], parameters["ties"], parameters["seed"]
    if not columns["rollout_id"]:
        raise ValueError("expected rollouts to select from, got no rows")
    hashes = np.array([_hash(rollout_id, seed) for rollout_id in columns["rollout_id"]] if ties == "hash" else [])
    refused: dict[str, Counter] = {}
    for refusal in refusals:
        refused.setdefault(refusal.source, Counter())[str(refusal.reason)] += 1
    names, source = np.unique(np.array(columns["source"], dtype=object), return_inverse=True)
    order = np.argsort(source, kind="stable")
    rows_of = dict(zip(names, np.split(order, np.cumsum(np.bincount(source))[:-1]), strict=True))
    rows_of |= {name: np.array([], dtype=np.int64) for name in refused if name not in rows_of}

    kept_rows, sources = [], {}
    for name in sorted(rows_of):
        rows = rows_of[name]
        valid = rows[~np.isnan(score[rows])]
        quota = max(1, int(len(valid) * fraction))
        keys = (hashes[valid], -score[valid]) if ties == "hash" else (-score[valid],)
        kept = np.sort(valid[np.lexsort(keys)[:quota]])  # lexsort is stable: equal keys stay in file order
        counts = refused.get(name, Counter()) + Counter({"no_score": len(rows) - len(valid)})
        cut = score[kept].min() if kept.size else None
        sources[name] = {
            "read": len(valid) + sum(counts.values()),
            "refused": dict(counts),
            "valid": len(valid),
            "kept": len(kept),
            "cut_score": None if cut is None else float(cut),
            "ties_at_cut": int((score[valid] == cut).sum()),
            "ties_kept": int((score[kept] == cut).sum()),
            **_describe(columns, kept),
            "before": _describe(columns, valid),
        }
        kept_rows.append(kept)
    kept = np.sort(np.concatenate(kept_rows))
    total = {
        name: sum(row[name] for row in sources.values())
        for name in ("read", "valid", "kept", "ties_at_cut", "ties_kept")
    }
    total |= {"refused": dict(sum((Counter(row["refused"]) for row in sources.values()), Counter()))}
    total |= {"cut_score": None, **_describe(columns, kept)}  # each source has a cut of its own
    total |= {"before": _describe(columns, np.flatnonzero(~np.isnan(score)))}
    report = {**parameters, "version": SELECTION_VERSION, "inputs": [], "sources": sources, "total": total}
    return Selection(tuple(columns["rollout_id"][row] for row in kept), tuple(kept.tolist()), report)


def _describe(columns: dict, rows: np.ndarray) -> dict[str, float | None]:
    """Four numbers of some rows: how mixed, how wrong, how good, and how many share an image and a question."""
    shares = dict.fromkeys(("mixed_share", "error_step_share", "mean_mc", "mean_group_size"))
    if len(rows) and "n_pos" in columns:
        n_steps, n_pos, mc_sum = (columns[name][rows] for name in ("bis_n_steps", "n_pos", "mc_sum"))
        shares["mixed_share"] = float(((n_pos > 0) & (n_pos < n_steps)).mean())
        shares["error_step_share"] = float(1 - n_pos.sum() / max(n_steps.sum(), 1))
        shares["mean_mc"] = float(mc_sum.sum() / max(n_steps.sum(), 1))
    if len(rows):
        shares["mean_group_size"] = len(rows) / len({(columns["source"][row], columns["group"][row]) for row in rows})
    return shares


def _hash(rollout_id: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{rollout_id}".encode(), digest_size=8).digest(), "big")


def _check_cut(fraction: float, ties: str, rule: str = "bis") -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1 (0.1 keeps a tenth), got {fraction!r}")
    if ties not in ("first", "hash"):
        raise ValueError(f'ties must be "first" (file order) or "hash" (seeded, any order), got {ties!r}')


# ---- datasets and files


def _batches(rows: Dataset | IterableDataset, by: str, score: str | None = None) -> Iterator[dict]:
    """The columns that `_columns` reads, as lists; images undecoded."""
    wanted = ("rollout_id", by, score, "mc_scores", "steps_with_score", "prompt", "images")
    if rows.column_names is not None:  # None: a stream after `map`, which learns its columns only when it runs
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    if isinstance(rows, Dataset):
        yield from (table.to_pydict() for table in rows.with_format("arrow").iter(batch_size=1000))
        return
    rows = rows.with_format(None)
    yield from (rows if rows.features is None else rows.decode(False)).iter(batch_size=1000)


def _image_key(image: object) -> object:
    if isinstance(image, dict):
        return image["path"] or image["bytes"]
    return image if isinstance(image, str) else image.tobytes()  # a stream without features may hold decoded images


def _read_files(
    inputs: Paths, image_root: str | os.PathLike | None, alpha: float, check_images: bool = True
) -> tuple[dict, list[Refusal], list[tuple[str, int, str]]]:
    refusals, places = [], []

    def batches() -> Iterator[dict]:
        for items in chunks(read_rollouts(inputs, image_root, check_images), 1000):
            refusals.extend(item for item in items if isinstance(item, Refusal))
            rollouts = [item for item in items if isinstance(item, Rollout)]
            places.extend((item.file, item.line, item.source) for item in rollouts)
            if rollouts:
                names = ("rollout_id", "source", "mc_scores", "prompt", "images")
                yield {name: [item.row[name] for item in rollouts] for name in names}

    return _columns(batches(), "source", alpha=alpha), refusals, places


def _check_output(output: Path, targets: list[Path], files: list[Path], inputs: Paths) -> None:
    folder = targets[0].parent
    if output.is_dir() if output in targets else output.is_file():
        raise ValueError(f"{output}: expected a folder, *.jsonl or *.parquet, and this is the other kind: rename it")
    used = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in used:
            raise ValueError(f"{target} is an input and would be overwritten: give another output")
    folders = [Path(item).resolve() for item in (inputs if isinstance(inputs, list) else [inputs])]
    if folder.resolve() in folders:
        raise ValueError(f"{output} lies in the input folder, where the next run would read it: give another output")
    others = {*folder.glob("*.jsonl"), *folder.glob("*.parquet")} - {*targets, folder / "refused.jsonl"}
    if output not in targets and others:
        raise ValueError(f"{folder} already holds {min(others).name}, which is not of this run: give an empty folder")


def _kept_lines(file: str, numbers: list[int]) -> Iterator[bytes]:
    wanted = set(numbers)
    for number, line in enumerate(read_lines(Path(file))):
        if number in wanted:
            wanted.remove(number)
            yield line
    if wanted:
        raise ValueError(f"{file} became shorter while it was read: select again")


# Fields of the two formats. All others become text, so that rows with different types of `answer` fit.
_STEP = pa.struct(
    {"step": pa.string(), "score": pa.float64(), "num_mc_correct": pa.int64(), "num_mc_total": pa.int64()}
)
_TYPES = {
    "image": pa.list_(pa.string()),
    "images": pa.list_(pa.string()),
    "steps_with_score": pa.list_(_STEP),
    "num_mc_sequences": pa.int64(),
    "completions": pa.list_(pa.string()),
    "labels": pa.list_(pa.float64()),
    "mc_scores": pa.list_(pa.float64()),
    "mc_counts": pa.list_(pa.int64()),
    "mc_total": pa.int64(),
}


def _write_parquet(path: Path, kept: dict[str, list[int]], names: list[dict]) -> None:
    def records() -> Iterator[dict]:
        lines = (line for file, numbers in kept.items() for line in _kept_lines(file, numbers))
        return (_typed(json.loads(line)) | own for line, own in zip(lines, names, strict=True))

    keys = dict.fromkeys(key for record in records() for key in record)
    schema = pa.schema([(key, _TYPES.get(key, pa.string())) for key in keys])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in chunks(records(), 1000):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _typed(record: dict) -> dict:
    raw = record.get("steps_with_score") is not None
    unused = ("completions", "labels", "mc_scores", "mc_counts", "mc_total") if raw else ()
    row = {}
    for key, value in record.items():
        if value is None or key in unused:
            continue
        if key in ("image", "images"):
            value = [image["path"] if isinstance(image, dict) else image for image in image_list({key: value})]
        elif key == "steps_with_score":
            value = [
                {"step": step["step"], "score": None if count(step.get("num_mc_total")) == 0 else step["score"]}
                | {name: count(step.get(name)) for name in ("num_mc_correct", "num_mc_total")}
                for step in value
            ]
        elif key in ("labels", "mc_scores"):
            value = [None if score is None else float(score) for score in value]
        elif key in ("num_mc_sequences", "mc_total"):
            value = count(value)
        elif key == "mc_counts":
            value = [count(number) for number in value]
        elif key == "prompt" and not raw:
            value = prompt_text(record)
        elif key not in _TYPES and not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False)
        row[key] = value
    return row
