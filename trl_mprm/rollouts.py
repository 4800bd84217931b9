"""
Monte-Carlo-annotated rollouts of every supported format, read into one row type.

In, a line of the raw annotations of VisualPRM400K-v1.1-Raw (file `Geometry3K.jsonl`; the source is the file name):

    {"image": "VisualPRM400K-v1.1-Raw/Geometry3K/1471.png", "question": "<image>\\n...", "question_orig": "Find x.",
     "steps_with_score": [{"step": "x = 5.", "score": 0.125, "num_mc_correct": 2, "num_mc_total": 16}],
     "num_mc_sequences": 16, "answer": "52", "response": "..."}

or a stepwise row as TRL had it: {"prompt": "Find x.", "completions": ["x = 5."], "labels": [true]}. Out:

    {"images": [{"path": "/data/images/Geometry3K/1471.png", "bytes": None}], "prompt": "Find x.",
     "completions": ["x = 5."], "labels": [0.125], "mc_scores": [0.125], "mc_counts": [2], "mc_total": 16,
     "source": "Geometry3K", "rollout_id": "Geometry3K:0"}

A row that cannot be used is refused, for one named reason.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo, Features, Image, List, Value
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from tqdm.auto import tqdm

from .images import ImageFinder, ImageRefused, check_image


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
Paths = str | os.PathLike | list[str | os.PathLike]


class Reason(StrEnum):
    """Why a row is refused. The first reason that holds is the one that is named."""

    NOT_JSON = "not_json"  # the line is no JSON object
    PROMPT_MISSING = "prompt_missing"  # no question, an empty one, or a chat that is not one user turn of text
    EMPTY_STEPS = "empty_steps"  # neither `steps_with_score` nor `completions`, or an empty list
    STEP_WITHOUT_TEXT = "step_without_text"
    TEXT_NOT_UNICODE = "text_not_unicode"  # a lone surrogate, which no file and no tokenizer can hold
    LABELS_NOT_ONE_A_STEP = "labels_not_one_a_step"  # labels, mc_scores or mc_counts: another length than the steps
    STEP_WITHOUT_SCORE = "step_without_score"
    SCORE_NOT_A_NUMBER = "score_not_a_number"  # quoted, bool, NaN
    SCORE_OUT_OF_RANGE = "score_out_of_range"  # outside [0, 1]
    NOTHING_MEASURED = "nothing_measured"  # no step was measured (num_mc_total 0, or label -100, everywhere)
    IMAGE_NOT_A_PATH = "image_not_a_path"
    IMAGE_MISSING = "image_missing"
    IMAGE_OUTSIDE_ROOT = "image_outside_root"  # links followed
    IMAGE_UNREADABLE = "image_unreadable"  # no picture, cut short, or more than MAX_PIXELS pixels


class Refusal(NamedTuple):
    """A row that was not used. `line` counts from 1, as editors do."""

    file: str
    line: int
    source: str
    reason: Reason


class Rollout(NamedTuple):
    """A row with the place it came from. `line` counts from 1, as editors do; `source` is the one by file name."""

    file: str
    line: int
    source: str
    row: dict


class _Refused(Exception):
    """Carries its reason from the check that fails to the loop over rows."""


def load_rollouts(path_or_hub_id: Paths, image_root: str | os.PathLike | None = None) -> Dataset:
    """
    Read Monte-Carlo-annotated rollouts into a [`~datasets.Dataset`] with the columns `images`, `prompt`,
    `completions`, `labels`, `mc_scores`, `mc_counts`, `mc_total`, `source`, `rollout_id`.

    `labels` are the scores, with -100 where a step was not measured (`num_mc_total` 0), and `mc_scores` is null there.
    Images are paths; they are decoded when a row is read. `rollout_id` is the file name and the line from 0. Refused
    rows are logged: one warning a reason, with counts by source and the first file and line;
    [`~trl_mprm.rollouts.read_rollouts`] hands them out one by one.

    A score in quotes (`"0.5"`) is refused as `score_not_a_number`. The paper's reader turns it into a number, but a
    writer that quotes its numbers may as well write "nan" or "0,5", and a column that is half text breaks every
    typed reader after this one.

    Args:
        path_or_hub_id (`str`, path, or `list` of paths):
            A folder of `*.jsonl` files, one file (also Parquet as `trl-mprm select` writes it), a list of these, or a
            dataset on the Hub: its `annotations.zip` where there is one, else its split `train`.
        image_root (`str` or path, *optional*):
            Folder of the images. Image paths stay inside it. Defaults to the folder of each file.

    Raises:
        `FileNotFoundError`: no such file, folder or dataset. `ValueError`: no row can be used.

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
    on_hub = _is_hub_id(path_or_hub_id)
    refusals = []

    def rows() -> Iterator[dict]:
        for item in read_rollouts(path_or_hub_id, image_root):
            if isinstance(item, Rollout):
                yield item.row
                continue
            if on_hub and image_root is None and item.reason is Reason.IMAGE_MISSING:
                raise ValueError(
                    f"{path_or_hub_id} names images that are not on this disk ({item.file}:{item.line}): download and "
                    "unpack the images of that dataset, and pass their folder as image_root"
                )
            refusals.append(item)

    path, n_rows = _write_arrow(rows())
    for line in describe_refusals(refusals):
        logger.warning(line)
    if not n_rows:
        raise ValueError(
            f"{path_or_hub_id}: no row can be used. {'; '.join(describe_refusals(refusals)) or 'No rows at all.'} "
            "Expected raw annotations (question, steps_with_score) or stepwise rows (prompt, completions, labels), "
            "with images under image_root"
        )
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    # The fingerprint is the content: `map` finds its cache again in the next run, and never a stale one.
    return Dataset(table, info=DatasetInfo(features=FEATURES), fingerprint=path.stem)


