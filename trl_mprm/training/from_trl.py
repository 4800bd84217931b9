"""
Keep the features of TRL's `PRMTrainer` (up to 1.13), for those who migrate from it.

    {"prompt": "2+2?", "completions": ["2+2", "is 4"], "labels": [True, False]}
    input_ids  2 + 2 ?  2 + 2 \\n  i s _ 4 \\n
    labels     . . . .  . . . 1   . . . .  0        (. is -100)

A data set of such `input_ids` and `labels` can be trained on directly.
"""

import logging
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.rows import IGNORE_INDEX


logger = logging.getLogger(__name__)


def tokenize_row(
    features: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    step_separator: str,
    max_length: int | None,
    max_completion_length: int | None,
    train_on_last_step_only: bool,
    is_eval: bool,
) -> dict[str, list]:
    """
    Tokenise a row as `PRMTrainer` did: each step's label on the last token of its separator, cut to a number of tokens.

    Args:
        features (`dict`):
            A row with `prompt`, `completions` and `labels`. A fractional label is kept; TRL truncated 0.7 to 0.
        tokenizer, step_separator, max_length, max_completion_length, train_on_last_step_only:
            As in [`ProcessRewardConfig`].
        is_eval (`bool`):
            Whether the row is used for evaluation, where each step keeps its label.

    Returns:
        `dict`: `input_ids` and `labels`, of equal length.

    Examples:
    ```python
    >>> from trl_mprm.models.tiny import tiny_tokenizer
    >>> from trl_mprm.training.from_trl import tokenize_row
    >>> row = {"prompt": "2?", "completions": ["1+1", "2"], "labels": [True, False]}
    >>> tokenize_row(row, tiny_tokenizer("qwen2"), "\\n", 8, None, False, False)["labels"]
    [-100, -100, -100, -100, -100, 1, -100, 0]

    ```
    """
    separator = tokenizer.encode(step_separator, add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = start + tokenizer(features["prompt"], add_special_tokens=False)["input_ids"]
    labels = list(features["labels"])
    if train_on_last_step_only and not is_eval:
        labels[:-1] = [IGNORE_INDEX] * (len(labels) - 1)
    tokens, targets = [], []
    for step, label in zip(features["completions"], labels, strict=True):
        ids = tokenizer(step, add_special_tokens=False)["input_ids"] + separator
        tokens += ids
        targets += [IGNORE_INDEX] * (len(ids) - 1) + [int(label) if label == int(label) else label]
    cut = slice(max_completion_length)
    whole = prompt + tokens[cut], [IGNORE_INDEX] * len(prompt) + targets[cut]
    return {name: values[:max_length] for name, values in zip(("input_ids", "labels"), whole, strict=True)}


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """
    Compute the share of labelled steps that are predicted correctly or, for pairs of rewards, the share of pairs in which
    the better answer has the higher reward.

    Args:
        prediction ([`~transformers.EvalPrediction`]):
            Predictions and labels: logits of the two classes `(rows, tokens, 2)` and labels `(rows, tokens)`, -100
            where there is none; or the logits of P(step good) from [`ProcessRewardTrainer`], `(rows, steps)`, and labels
            of the same shape; or rewards `(rows, 2)` and the index of the better one `(rows,)`, where equal rewards do
            not count.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_mprm.training.from_trl import compute_accuracy
    >>> compute_accuracy((np.array([[2.0, -1.0, 0.5]]), np.array([[1, 1, -100]])))
    {'accuracy': 0.5}

    ```
    """
    predictions, labels = (np.asarray(values) for values in prediction)
    if labels.ndim == 1:
        told = predictions[:, 0] != predictions[:, 1]
        if not told.all():
            logger.warning(f"{(~told).sum()} out of {len(told)} pairs have equal rewards: they do not count")
        answers = predictions.argmax(1)
    else:
        told = labels != IGNORE_INDEX
        answers = predictions.argmax(2) if predictions.ndim == 3 else predictions > 0
    return {"accuracy": float((answers == labels)[told].mean())}


def last_step_only(dataset: Dataset | IterableDataset, num_proc: int | None = None) -> Dataset | IterableDataset:
    """Return the rows with the label of their last step alone."""
    features = dataset.features
    if features is not None:  # a column of booleans would turn -100 into True
        features = Features({**features, "labels": List(Value("float64"))})
    kwargs = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(_last_label, input_columns="labels", features=features, **kwargs)


def _last_label(labels: list) -> dict[str, list[float]]:
    return {"labels": [float(IGNORE_INDEX)] * (len(labels) - 1) + [float(labels[-1])]}
