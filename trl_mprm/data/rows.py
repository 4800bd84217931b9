"""The row: its fields, why one is refused, and what all readers of a row agree on."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a row is refused. The first reason that holds is the one that is named."""

    NOT_JSON = "not_json"  # the line is no JSON object
    UNKNOWN_FORMAT = "unknown_format"  # no key of any supported format
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


class Refused(Exception):
    """Carries its reason from the check that fails to the loop over rows."""


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold half of a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def measured(total: object) -> bool:
    """
    Whether a step was tried at all, by the number of its continuations (`num_mc_total`). Of 0 (also as text, or false)
    it was not: the annotation stopped before this step, and wrote a score of 0.0 that nobody measured.
    """
    return (total.strip() if isinstance(total, str) else total) not in (0, "0", "0.0")


def own_text(record: dict | None, name: str) -> str | None:
    """A field that a record may carry of its own: `source`, `rollout_id`. None if it is no text that can be written."""
    value = None if record is None else record.get(name)
    return value if isinstance(value, str) and value and is_unicode(value) else None


def image_list(record: dict) -> list:
    """The images of a record as it names them."""
    images = record.get("images") or record.get("image") or record.get("image_url") or []
    return images if isinstance(images, list) else [images]


IGNORE_INDEX = -100
