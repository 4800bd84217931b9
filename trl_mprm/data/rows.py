"""
The row, and what all readers of a row agree on: what a step is, which rows ask the same question, why one is refused.

A row of VisualPRM400K-v1.1-Raw, read by [`~trl_mprm.load_rollouts`]:

    {
        "images": [{"path": "/data/images/Geometry3K/1471.png", "bytes": None}],  # a path or bytes each; may be empty
        "prompt": "Find x.",                     # the question: text, or a list of chat messages
        "completions": ["x = 5.", "So 52."],     # the steps
        "labels": [0.125, -100.0],               # one per step in [0, 1]; -100 (IGNORE_INDEX): nobody measured it
        "mc_scores": [0.125, None],              # share of its continuations that were right
        "mc_counts": [2, None],                  # how many were right
        "mc_total": 16,                          # of how many; None where unknown or not the same for all steps
        "source": "Geometry3K",                  # what is selected from on its own: the file, unless the row says it
        "rollout_id": "Geometry3K:0",            # file and line from 0, unless the row says it
    }
"""

import hashlib
import json
from collections.abc import Iterable, Sized
from enum import StrEnum
from typing import Any


IGNORE_INDEX = -100


class Reason(StrEnum):
    """Why a row is refused. The first reason that holds is the one that is named."""

    NOT_JSON = "not_json"  # the line is no JSON object
    UNKNOWN_FORMAT = "unknown_format"  # no key under which a supported format has its steps
    PROMPT_MISSING = "prompt_missing"  # no question, an empty one, or a chat that is not one user turn of text
    EMPTY_STEPS = "empty_steps"  # `steps_with_score` or `completions` is an empty list, or no list
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


