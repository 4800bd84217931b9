"""
Monte-Carlo-annotated rollouts of every supported format, read into one row type.

In, a line of the raw annotations of VisualPRM400K-v1.1-Raw (file `Geometry3K.jsonl`; the source is the file name):

    {"image": "VisualPRM400K-v1.1-Raw/Geometry3K/1471.png", "question": "<image>\\n...", "question_orig": "Find x.",
     "steps_with_score": [{"step": "x = 5.", "score": 0.125, "num_mc_correct": 2, "num_mc_total": 16}],
     "num_mc_sequences": 16, "answer": "52", "response": "..."}

or a stepwise row in TRL's former format: {"prompt": "Find x.", "completions": ["x = 5."], "labels": [true]}. Out:

    {"images": [{"path": "/data/images/Geometry3K/1471.png", "bytes": None}], "prompt": "Find x.",
     "completions": ["x = 5."], "labels": [0.125], "mc_scores": [0.125], "mc_counts": [2], "mc_total": 16,
     "source": "Geometry3K", "rollout_id": "Geometry3K:0"}

A row that cannot be used is refused, with one named reason.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Image, IterableDataset, List, Value

from ..files import work_folder
from .hub import is_hub_id
from .reading import Tally, came_without_images, describe_refusals, read_rollouts
from .shards import Paths, SplitFiles, plan_shards
from .splits import local_inputs


logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "images": List(Image()),
        "prompt": Value("string"),
        "completions": List(Value("string")),
        "labels": List(Value("float64")),
        "mc_scores": List(Value("float64")),
        "mc_counts": List(Value("int64")),
        "mc_total": Value("int64"),
        "source": Value("string"),
        "rollout_id": Value("string"),
    }
)

# For rows whose images are missing: `filter` passes whole rows, and would try to open them.
UNDECODED = Features({**FEATURES, "images": List(Image(decode=False))})


def load_rollouts(
    path_or_hub_id: Paths,
    image_root: str | os.PathLike | None = None,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    drop_answer_step: bool = False,
) -> Dataset | IterableDataset:
    """
    Read Monte-Carlo-annotated rollouts into a [`~datasets.Dataset`] with the columns `images`, `prompt`,
    `completions`, `labels`, `mc_scores`, `mc_counts`, `mc_total`, `source`, `rollout_id`.

    `labels` are the scores, with -100 where a step was not measured (`num_mc_total` 0); `mc_scores` is null there.
    Images are paths; they are decoded when a row is read. `rollout_id` is the file name and the line, counted from 0.
    Refused rows are logged, one warning per reason, with counts by source and the first file and line;
    [`~trl_mprm.data.reading.read_rollouts`] yields them one by one.

    A score in quotes (`"0.5"`) is refused as `score_not_a_number`. The paper's reader converts it to a number, but a
    writer that quotes its numbers may also write "nan" or "0,5", and a column that mixes text and numbers breaks every
    typed reader downstream.

    Args:
        path_or_hub_id (`str`, path, or `list` of paths):
            A folder (its files, or its `annotations.zip`), a glob, one file (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`,
            `.parquet`, or a `.zip` of `.jsonl`, read in place), a list of these, a folder written by `save_to_disk`,
            or a dataset on the Hub: its `annotations.zip` if it has one, else one of its splits.
            [`~trl_mprm.data.formats`] has the formats of a row, [`~trl_mprm.data.splits`] the rules for folders.
        image_root (`str` or path, *optional*):
            Folder of the images. Image paths may not leave it. Defaults to the folder of each file; if no image at all
            is found there, the annotations are taken to have come without images: rows keep the paths, which are not
            opened. Such rows can be scored by BIS, filtered and selected, but not trained on.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set: on the Hub, or in a folder with splits in its names (`train.jsonl`,
            `data/test-*.parquet`, `train/*.jsonl`, a saved `DatasetDict`), found as `datasets.load_dataset` finds
            them. A file given by name is read whatever it is called; a folder without split names is all train.
        name (`str`, *optional*):
            Configuration of the data set.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows on demand. The workers of a data loader share the files among them.
        drop_answer_step (`bool`, *optional*, defaults to `False`):
            Drop the label and score of a last step that states the final answer.

    Raises:
        `FileNotFoundError`: no such file, folder or dataset. `ValueError`: no row can be used, no such split, or names
        that leave unclear which split they belong to.

    Examples:
    ```python
    >>> import json, pathlib, tempfile
    >>> from trl_mprm import load_rollouts
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "Algebra.jsonl"
    >>> steps = [{"step": "x = 2.", "score": 0.25, "num_mc_correct": 4, "num_mc_total": 16}]
    >>> _ = file.write_text(json.dumps({"question": "x + 1 = 3?", "steps_with_score": steps}))
    >>> row = load_rollouts(file)[0]
    >>> row["prompt"], row["completions"], row["labels"], row["rollout_id"]
    ('x + 1 = 3?', ['x = 2.'], [0.25], 'Algebra:0')

    ```
    """
    if isinstance(path_or_hub_id, str | os.PathLike) and (saved := _saved(Path(path_or_hub_id), split)) is not None:
        return saved.to_iterable_dataset() if streaming else saved
    options = {"image_root": image_root, "drop_answer_step": drop_answer_step, "split": split, "name": name}
    if streaming:
        parts = _parts(path_or_hub_id, split, name)
        first = chain.from_iterable(read_rollouts(part, streaming=True, **options) for part in parts)
        keep_missing = image_root is None and came_without_images(islice(first, STREAM_AHEAD))
        if keep_missing:
            logger.warning(NO_IMAGES, path_or_hub_id)
        options |= {"parts": parts, "streaming": True, "keep_missing": keep_missing}
        features = UNDECODED if keep_missing else FEATURES
        return IterableDataset.from_generator(_stream, features=features, gen_kwargs=options)
    tally, features = Tally(), FEATURES
    path, n_rows = _write_arrow(tally.rows(read_rollouts(path_or_hub_id, **options)))
    if image_root is None and tally.came_without_images:
        logger.warning(NO_IMAGES, path_or_hub_id)
        tally, features = Tally(), UNDECODED
        path, n_rows = _write_arrow(tally.rows(read_rollouts(path_or_hub_id, keep_missing=True, **options)))
    refused = describe_refusals(tally.refusals)
    for line in refused:
        logger.warning(line)
    if not n_rows:
        raise ValueError(
            f"{path_or_hub_id}: no row can be used. {'; '.join(refused) or 'No rows at all.'} "
            "Expected raw annotations (question, steps_with_score) or stepwise rows (prompt, completions, labels), "
            "with images under image_root"
        )
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    # The fingerprint follows from the content, so that the next run finds the cache of `map`, and never a stale one.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=path.stem)


def _saved(folder: Path, split: str) -> Dataset | None:
    """Load a data set, or one split of several, that `save_to_disk` wrote; None for any other path."""
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"{folder}: no split {split!r}, found {', '.join(saved)}")
    return saved[split]


def _parts(inputs: Paths, split: str, name: str | None) -> list[Paths]:
    """The inputs that workers share among them, each a file or a data set; two of one name are an error."""
    if is_hub_id(inputs):
        return [inputs]
    local = local_inputs(inputs, split, name)
    plan_shards(local)
    parts: list[Paths] = []
    for item in local if isinstance(local, list) else [local]:
        whole = isinstance(item, SplitFiles)
        parts += [item] if whole else dict.fromkeys(shard.file for shard in plan_shards(item))
    return parts


NO_IMAGES = (
    "%s: not one image of these rollouts is on this disk. They can be scored, filtered and selected; to train on them, "
    "pass the folder of the images as image_root"
)

STREAM_AHEAD = 1000  # the first rows of a stream decide whether the annotations came without their images


def _stream(parts: list[Paths], **options: Any) -> Iterator[dict]:
    """Yield the usable rows; at the end log one warning per reason for refusing others."""
    tally = Tally()
    for part in parts:
        yield from tally.rows(read_rollouts(part, **options))
    for line in describe_refusals(tally.refusals):
        logger.warning(line)


def _write_arrow(rows: Iterable[dict]) -> tuple[Path, int]:
    """Write rows to an Arrow file in the cache of `datasets`, named by its content; return its path and their number."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_mprm"
    schema, n_rows = FEATURES.arrow_schema, 0
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = stack.enter_context(work_folder(folder, "rows")) / "rows.arrow"
        except OSError as error:
            raise OSError(
                f"cannot keep the rows in {folder} ({error.strerror}): set HF_HOME to a folder that can be written"
            ) from error
        with open(part, "xb+") as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for chunk in chunks(rows, 1000):
                    writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                    n_rows += len(chunk)
            file.seek(0)
            path = folder / f"{hashlib.file_digest(file, 'blake2b').hexdigest()[:32]}.arrow"
        part.replace(path)
    return path, n_rows


def chunks(rows: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` rows; the last one may be shorter."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk
