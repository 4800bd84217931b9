"""Rows in, one padded batch with a label at every marker out."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .rendering import ProcessingClass, render_batch, row_name
from .step_format import StepFormat


IGNORE_INDEX = -100


@dataclass
class DataCollatorForProcessReward:
    """
    Render rows and put each step's label at its marker; -100 everywhere else.

    Labels are full-length floats on purpose: [`~transformers.Trainer`] counts the steps of an accumulated batch by
    `labels != -100`, and soft labels must never be cast to int or bool.

    Args:
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            The model's processor or tokenizer, with the marker already in its vocabulary.
        step_format (`StepFormat`, *optional*):
            Marker, reward tokens and joiner.

    Examples:
    ```python
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from trl_mprm.collator import DataCollatorForProcessReward
    >>> vocab = {"[PAD]": 0, "[UNK]": 1, "<prm>": 2, "Yes": 3, "No": 4, "two": 5, "plus": 6, "four": 7}
    >>> words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    >>> collator = DataCollatorForProcessReward(tokenizer)
    >>> batch = collator([
    ...     {"prompt": "two plus two", "completions": ["two plus two", "four"], "labels": [1.0, 0.25]},
    ...     {"prompt": "two", "completions": ["two"], "labels": [0.0]},
    ... ])
    >>> batch["input_ids"]
    tensor([[5, 6, 5, 5, 6, 5, 2, 7, 2],
            [5, 5, 2, 0, 0, 0, 0, 0, 0]])
    >>> batch["labels"]
    tensor([[-100.0000, -100.0000, -100.0000, -100.0000, -100.0000, -100.0000,
                1.0000, -100.0000,    0.2500],
            [-100.0000, -100.0000,    0.0000, -100.0000, -100.0000, -100.0000,
             -100.0000, -100.0000, -100.0000]])

    ```
    """

    processing_class: ProcessingClass
    step_format: StepFormat = StepFormat()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for index, row in enumerate(rows):
            check_labels(row, row_name(row, index))
        batch, markers = render_batch(rows, self.processing_class, self.step_format)
        labels = torch.full(markers.shape, float(IGNORE_INDEX))
        labels[markers] = torch.tensor([float(label) for row in rows for label in row["labels"]])
        return {**batch, "labels": labels}


def check_labels(row: dict[str, Any], name: str) -> None:
    """Raise `ValueError` unless `row` has one label a step, each in [0, 1] or -100, and at least one to learn from."""
    labels, steps = row["labels"], row["completions"]
    if len(labels) != len(steps):
        raise ValueError(f"{name}: {len(labels)} labels for {len(steps)} steps, expected one label a step")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"{name}: step {number} is {step!r}, expected text: remove the empty step and its label")
    for number, label in enumerate(labels):
        if label is None or math.isnan(label) or not (0 <= label <= 1 or label == IGNORE_INDEX):
            raise ValueError(
                f"{name}: label of step {number} is {label!r}, expected a number in [0, 1], or -100 to ignore the step"
            )
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(f"{name}: every label is -100, expected at least one labelled step: remove the row")
