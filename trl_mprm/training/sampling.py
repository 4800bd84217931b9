"""
Draw the rows of a training run, in one of these orders:

    share_prefix       the rollouts of a question together, questions in random order:  [q7 q7 q7][q2][q5 q5]...
    group_by_length    rows of nearly equal length together; this file counts the tokens that Trainer groups by

Each row that is drawn knows its number, by which errors name it; its pictures are not opened yet.

    {"images": [{"path": "a.png", "bytes": None}], "prompt": "How many?", ..., "rollout_id": "40"}
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, Image, IterableDataset, List
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.rows import question_key
from ..prompting.rendering import render_rows
from ..prompting.step_format import StepFormat
from ..prompting.tokens import ProcessingClass


def prompt_groups(dataset: Dataset) -> list[list[int]]:
    """
    Group row numbers by question, i.e. by images and prompt. Images are compared in their stored form, undecoded.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm.training.sampling import prompt_groups
    >>> prompt_groups(Dataset.from_dict({"prompt": ["a", "b", "a"], "images": [[], [], []]}))
    [[0, 2], [1]]

    ```
    """
    columns = [name for name in ("prompt", "images") if name in dataset.column_names]
    groups: dict[bytes, list[int]] = {}
    index = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            text = "\0".join(question_key(row["prompt"], row.get("images") or ()))
            key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            groups.setdefault(key, []).append(index)
            index += 1
    return list(groups.values())


def unformatted(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the same rows as plain Python values, whatever `with_format` asked for; a custom transform stays."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    own = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return dataset if own else dataset.with_format(None)


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the same rows with undecoded pictures, so that the code that opens a broken one can name the row."""
    dataset = unformatted(dataset)
    if (dataset.features or {}).get("images") != List(Image()):
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.cast_column("images", List(Image(decode=False)))
    dataset = copy.deepcopy(dataset)  # shares the table, which a cast would rewrite
    dataset.info.features["images"] = List(Image(decode=False))
    return dataset


def numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Give a row an id, its number in the data set, if it has none."""
    return {**row, "rollout_id": row.get("rollout_id") or str(index)}


class NumberedRows(torch.utils.data.Dataset):
    """
    Rows of a data set for a data loader, each with an id and undecoded pictures.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm.training.sampling import NumberedRows
    >>> NumberedRows(Dataset.from_dict({"prompt": ["a", "b"]}))[1]
    {'prompt': 'b', 'rollout_id': '1'}

    ```
    """

    def __init__(self, dataset: Dataset):
        self.dataset = undecoded(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Read all rows of a batch at once; data loaders call this if it exists."""
        return [numbered(row, index) for row, index in zip(self.dataset.__getitems__(indices), indices, strict=True)]


class EpochSampler(torch.utils.data.Sampler):
    """
    A sampler whose order depends only on seed and epoch, so it is the same in every process and in a resumed run.

    Args:
        order (`Callable`):
            Maps a generator to row numbers, as [`by_prompt`] or [`by_length`] do.
        n_rows (`int`):
            Number of rows.
        seed (`int`):
            Seed of the order, which differs from epoch to epoch.
    """

    def __init__(self, order: Callable[[torch.Generator], Iterable[int]], n_rows: int, seed: int):
        self.order, self.n_rows, self.seed, self.epoch = order, n_rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(torch.Generator().manual_seed(self.seed + self.epoch)))


def by_prompt(groups: list[list[int]]) -> Callable[[torch.Generator], Iterable[int]]:
    """Put the groups of [`prompt_groups`] in random order, with the rows of each group in succession."""

    def order(generator: torch.Generator) -> Iterator[int]:
        return chain.from_iterable(
            groups[number] for number in torch.randperm(len(groups), generator=generator).tolist()
        )

    return order


def by_length(lengths: list[int], batch_size: int) -> Callable[[torch.Generator], Iterable[int]]:
    """Put rows of similar length into a batch, as Trainer does."""
    return lambda generator: get_length_grouped_indices(lengths, batch_size, generator=generator)


@dataclass(frozen=True)
class WithLength:
    """Adds a column with the number of tokens per row: `undecoded(dataset).map(WithLength(...), with_indices=True)`."""

    processing_class: ProcessingClass
    step_format: StepFormat
    column: str

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, int]:
        rendered, _ = render_rows([numbered(row, index)], self.processing_class, self.step_format)
        return {self.column: len(rendered[0].input_ids)}


def with_lengths(
    dataset: Dataset | IterableDataset, processing_class: ProcessingClass, step_format: StepFormat, column: str
) -> Dataset | IterableDataset:
    """Return the same rows with a column of their lengths in tokens; a stream is returned unchanged."""
    if isinstance(dataset, IterableDataset):
        return dataset
    counted = WithLength(processing_class, step_format, column)
    return undecoded(dataset).map(counted, with_indices=True, desc="Counting tokens")