class Refused(ValueError):
    """
    Why a row, a record of a benchmark, or a picture cannot be used.

    Args:
        reason (`str`):
            One word that refusals are counted by: a [`Reason`], or one of a benchmark's own.
        detail (`str`, *optional*):
            What was expected and what came, in words.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail or str(self.reason)


# ---- a step


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold half of a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(name: str, text: str) -> str:
    """The text itself. Raises [`Refused`], which calls it `name`, where it is not Unicode."""
    if not is_unicode(text):
        half = next(letter for letter in text if not is_unicode(letter))
        raise Refused(
            Reason.TEXT_NOT_UNICODE,
            f"{name} holds a lone surrogate ({half!r}), which no tokenizer reads: give it in UTF-8",
        )
    return text


def is_text(value: object) -> bool:
    """Whether a value says something: a string with more than white space in it."""
    return isinstance(value, str) and bool(value.strip())


def check_steps(steps: Any, name: str = "`completions`") -> None:
    """
    Raise [`Refused`], which calls the list `name`, unless `steps` is a list of at least one step, each of them non-blank
    Unicode text.

    Examples:
    ```python
    >>> from trl_mprm.data.rows import Refused, check_steps
    >>> try:
    ...     check_steps(["x = 5.", " "])
    ... except Refused as refused:
    ...     print(refused.reason, "-", refused)
    step_without_text - step 1 is ' ', expected text: remove the empty step and its label

    ```
    """
    if not isinstance(steps, Sized) or isinstance(steps, str | bytes | dict):
        raise Refused(Reason.EMPTY_STEPS, f"{name} is {steps!r:.60}, expected a list of steps: split the text first")
    if not len(steps):
        raise Refused(Reason.EMPTY_STEPS, f"{name} is empty, expected at least one step: remove the row")
    for number, step in enumerate(steps):
        if not is_text(step):
            raise Refused(
                Reason.STEP_WITHOUT_TEXT,
                f"step {number} is {step!r:.80}, expected text: remove the empty step and its label",
            )
    for number, step in enumerate(steps):
        check_unicode(f"step {number}", step)


def measured(total: object) -> bool:
    """
    Whether a step was tried at all, by the number of its continuations (`num_mc_total`). Of 0 (also as text, or false)
    it was not: the annotation stopped before this step, and wrote a score of 0.0 that nobody measured.
    """
    return (total.strip() if isinstance(total, str) else total) not in (0, "0", "0.0")


# ---- a row


def check_row(row: dict[str, Any], name: str) -> None:
    """
    Raise [`Refused`], which names the row, unless it has a question, steps, and one label per step, in [0, 1] or -100
    and not all of them -100.
    """
    missing = [column for column in ("prompt", "completions", "labels") if column not in row]
    if missing:
        raise Refused(
            Reason.UNKNOWN_FORMAT,
            f"{name} has no {', '.join(missing)}; it has {', '.join(row)}: rename its columns",
        )
    if "image" in row and "images" not in row:
        raise Refused(Reason.UNKNOWN_FORMAT, f"{name} has an `image`, expected `images`, a list: write images=[image]")
    if not isinstance(row["prompt"], str | list):
        raise Refused(
            Reason.PROMPT_MISSING,
            f"{name}: `prompt` is {row['prompt']!r:.60}, expected the question, or a list of chat messages",
        )
    try:
        check_steps(row["completions"])
        _check_labels(row["labels"], len(row["completions"]))
    except Refused as refused:
        raise Refused(refused.reason, f"{name}: {refused}") from refused


def _check_labels(labels: Any, n_steps: int) -> None:
    if not isinstance(labels, Sized) or isinstance(labels, str | bytes | dict):
        raise Refused(
            Reason.LABELS_NOT_ONE_A_STEP, f"`labels` is {labels!r:.60}, expected a list of numbers, one a step"
        )
    if len(labels) != n_steps:
        raise Refused(
            Reason.LABELS_NOT_ONE_A_STEP, f"{len(labels)} labels for {n_steps} steps, expected one label a step"
        )
    for number, label in enumerate(labels):
        if not _is_label(label):
            raise Refused(
                Reason.SCORE_NOT_A_NUMBER,
                f"label of step {number} is {label!r}, expected a number in [0, 1], or -100 to ignore the step",
            )
    if all(label == IGNORE_INDEX for label in labels):
        raise Refused(
            Reason.NOTHING_MEASURED, "every label is -100, expected at least one labelled step: remove the row"
        )


def _is_label(label: Any) -> bool:
    try:
        return bool(0 <= label <= 1 or label == IGNORE_INDEX)  # neither holds for NaN
    except TypeError:  # text, None, a list
        return False


def own_text(record: dict | None, name: str) -> str | None:
    """A field that a record may carry of its own: `source`, `rollout_id`. None if it is no text that can be written."""
    value = None if record is None else record.get(name)
    return value if isinstance(value, str) and value and is_unicode(value) else None


def image_list(record: dict) -> list:
    """The images of a record as it names them."""
    images = record.get("images") or record.get("image") or record.get("image_url") or []
    return images if isinstance(images, list) else [images]


# ---- a question


def question_key(prompt: object, images: Iterable = ()) -> tuple[str, ...]:
    """
    What rows that ask the same question have in common: the prompt, and for each picture what tells it from others.

    Args:
        prompt (`str` or `list`):
            Text, or chat messages.
        images (`Iterable`):
            See [`picture_key`]. To count copies of a file as one picture, pass their bytes.

    Examples:
    ```python
    >>> from trl_mprm.data.rows import question_key
    >>> question_key("Find x.", ["/data/1471.png", {"path": "1472.png", "bytes": None}])
    ('Find x.', '/data/1471.png', '1472.png')

    ```
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=picture_key)
    return text, *map(picture_key, images)


def picture_key(image: Any) -> str:
    """The path of a picture; of one that came as bytes, or decoded by Pillow, a hash of its bytes or its pixels."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str):
        return image
    if not isinstance(image, bytes):
        from PIL import Image  # not before: a selection from files does without it

        if not isinstance(image, Image.Image):
            return str(image)
        image = str(image.size).encode() + image.convert("RGBA").tobytes()
    return hashlib.sha256(image).hexdigest()