def read_rollouts(
    inputs: Paths, image_root: str | os.PathLike | None = None, check_images: bool = True
) -> Iterator[Rollout | Refusal]:
    """
    Read rollouts one by one: a [`Rollout`] for each row that can be used, a [`Refusal`] for each that cannot.

    An image is checked once, by its header and its last bytes: a known format, at most `MAX_PIXELS` pixels, the end
    mark of PNG or JPEG present. Only a file without that mark is decoded. `check_images=False` leaves image paths as
    they are and does not look for the files.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.rollouts import read_rollouts
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = file.write_text('{"prompt": "1 + 1?", "completions": ["2"], "labels": [true]}\\n{"prompt": "1 + 2?"}\\n')
    >>> for item in read_rollouts(file):
    ...     print(item.line, item.row["labels"] if hasattr(item, "row") else item.reason)
    1 [1.0]
    2 empty_steps

    ```
    """
    finders: dict[Path | None, ImageFinder] = {}
    for file, folder, number, source, record in _records(inputs):
        root = folder if image_root is None else Path(image_root)
        if root not in finders:
            finders[root] = ImageFinder(root, check_images)
        try:
            row = _to_row(record, finders[root])
            # Known by file and line, not by its own source: two files may share a source.
            row["source"] = _own(record, "source") or source
            row["rollout_id"] = _own(record, "rollout_id") or f"{source}:{number}"
        except _Refused as refused:
            yield Refusal(file, number + 1, record and _own(record, "source") or source, refused.args[0])
        else:
            yield Rollout(file, number + 1, source, row)


def describe_refusals(refusals: Iterable[Refusal]) -> list[str]:
    """One line a reason: how many rows, of which sources, and where the first one stands."""
    by_reason: dict[Reason, list[Refusal]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal)
    lines = []
    for reason, rows in by_reason.items():
        sources = ", ".join(f"{source} {count:,}" for source, count in Counter(row.source for row in rows).items())
        lines.append(f"{reason}: refused {len(rows):,} rows ({sources}), the first at {rows[0].file}:{rows[0].line}")
    return lines


# ---- files


def rollout_files(inputs: Paths) -> list[Path]:
    """The files that `inputs` names: a folder's `*.jsonl` and `*.parquet` by name, or the annotations of a Hub id."""
    if isinstance(inputs, list):
        files = [file for item in inputs for file in rollout_files(item)]
    elif Path(inputs).is_dir():
        # refused.jsonl is what `trl-mprm select` could not use
        names = sorted(entry for entry in Path(inputs).iterdir() if entry.suffix in {".jsonl", ".parquet"})
        files = [entry for entry in names if entry.name != "refused.jsonl"]
    elif Path(inputs).is_file():
        files = [Path(inputs)]
    elif _is_hub_id(inputs):
        files = rollout_files(folder) if (folder := _hub_annotations(inputs)) else []
    else:
        raise FileNotFoundError(f"{inputs}: no such file or folder, and no dataset id (org/name) of the Hub")
    if not files:
        raise FileNotFoundError(f"{inputs}: expected *.jsonl files with rollouts, found none")
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(file.stem, file)) is not file:
            raise ValueError(f"{other} and {file} have one name, and the name is the source: rename one of them")
    return files


