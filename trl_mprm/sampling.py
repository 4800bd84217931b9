"""
The order in which a training draws its rows.

    share_prefix       the rollouts of a question together, questions in random order:  [q7 q7 q7][q2][q5 q5]...
    group_by_length    rows of nearly equal length together; this file counts the tokens that Trainer groups by
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from .rendering import ProcessingClass, render_rows
from .step_format import StepFormat


def prompt_groups(dataset: Dataset) -> list[list[int]]:
    """
    Row numbers by question: rows with the same images and prompt. Images are compared as they are stored, undecoded.

    Examples:
    ```python
    >>> from datasets import Dataset
    >>> from trl_mprm.sampling import prompt_groups
    >>> prompt_groups(Dataset.from_dict({"prompt": ["a", "b", "a"], "images": [[], [], []]}))
    [[0, 2], [1]]

    ```
    """
    columns = [name for name in ("prompt", "images") if name in dataset.column_names]
    groups: dict[bytes, list[int]] = {}
    index = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            key = hashlib.blake2b(json.dumps(row, default=bytes.hex, sort_keys=True).encode(), digest_size=16).digest()
            groups.setdefault(key, []).append(index)
            index += 1
    return list(groups.values())


class PromptGroupSampler(torch.utils.data.Sampler):
    """
    Draw groups in random order, the rows of a group one after the other; the same in every process.

    Args:
        groups (`list[list[int]]`):
            From [`prompt_groups`].
        seed (`int`):
            Seed of the order, which is another one in each epoch.
    """

    def __init__(self, groups: list[list[int]], seed: int):
        self.groups, self.seed, self.epoch = groups, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for number in torch.randperm(len(self.groups), generator=generator).tolist():
            yield from self.groups[number]


@dataclass(frozen=True)
class WithLength:
    """Add a column with the tokens of a row, those of its images included: `dataset.map(WithLength(...))`."""

    processing_class: ProcessingClass
    step_format: StepFormat
    column: str

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        rendered, _ = render_rows([row], self.processing_class, self.step_format)
        return {self.column: len(rendered[0].input_ids)}
