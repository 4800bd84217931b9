"""
Collate rows into a padded batch with a label at every marker. The batch holds the labels, the inputs of the model and,
under `extra`, further data for the loss and the logs:

    {"labels": (rows, tokens), "input_ids": (rows, tokens), "attention_mask": (rows, tokens), images,
     "extra": {"mc_total": (steps,), "row_weights": (steps,), "overlong": (3,), ...}}

With `share_prefix`, rows of the same images and question come as one prefix and its continuations:

    {"labels": (rows, most steps), "plain": {...rows that share with no other...},
     "groups": [{"prefix": {"input_ids": (1, P), images}, "input_ids": (rows, R), "markers": (rows, R)}, ...]}
"""

import logging
import math
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from datasets import Image

from ..data.rows import IGNORE_INDEX, check_row, question_key
from ..models.reader import batch_inputs
from ..models.shared_prefix import prefix_inputs, shared_length, suffix_inputs
from ..prompting.rendering import render_rows, render_steps
from ..prompting.step_format import StepFormat
from ..prompting.tokens import ProcessingClass, Rendered, errors_name_row, images_of, row_name, tokenizer_of
from .loss import LOSSES


logger = logging.getLogger(__name__)

# Replaces a batch whose rows were all dropped, so that all processes still make the same steps. It has no label.
NOTHING = {"prompt": "-", "completions": ["-"], "labels": [IGNORE_INDEX]}


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
        max_length (`int`, *optional*):
            Maximum number of tokens per row, including those of its images. Images are never cut.
        max_completion_length (`int`, *optional*):
            Maximum number of tokens in the steps of a row.
        overlong (`str`, *optional*, defaults to `"error"`):
            How to treat a longer row: `"error"` raises, `"drop_steps"` drops as many trailing steps as needed (or the
            row, if no label is left), `"drop_row"` drops the row. `extra["overlong"]` counts the dropped rows, steps,
            and labelled steps of the batch.
        share_prefix (`bool`, *optional*, defaults to `False`):
            Return rows of the same images and question as one prefix and its continuations.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            Name in [`~loss.LOSSES`], which decides the labels of a row and the columns of labelled steps in `extra`.
        source_weights (`dict[str, float]`, *optional*):
            Weights of the rows of each `source`, 1 if not named; `extra["row_weights"]` holds one per labelled step.

    Examples:
    ```python
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from trl_mprm.training.collator import DataCollatorForProcessReward
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
    max_length: int | None = None
    max_completion_length: int | None = None
    overlong: str = "error"
    share_prefix: bool = False
    loss_type: str = "hard"
    source_weights: dict[str, float] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if odd := next((row for row in rows if not isinstance(row, dict)), None):
            raise ValueError(f"a row is {odd!r:.60}, expected a dict with prompt, completions and labels")
        prepared = [self._prepared(row, index) for index, row in enumerate(rows)]
        used, inputs, dropped = (self._shared if self.share_prefix else self._plain)(prepared)
        labels = inputs.pop("labels")
        extra: dict[str, torch.Tensor] = {}
        limited = self.max_length is not None or self.max_completion_length is not None
        if limited:
            extra["overlong"] = torch.tensor(dropped)
        if limited or self.share_prefix:  # which rows remain, and in which order
            extra["row_index"] = torch.tensor([row["row_index"] for row in used])
            extra["n_rows"] = torch.tensor(len(rows))
        for name in used[0]["of_steps"]:
            values = [value for row in used for value, label in zip(row["of_steps"][name], row["labels"], strict=True)
                      if label != IGNORE_INDEX]  # fmt: skip
            extra[name] = torch.tensor(values, dtype=torch.float32)
        # Labels come first, because Trainer counts the rows by the first value.
        return {"labels": labels, **inputs, **({"extra": extra} if extra else {})}

    def _prepared(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A checked row with its pictures loaded, and the loss's columns for each step."""
        name = row_name(row, index)
        if "input_ids" in row:
            row = pretokenized(row, name)
        else:
            check_row(row, name)
        labels, of_steps = LOSSES[self.loss_type].of_row(row, name)
        if self.source_weights is not None:
            of_steps = of_steps | {"row_weights": [self.source_weights.get(row.get("source"), 1.0)] * len(labels)}
        return _fetched(row, name) | {"labels": labels, "of_steps": of_steps, "row_index": index}

    def _plain(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any], list[int]]:
        rows, rendered, image_tensors, dropped = self._fitting(rows)
        inputs = batch_inputs(rendered, image_tensors, tokenizer_of(self.processing_class))
        markers = inputs.pop("markers")  # the labels mark those of labelled steps
        labels = torch.full(markers.shape, float(IGNORE_INDEX))
        labels[markers] = torch.tensor([float(label) for row in rows for label in row["labels"]])
        return rows, {"labels": labels, **inputs}, dropped

    def _shared(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any], list[int]]:
        prompts: dict[Any, list[dict]] = {}
        for index, row in enumerate(rows):
            with errors_name_row(row, index):
                prompts.setdefault(question_key(row["prompt"], images_of(row)), []).append(row)
        alone = [group[0] for group in prompts.values() if len(group) == 1]
        used, inputs, dropped = [], {"groups": []}, [0, 0, 0]
        if alone:
            used, plain, dropped = self._plain(alone)
            inputs["plain"] = plain | {"markers": plain.pop("labels") != IGNORE_INDEX}
        for group in (group for group in prompts.values() if len(group) > 1):
            fitting, rendered, image_tensors, group_dropped = self._fitting(group, same_prompt=True)
            used += fitting
            dropped = [sum(pair) for pair in zip(dropped, group_dropped, strict=True)]
            length = shared_length(rendered)
            for number, (tokens, row) in enumerate(zip(rendered, fitting, strict=True)):
                labelled = [label != IGNORE_INDEX for label in row["labels"]]
                rendered[number] = tokens._replace(positions=list(compress(tokens.positions, labelled)))
            prefix = prefix_inputs(rendered[0], length, image_tensors)
            inputs["groups"].append({"prefix": prefix, **suffix_inputs(rendered, length)})
        width = max(len(row["labels"]) for row in used)
        # Trainer counts labels from the second column on.
        padded = [[IGNORE_INDEX, *row["labels"], *[IGNORE_INDEX] * (width - len(row["labels"]))] for row in used]
        return used, {"labels": torch.tensor(padded, dtype=torch.float32), **inputs}, dropped

    def _fitting(
        self, rows: list[dict[str, Any]], same_prompt: bool = False
    ) -> tuple[list[dict[str, Any]], list[Rendered], dict[str, torch.Tensor], list[int]]:
        """Render rows and cut those that are too long; what is read, and how many rows, steps and labels were not."""
        if "rendered" in rows[0]:  # as it came
            return rows, [row["rendered"] for row in rows], {}, [0, 0, 0]
        try:
            rendered, image_tensors = render_rows(rows, self.processing_class, self.step_format, same_prompt)
        except ValueError as error:
            if not any(str(error).startswith(row_name(row, index)) for index, row in enumerate(rows)):
                for index, row in enumerate(rows):  # a processor that refuses a picture does not say of which row
                    named = row | {"rollout_id": row.get("rollout_id") or f"{index} of the batch"}
                    render_rows([named], self.processing_class, self.step_format)
            raise
        fitting, dropped = [], [0, 0, 0]
        for index, (row, tokens) in enumerate(zip(rows, rendered, strict=True)):
            limit, rule = self._limit(row, tokens)
            if len(tokens.input_ids) <= limit:
                fitting.append(row)
                continue
            name = f"{row_name(row, index)} has {len(tokens.input_ids)} tokens, more than {rule}"
            if self.overlong == "error":
                raise ValueError(f'{name}: raise max_length, or set overlong to "drop_steps" or "drop_row"')
            n_kept = sum(position < limit for position in tokens.positions)
            n_kept *= self.overlong == "drop_steps" and any(label != IGNORE_INDEX for label in row["labels"][:n_kept])
            gone = row["labels"][n_kept:]
            counted = [int(n_kept == 0), len(gone), sum(label != IGNORE_INDEX for label in gone)]
            dropped = [sum(pair) for pair in zip(dropped, counted, strict=True)]
            logger.warning(f"{name}: {counted[2]} labelled steps dropped, {n_kept} steps kept")
            if n_kept:
                of_steps = {column: values[:n_kept] for column, values in row["of_steps"].items()}
                kept = {key: row[key][:n_kept] for key in ("completions", "labels")}
                fitting.append(row | kept | {"of_steps": of_steps})
        if any(dropped):
            of_steps = {column: values[:1] for column, values in rows[0]["of_steps"].items()}
            fitting = fitting or [NOTHING | {"row_index": rows[0]["row_index"], "of_steps": of_steps}]
            rendered, image_tensors = render_rows(fitting, self.processing_class, self.step_format, same_prompt)
        return fitting, rendered, image_tensors, dropped

    def _limit(self, row: dict[str, Any], tokens: Rendered) -> tuple[float, str]:
        """The maximum number of tokens of a row, and the rule that sets it."""
        limits = [(math.inf, "")]
        if self.max_length is not None:
            limits.append((self.max_length, f"max_length {self.max_length}"))
        if self.max_completion_length is not None:
            tokenizer = tokenizer_of(self.processing_class)
            steps, _ = render_steps(row["completions"], tokenizer, self.step_format.ids(tokenizer))
            rule = f"max_completion_length {self.max_completion_length} allows"
            limits.append((len(tokens.input_ids) - len(steps) + self.max_completion_length, rule))
        return min(limits)


def pretokenized(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The step labels and the tokens of a row given as `input_ids` and `labels`, one label per token."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) != len(labels):
        raise ValueError(f"{name}: {len(ids)} input_ids and {len(labels)} labels, expected one label per token")
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    if odd := [labels[place] for place in places if not 0 <= labels[place] <= 1]:
        raise ValueError(f"{name}: label {odd[0]!r}, expected {IGNORE_INDEX} or a number from 0 to 1")
    return {"labels": [float(labels[place]) for place in places], "rendered": Rendered(ids, places, {})}


def _fetched(row: dict[str, Any], name: str) -> dict[str, Any]:
    """The row with its pictures loaded; an undecoded column, as in a stream, may name them by URL."""
    images = row.get("images") or []
    far = [
        isinstance(image, dict) and image.get("bytes") is None and "://" in str(image.get("path")) for image in images
    ]
    if not any(far):
        return row
    try:
        opened = [Image().decode_example(image) if far else image for image, far in zip(images, far, strict=True)]
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: cannot read image: {error}") from error
    return row | {"images": opened}