def read_lines(file: Path) -> Iterator[bytes]:
    """Lines of a JSONL file without their line ends; rows of a Parquet file as JSON."""
    if file.suffix != ".parquet":
        with open(file, "rb") as lines:
            yield from (line.removesuffix(b"\n") for line in lines)
        return
    for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
        for record in batch.to_pylist():
            record = {key: value for key, value in record.items() if value is not None}
            try:
                yield json.dumps(record, ensure_ascii=False).encode()
            except (TypeError, UnicodeEncodeError) as error:
                raise ValueError(f"{file}: expected rows as trl-mprm select writes them, but {error}") from error


def _records(inputs: Paths) -> Iterator[tuple[str, Path | None, int, str, object]]:
    """File, its folder, line from 0, source by file name, and the parsed line (None: no JSON object) of every row."""
    if _is_hub_id(inputs) and _hub_annotations(inputs) is None:
        for number, record in enumerate(_hub_rows(inputs)):
            yield str(inputs), None, number, str(inputs).split("/")[-1], record
        return
    files = rollout_files(inputs)
    with tqdm(total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, delay=2) as bar:
        for file in files:
            bar.set_description(f"reading {file.name}", refresh=False)  # a refresh would ignore `delay`
            sources, number = _kept_sources(file), -1
            for number, line in enumerate(read_lines(file)):
                bar.update(len(line) + 1)
                source = sources[number] if sources and number < len(sources) else file.stem
                if line.strip():
                    yield str(file), file.parent, number, source, _parse(line)
            if sources and len(sources) != number + 1:
                raise ValueError(
                    f"{file} has {number + 1} lines, but selection.json beside it tells the sources of "
                    f"{len(sources)}: select again, or delete selection.json"
                )


def _kept_sources(file: Path) -> list[str]:
    """Source of each line of a file in which `trl-mprm select` put several sources together, else nothing."""
    report = file.parent / "selection.json"
    if not report.is_file():
        return []
    try:
        runs = json.loads(report.read_bytes()).get("output", {}).get(file.name, [])
        return [source for source, rows in runs for _ in range(rows)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{report}: expected the report of trl-mprm select, got {error}: delete it") from error


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _write_arrow(rows: Iterable[dict]) -> tuple[Path, int]:
    """Write rows to an Arrow file in the cache of `datasets`, named by its content, and count them."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl_mprm"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{uuid.uuid4().hex}.part"
    schema, n_rows = FEATURES.arrow_schema, 0
    try:
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for chunk in chunks(rows, 1000):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                n_rows += len(chunk)
        with open(part, "rb") as file:
            path = folder / f"{hashlib.file_digest(file, 'blake2b').hexdigest()[:32]}.arrow"
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path, n_rows


def chunks(rows: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` rows; the last one may be shorter."""
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


# ---- one row


def _to_row(record: dict | None, images: ImageFinder) -> dict:
    if record is None:
        raise _Refused(Reason.NOT_JSON)
    row = _raw_row(record) if record.get("steps_with_score") is not None else _stepwise_row(record)
    if all(score is None for score in row["mc_scores"]):
        raise _Refused(Reason.NOTHING_MEASURED)
    row["images"] = [_find_image(image, images) for image in image_list(record)]
    return row


def _raw_row(record: dict) -> dict:
    prompt = prompt_text(record)
    steps = record["steps_with_score"]
    if not isinstance(steps, list) or not steps:
        raise _Refused(Reason.EMPTY_STEPS)
    if not all(isinstance(step, dict) for step in steps):
        raise _Refused(Reason.STEP_WITHOUT_TEXT)
    completions = _step_texts([step.get("step") for step in steps])
    totals = [count(step.get("num_mc_total")) for step in steps]
    # num_mc_total 0: the annotation stopped before this step and wrote a score of 0.0 that nobody measured
    scores = [None if total == 0 else _score(step.get("score")) for step, total in zip(steps, totals, strict=True)]
    known = {total for total in totals if total}
    return {
        "prompt": prompt,
        "completions": completions,
        "labels": [-100.0 if score is None else score for score in scores],
        "mc_scores": scores,
        "mc_counts": [count(step.get("num_mc_correct")) for step in steps],
        # one number for all steps, or none: a count over another total would be a wrong count
        "mc_total": known.pop() if len(known) == 1 else None if known else count(record.get("num_mc_sequences")),
    }


def _stepwise_row(record: dict) -> dict:
    prompt = prompt_text(record)
    steps = record.get("completions")
    if not isinstance(steps, list) or not steps:
        raise _Refused(Reason.EMPTY_STEPS)
    completions = _step_texts(steps)
    labels, scores, counts = record.get("labels"), record.get("mc_scores"), record.get("mc_counts")
    labels = scores if labels is None else labels
    if labels is None:
        raise _Refused(Reason.STEP_WITHOUT_SCORE)
    for values in (labels, scores, counts):
        if values is not None and (not isinstance(values, list) or len(values) != len(steps)):
            raise _Refused(Reason.LABELS_NOT_ONE_A_STEP)
    if labels is not scores:
        labels = [float(label) if isinstance(label, bool) else label for label in labels]
        labels = [None if label == -100 else _score(label) for label in labels]
    scores = labels if scores is None else [None if score is None else _score(score) for score in scores]
    return {
        "prompt": prompt,
        "completions": completions,
        "labels": [-100.0 if label is None else float(label) for label in labels],
        "mc_scores": scores,
        "mc_counts": [count(value) for value in counts or [None] * len(steps)],
        "mc_total": count(record.get("mc_total")),
    }


def prompt_text(record: dict) -> str:
    """The question without its `<image>` places: in our rendering the images come first."""
    text = record.get("question_orig") or record.get("question") or record.get("prompt")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict) and text[0].get("role") == "user":
        text = text[0].get("content")
    if not isinstance(text, str) or not (text := re.sub(r"<image>\n?", "", text).strip()):
        raise _Refused(Reason.PROMPT_MISSING)
    return _unicode(text)


