"""
The row, and what everything that reads rows agrees on: what counts as a step, which rows ask the same question, and why
a row is refused.

A row of VisualPRM400K-v1.1-Raw, read by [`~trl_mprm.load_rollouts`]:

    {
        "images": [{"path": "/data/images/Geometry3K/1471.png", "bytes": None}],  # each a path or bytes; may be empty
        "prompt": "Find x.",                     # the question: text, or a list of chat messages
        "completions": ["x = 5.", "So 52."],     # the steps
        "labels": [0.125, -100.0],               # one per step in [0, 1]; -100 (IGNORE_INDEX): not measured
        "mc_scores": [0.125, None],              # share of its continuations that were right
        "mc_counts": [2, None],                  # how many were right
        "mc_total": 16,                          # out of how many; None if unknown or not equal for all steps
        "source": "Geometry3K",                  # each source is selected from on its own; by default the file
        "rollout_id": "Geometry3K:0",            # by default the file and the line, counted from 0
    }
"""

import hashlib
import json
from collections.abc import Iterable, Sized
from enum import StrEnum
from typing import Any


IGNORE_INDEX = -100


class Reason(StrEnum):
    """The reasons for refusing a row; the first one that applies is reported."""

    NOT_JSON = "not_json"  # the line is not a JSON object
    UNKNOWN_FORMAT = "unknown_format"  # none of the keys under which a supported format keeps its steps
    PROMPT_MISSING = "prompt_missing"  # no question, an empty one, or a chat that is not one user turn of text
    EMPTY_STEPS = "empty_steps"  # `steps_with_score` or `completions` is an empty list, or not a list
    STEP_WITHOUT_TEXT = "step_without_text"
    TEXT_NOT_UNICODE = "text_not_unicode"  # a lone surrogate, which no file and no tokenizer can hold
    LABELS_NOT_ONE_A_STEP = "labels_not_one_a_step"  # labels, mc_scores or mc_counts differ from the steps in length
    STEP_WITHOUT_SCORE = "step_without_score"
    SCORE_NOT_A_NUMBER = "score_not_a_number"  # quoted, bool, NaN
    SCORE_OUT_OF_RANGE = "score_out_of_range"  # outside [0, 1]
    NOTHING_MEASURED = "nothing_measured"  # no step was measured (num_mc_total 0, or label -100, everywhere)
    IMAGE_NOT_A_PATH = "image_not_a_path"
    IMAGE_MISSING = "image_missing"
    IMAGE_OUTSIDE_ROOT = "image_outside_root"  # links followed
    IMAGE_UNREADABLE = "image_unreadable"  # not a picture, a truncated one, or one of more than MAX_PIXELS pixels


class Refused(ValueError):
    """
    Raised for a row, a benchmark record or a picture that cannot be used, with the reason.

    Args:
        reason (`str`):
            The word under which refusals are counted: a [`Reason`], or one that a benchmark defines.
        detail (`str`, *optional*):
            A sentence that says what was expected and what was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail or str(self.reason)


# ---- a step


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; JSON can hold half of a surrogate pair, which UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(name: str, text: str) -> str:
    """Return `text`; raise [`Refused`], calling it `name`, unless it is valid Unicode."""
    if not is_unicode(text):
        half = next(letter for letter in text if not is_unicode(letter))
        raise Refused(
            Reason.TEXT_NOT_UNICODE,
            f"{name} holds a lone surrogate ({half!r}), which no tokenizer can read: give it in UTF-8",
        )
    return text


def is_text(value: object) -> bool:
    """Whether a value is a string with more than white space in it."""
    return isinstance(value, str) and bool(value.strip())


def check_steps(steps: Any, name: str = "`completions`") -> None:
    """
    Raise [`Refused`], calling the list `name`, unless `steps` is a non-empty list of non-blank Unicode texts.

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
    Whether a step was measured, given its number of continuations (`num_mc_total`). 0 (also as text, or false) means
    that the annotation stopped before this step; the score of 0.0 written there is not a measurement.
    """
    return (total.strip() if isinstance(total, str) else total) not in (0, "0", "0.0")


# ---- a row


def check_row(row: dict[str, Any], name: str) -> None:
    """
    Raise [`Refused`], naming the row, unless it has a question, steps, and one label per step, each in [0, 1] or -100,
    and not all -100.
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
            Reason.LABELS_NOT_ONE_A_STEP, f"`labels` is {labels!r:.60}, expected a list of numbers, one per step"
        )
    if len(labels) != n_steps:
        raise Refused(
            Reason.LABELS_NOT_ONE_A_STEP, f"{len(labels)} labels for {n_steps} steps, expected one label per step"
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
    """A text field that a record may carry (`source`, `rollout_id`); None if it is missing or not valid text."""
    value = None if record is None else record.get(name)
    return value if isinstance(value, str) and value and is_unicode(value) else None


def image_list(record: dict) -> list:
    """The images of a record, in the form in which the record gives them."""
    images = record.get("images") or record.get("image") or record.get("image_url") or []
    return images if isinstance(images, list) else [images]


# ---- a question


def question_key(prompt: object, images: Iterable = ()) -> tuple[str, ...]:
    """
    A key that rows share when they ask the same question: the prompt, and one key per picture.

    Args:
        prompt (`str` or `list`):
            Text, or chat messages.
        images (`Iterable`):
            As in [`picture_key`]. To count copies of a file as one picture, pass their bytes.

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
    """The path of a picture; for one given as bytes or decoded by Pillow, a hash of its bytes or pixels."""
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str):
        return image
    if not isinstance(image, bytes):
        from PIL import Image  # imported here because a selection from files does without it

        if not isinstance(image, Image.Image):
            return str(image)
        image = str(image.size).encode() + image.convert("RGBA").tobytes()
    return hashlib.sha256(image).hexdigest()
