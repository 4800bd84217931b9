"""Check the data sets of a training run before it starts."""

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from ..data.rows import IGNORE_INDEX, check_row, is_text
from ..prompting.tokens import check_prompt, row_name
from .loss import LOSSES
from .sampling import undecoded


# Types of an Arrow column.
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)

TEXTS = (pa.types.is_string, pa.types.is_large_string)


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        evals = [(f"eval_dataset[{name!r}]", dataset) for name, dataset in eval_dataset.items()]
    else:
        evals = [] if eval_dataset is None else [("eval_dataset", eval_dataset)]
    return [("train_dataset", train_dataset), *evals]


def arrow_columns(dataset: Dataset, *names: str) -> pa.Table:
    """Columns as Arrow; images are not touched."""
    return dataset.select_columns(list(names)).with_format("arrow")[:]


def _where(dataset: Dataset, name: str, index: int) -> str:
    """Name a row of a data set in an error."""
    row = dataset.remove_columns([column for column in dataset.column_names if column == "images"])[index]
    return f"{name}, {row_name(row, index).removesuffix(' of the batch')}"


def check_dataset(
    dataset: Dataset | IterableDataset, name: str, loss_type: str = "hard", source_weights: bool = False
) -> None:
    """Raise `ValueError` for the first row without steps or usable labels; rows of a stream are checked as they come."""
    if isinstance(dataset, dict):
        raise ValueError(
            f"{name} is a dict of data sets ({', '.join(map(str, dataset))}): give one of them, as {name}[{next(iter(dataset))!r}]"
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, expected a datasets.Dataset: Dataset.from_list makes one of rows"
        )
    if dataset.column_names is None:  # a stream after a map; its rows are checked as they come
        return
    loss = LOSSES[loss_type]
    if "input_ids" in dataset.column_names:
        expected = {"input_ids", "labels"}
    else:
        expected = {"prompt", "completions", "labels", *loss.columns}
    expected |= {"source"} if source_weights else set()
    missing = expected - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(dataset.column_names)}: "
            "expected rows as load_rollouts returns them, or as TRL's PRMTrainer took them"
        )
    if "image" in dataset.column_names and "images" not in dataset.column_names:
        raise ValueError(
            f"{name} has a column `image`, expected `images`, a list per row: "
            'map(lambda row: {"images": [row["image"]]}, remove_columns="image")'
        )
    if isinstance(dataset, IterableDataset):
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows: check the selection")
    if "input_ids" in dataset.column_names:
        return  # one label per token; the collator checks each row
    table = arrow_columns(dataset, *expected - {"source"})
    if _all_rows_fit(table) and loss.fits(table):
        return
    for index, row in enumerate(dataset.remove_columns([c for c in dataset.column_names if c == "images"])):
        where = f"{name}, {row_name(row, index).removesuffix(' of the batch')}"
        check_row(row, where)
        loss.of_row(row, where)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _lists_of(column: pa.ChunkedArray, *tests: Callable[[pa.DataType], bool]) -> bool:
    """Whether every row of a column is a list of values of one of these types."""
    return _is_list(column.type) and column.null_count == 0 and any(test(column.type.value_type) for test in tests)


def _all_rows_fit(table: pa.Table) -> bool:
    """Whether the columns as a whole show that no row can fail [`check_row`]."""
    prompts, steps, labels = table["prompt"], table["completions"], table["labels"]
    if prompts.null_count or not (pa.types.is_nested(prompts.type) or any(test(prompts.type) for test in TEXTS)):
        return False
    if not (_lists_of(steps, *TEXTS) and _lists_of(labels, *NUMBERS)):
        return False
    steps, labels = steps.combine_chunks(), labels.combine_chunks()
    texts, values = pc.list_flatten(steps), pc.list_flatten(labels).cast(pa.float64())
    if texts.null_count or values.null_count:
        return False
    # A visible ASCII character makes a text non-blank; texts without one are checked one by one.
    others = texts.filter(pc.invert(pc.match_substring_regex(texts, "[!-~]")))
    blank = not all(map(is_text, others.to_pylist()))
    usable = pc.or_(pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, 1)), pc.equal(values, IGNORE_INDEX))
    same_length = pc.all(pc.equal(pc.list_value_length(steps), pc.list_value_length(labels))).as_py()
    labelled = np.unique(pc.list_parent_indices(labels).to_numpy()[pc.not_equal(values, IGNORE_INDEX).to_numpy(False)])
    return len(labelled) == len(table) and same_length and not blank and pc.all(usable).as_py()