def _step_texts(steps: list) -> list[str]:
    if not all(isinstance(step, str) and step.strip() for step in steps):
        raise _Refused(Reason.STEP_WITHOUT_TEXT)
    return [_unicode(step) for step in steps]


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused(Reason.TEXT_NOT_UNICODE) from None
    return text


def _score(value: object) -> float:
    if value is None:
        raise _Refused(Reason.STEP_WITHOUT_SCORE)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise _Refused(Reason.SCORE_NOT_A_NUMBER)
    if not 0 <= value <= 1:
        raise _Refused(Reason.SCORE_OUT_OF_RANGE)
    return float(value)


def count(value: object) -> int | None:
    """A whole number from 0, anything else as unknown. 16.0 counts: columns with nulls come back as floats."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if number and 0 <= value < 2**63 and value == int(value) else None


def _own(record: dict, name: str) -> str | None:
    return record[name] if isinstance(record.get(name), str) and record[name] else None


# ---- images


def image_list(record: dict) -> list:
    images = record.get("images") or record.get("image") or []
    return images if isinstance(images, list) else [images]


def _find_image(image: object, finder: ImageFinder) -> dict:
    """An image as [`~datasets.Image`] stores it: a path, or the bytes that came with the row."""
    path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
    try:
        if data is None:
            return {"path": finder.find(path), "bytes": None}
        check_image(io.BytesIO(data))
    except ImageRefused as refused:
        raise _Refused(Reason(refused.reason)) from refused
    return {"path": None, "bytes": data}


# ---- the Hub


def _is_hub_id(path: Paths) -> bool:
    return (
        isinstance(path, str)
        and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith((".jsonl", ".parquet"))
        and not os.path.exists(path)
    )


@cache
def _hub_annotations(repo_id: str) -> Path | None:
    """The folder of the unpacked `annotations.zip` of a dataset on the Hub, None if it has no such file."""
    try:
        archive = Path(hf_hub_download(repo_id, "annotations.zip", repo_type="dataset"))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: no such folder here, and no such dataset on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: no such file or folder here, and the Hub cannot be reached") from error
    except EntryNotFoundError:
        return None
    folder = archive.parent / "annotations"
    if not folder.is_dir():
        part = Path(tempfile.mkdtemp(prefix=".annotations.", dir=archive.parent))
        try:
            unpack_annotations(archive, part)
            part.replace(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def unpack_annotations(archive: Path, folder: Path) -> None:
    """Unpack the `*.jsonl` members of a zip into `folder`, by their bare names, so that none lands outside."""
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            if ".." in parts or parts[:1] == ("/",):
                raise ValueError(f"{archive}: member {member.filename!r} lies outside of the archive: not unpacked")
            if parts and parts[-1].endswith(".jsonl"):
                if (folder / parts[-1]).exists():
                    raise ValueError(f"{archive}: two members are named {parts[-1]}, and the name is the source")
                with members.open(member) as source, open(folder / parts[-1], "wb") as target:
                    shutil.copyfileobj(source, target)


def _hub_rows(repo_id: str) -> Iterator[dict]:
    # Arrow format: images stay as they are stored, {"bytes", "path"}, and are not decoded
    for table in datasets.load_dataset(repo_id, split="train").with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()