def check_images(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise `ValueError` for the first row with a missing picture; broken pictures are found when they are read."""
    if isinstance(dataset, IterableDataset) or "images" not in dataset.column_names:
        return
    stored = dataset.data.column("images")  # of the whole file, from which the data set may select rows
    if not _is_list(stored.type) and not pa.types.is_null(stored.type):
        raise ValueError(
            f"{name}: the column `images` has one {stored.type} per row, expected a list of pictures: "
            'map(lambda row: {"images": [row["images"]]})'
        )
    pictures = pc.list_flatten(stored) if _is_list(stored.type) else stored
    if pa.types.is_struct(pictures.type):
        paths = pc.struct_field(pictures, "path").filter(pc.is_null(pc.struct_field(pictures, "bytes")))
    elif any(test(pictures.type) for test in TEXTS):
        paths = pictures
    else:
        return
    gone = {path for path in pc.unique(paths).to_pylist() if path is None or not _is_there(path)}
    if not gone:
        return
    for index, images in enumerate(undecoded(dataset.select_columns("images"))["images"]):
        for number, image in enumerate(images or []):
            held = image if isinstance(image, dict) else {"path": image}
            if held.get("bytes") is None and held["path"] in gone:
                raise ValueError(
                    f"{_where(dataset, name, index)}: picture {number} is {held['path']!r}, and there is no such file: "
                    "put it there, name the folder of the images (image_root), or remove the row"
                )


def _is_there(path: str) -> bool:
    return "://" in path or os.path.isfile(path)  # a URL is checked when it is read


def check_no_images(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise `ValueError` for the first row with pictures if the model reads only text."""
    if isinstance(dataset, IterableDataset) or "images" not in dataset.column_names:
        return
    first = 0
    for table in dataset.select_columns("images").with_format("arrow").iter(batch_size=1000):
        if _is_list(table["images"].type):
            counts = pc.fill_null(pc.list_value_length(table["images"]), 0).to_numpy()
            if counts.any():
                index = int(counts.nonzero()[0][0])
                raise ValueError(
                    f"{_where(dataset, name, first + index)}: {counts[index]} images came with a text-only model: use a "
                    "vision-language model, or remove the `images` column"
                )
        first += len(table)


def check_lengths(dataset: Dataset | IterableDataset, name: str, column: str, max_length: int) -> None:
    """Raise `ValueError` for the longest row if it is too long."""
    if isinstance(dataset, IterableDataset):
        return
    lengths = np.array(dataset[column][:])
    if lengths.max() > max_length:
        raise ValueError(
            f"{_where(dataset, name, int(lengths.argmax()))} has {lengths.max()} tokens, more than max_length "
            f"{max_length} ({(lengths > max_length).sum()} rows in all): raise max_length, or set overlong to "
            '"drop_steps" or "drop_row"'
        )


def check_prompts(dataset: Dataset | IterableDataset, forbidden: list[str], name: str) -> None:
    """Raise `ValueError` for the first question with a special token; rows of a stream are checked as they come."""
    if isinstance(dataset, IterableDataset) or not forbidden or "input_ids" in dataset.column_names:
        return
    prompts = arrow_columns(dataset, "prompt")["prompt"]
    if not any(test(prompts.type) for test in TEXTS):  # chat messages are checked when they are rendered
        return
    hits = pc.match_substring_regex(prompts, "|".join(map(re.escape, forbidden))).to_numpy().nonzero()[0]
    if len(hits):
        index = int(hits[0])
        try:
            check_prompt(prompts[index].as_py(), forbidden)
        except ValueError as error:
            raise ValueError(f"{_where(dataset, name, index)} ({len(hits)} rows in all): {error}") from error
