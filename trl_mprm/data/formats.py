"""
Convert a record of annotated steps, in any supported format, to a row.

In, a record of the raw annotations of VisualPRM400K-v1.1-Raw:

    {"image": "Geometry3K/1471.png", "question": "<image>\\n...", "question_orig": "Find x.", "num_mc_sequences": 16,
     "steps_with_score": [{"step": "x = 5.", "score": 0.125, "num_mc_correct": 2, "num_mc_total": 16}]}

Out (images are found later, by `images.ImageFinder`):

    {"prompt": "Find x.", "completions": ["x = 5."], "labels": [0.125], "mc_scores": [0.125], "mc_counts": [2],
     "mc_total": 16}

Every other format is a small function that converts a record to a stepwise one (`prompt`, `completions`, `labels`, ...).
The keys of the record alone decide its format; a record of no known format is refused.
"""

import json
import re

from .rows import Reason, Refused, check_steps, check_unicode, measured


# The keys that a row is made from. All other keys of a record are carried along unread.
READ_KEYS = {
    *("images", "prompt", "completions", "labels", "mc_scores", "mc_counts", "mc_total", "source", "rollout_id"),
    *("question", "question_orig", "steps_with_score", "num_mc_sequences", "image", "image_url"),
    *("conversations", "prm_counts", "input", "instruction", "output", "label"),
}


def to_row(record: dict | None, drop_answer_step: bool = False) -> dict:
    """
    Convert a record to a row, without its images. Raises [`Refused`] with a [`Reason`].

    Args:
        record (`dict`):
            A record of any supported format; None stands for a line that is not a JSON object.
        drop_answer_step (`bool`, *optional*, defaults to `False`):
            Treat a last step that states the final answer as not measured: its score says whether the answer is right,
            not whether a step of reasoning is.

    Examples:
    ```python
    >>> from trl_mprm.data.formats import to_row
    >>> row = to_row({"prompt": "1 + 1?", "completions": ["1 + 1 = 2.", "Final answer: 2"], "labels": [0.5, 1]}, True)
    >>> row["labels"]
    [0.5, -100.0]

    ```
    """
    _check_object(record)
    row = _raw_row(record) if record.get("steps_with_score") is not None else _stepwise_row(_stepwise(record))
    if drop_answer_step and states_answer(row["completions"][-1]):
        row["labels"][-1], row["mc_scores"] = -100.0, [*row["mc_scores"][:-1], None]
    if all(score is None for score in row["mc_scores"]):
        raise Refused(Reason.NOTHING_MEASURED)
    for name in ("source", "rollout_id"):
        if isinstance(record.get(name), str):
            check_unicode(name, record[name])
    return row


def to_solution(record: dict | None) -> dict:
    """
    Question and steps of a record to be scored, annotated or not. Raises [`Refused`] with a [`Reason`].

    Examples:
    ```python
    >>> from trl_mprm.data.formats import to_solution
    >>> to_solution({"prompt": "1 + 1?", "completions": ["1 + 1 = 2."]})
    {'prompt': '1 + 1?', 'completions': ['1 + 1 = 2.']}

    ```
    """
    _check_object(record)
    steps = record.get("steps_with_score")
    if isinstance(steps, list):
        steps = [step.get("step") if isinstance(step, dict) else None for step in steps]
        record = {**record, "completions": steps}
    elif "completions" not in record:
        record = _stepwise(record)
    check_steps(record.get("completions"))
    return {"prompt": prompt_text(record), "completions": record["completions"]}


def _check_object(record: object) -> None:
    if not isinstance(record, dict):
        raise Refused(
            Reason.NOT_JSON, f"expected an object with keys, got {record!r:.60}" if record is not None else ""
        )


def states_answer(step: str) -> bool:
    """Whether a step states the final answer: "Final answer: 5", "The answer is 5", "Answer: 5", "\\boxed{5}"."""
    return re.search(r"final answer|\banswer(?: is|:)|\\boxed\b", step, re.IGNORECASE) is not None


def _raw_row(record: dict) -> dict:
    prompt = prompt_text(record)
    steps = record["steps_with_score"]
    if not isinstance(steps, list) or not steps:
        raise Refused(Reason.EMPTY_STEPS)
    if not all(isinstance(step, dict) for step in steps):
        raise Refused(Reason.STEP_WITHOUT_TEXT)
    completions = [step.get("step") for step in steps]
    check_steps(completions)
    scores = [_score(step.get("score")) if measured(step.get("num_mc_total")) else None for step in steps]
    known = {count(step.get("num_mc_total")) for step in steps} - {0, None}
    known = known or {count(record.get("num_mc_sequences")) or None}
    return {
        "prompt": prompt,
        "completions": completions,
        "labels": [-100.0 if score is None else score for score in scores],
        "mc_scores": scores,
        "mc_counts": [count(step.get("num_mc_correct")) for step in steps],
        # one number for all steps, or none: a count over another total would be a wrong count
        "mc_total": known.pop() if len(known) == 1 else None,
    }


def _one_total(totals: list) -> int | None:
    """One number for all measured steps, or none: a count over another total would be a wrong count."""
    known = {count(total) for total in totals} - {0}
    return known.pop() if len(known) == 1 else None


def _stepwise_row(record: dict) -> dict:
    prompt = prompt_text(record)
    completions = record.get("completions")
    check_steps(completions)
    labels, scores, counts = record.get("labels"), record.get("mc_scores"), record.get("mc_counts")
    labels = scores if labels is None else labels
    if labels is None:
        raise Refused(Reason.STEP_WITHOUT_SCORE)
    for values in (labels, scores, counts):
        if values is not None and (not isinstance(values, list) or len(values) != len(completions)):
            raise Refused(Reason.LABELS_NOT_ONE_A_STEP)
    if labels is not scores:
        labels = [float(label) if isinstance(label, bool) else label for label in labels]
        labels = [None if label == -100 else _score(label) for label in labels]
    scores = labels if scores is None else [None if score is None else _score(score) for score in scores]
    total = record.get("mc_total")
    totals = total if isinstance(total, list) else [total] * len(completions)
    if len(totals) != len(completions):
        raise Refused(Reason.LABELS_NOT_ONE_A_STEP)
    labels, scores = (
        [value if measured(of) else None for value, of in zip(values, totals, strict=True)]
        for values in (labels, scores)
    )
    return {
        "prompt": prompt,
        "completions": completions,
        "labels": [-100.0 if label is None else float(label) for label in labels],
        "mc_scores": scores,
        "mc_counts": [count(value) for value in counts or [None] * len(completions)],
        "mc_total": _one_total(totals),
    }


# ---- other formats -> stepwise records


def _stepwise(record: dict) -> dict:
    """Convert a record in any format but the raw one, recognised by its keys, to a stepwise record."""
    if "conversations" in record:
        turns = record["conversations"]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Refused(Reason.EMPTY_STEPS)
        marked = any(isinstance(turn.get("value"), list) for turn in turns)
        return marked_conversation(record) if marked else chat_of_steps(record)
    if isinstance(record.get("question"), dict) and isinstance(record.get("label"), dict):
        return rated_steps(record)
    for text, marked in (("input", "label"), ("instruction", "output")):
        if isinstance(record.get(text), str) and isinstance(record.get(marked), str):
            return marked_text(record[text], record[marked])
    if not record.keys() & {"completions", "steps_with_score"}:
        raise Refused(
            Reason.UNKNOWN_FORMAT,
            f"expected `steps_with_score`, or `prompt`, `completions` and `labels`, found the keys "
            f"{', '.join(map(repr, record)) or 'of an empty object'}",
        )
    return record


def marked_conversation(record: dict) -> dict:
    """
    MM-PRM, the code of the BIS paper, and Beta-Binomial-PRM: `<prm>` after each step, one score for each.

    `prm_counts` has for each step its `k` right continuations out of `n`; a step with n = 0 was not measured.

    Examples:
    ```python
    >>> from trl_mprm.data.formats import marked_conversation
    >>> turns = [{"from": "human", "value": "Question: 1 + 1?\\nProcess: It is 2.<prm>\\n\\nSo 2.<prm>"}]
    >>> turns += [{"from": "gpt", "value": [1.0, 0.25]}]
    >>> marked_conversation({"conversations": turns})
    {'prompt': '1 + 1?', 'completions': ['It is 2.', 'So 2.'], 'labels': [1.0, 0.25]}

    ```
    """
    human, labels = (
        next((turn.get("value") for turn in record["conversations"] if turn.get("from") == name), None)
        for name in ("human", "gpt")
    )
    question, found, process = human.partition("\nProcess:") if isinstance(human, str) else ("", "", "")
    if not found:
        raise Refused(Reason.PROMPT_MISSING)
    steps = [step.strip() for step in process.split("<prm>")]
    row = {
        "prompt": IMAGE_PLACE.sub("", question).strip().removeprefix("Question:").strip(),
        "completions": steps if steps[-1] else steps[:-1],
        "labels": labels,
    }
    counts = record.get("prm_counts")
    if counts is None:
        return row
    right, of = (counts.get("k"), counts.get("n")) if isinstance(counts, dict) else (None, None)
    lists = [row["completions"], labels, right, of]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise Refused(Reason.LABELS_NOT_ONE_A_STEP)
    known = {count(total) for total in of} - {0, None}
    return row | {
        "labels": [label if measured(total) else -100 for label, total in zip(labels, of, strict=True)],
        "mc_counts": right,
        "mc_total": known.pop() if len(known) == 1 else None,
    }


def chat_of_steps(record: dict) -> dict:
    """
    VisualPRM400K and VisualPRM400K-v1.1: a chat with a turn for each step, answered by `+` or `-`.

    Examples:
    ```python
    >>> from trl_mprm.data.formats import chat_of_steps
    >>> texts = ["Judge each step.", "### Question:\\n1 + 1?\\n\\n### Solution Process:\\nIt is 2.", "+", "So 3.", "-"]
    >>> turns = [{"from": who, "value": text} for who, text in zip(["system"] + ["human", "gpt"] * 2, texts)]
    >>> chat_of_steps({"conversations": turns})
    {'prompt': '1 + 1?', 'completions': ['It is 2.', 'So 3.'], 'labels': [1.0, 0.0]}

    ```
    """
    turns = [turn for turn in record["conversations"] if turn.get("from") != "system"]
    steps, labels = turns[::2], turns[1::2]
    if not steps:
        raise Refused(Reason.EMPTY_STEPS)
    if any(turn.get("from") != "human" for turn in steps) or any(turn.get("from") != "gpt" for turn in labels):
        raise Refused(Reason.UNKNOWN_FORMAT)
    first = steps[0].get("value")
    question, found, step = first.partition("### Solution Process:") if isinstance(first, str) else ("", "", "")
    if not found:
        raise Refused(Reason.UNKNOWN_FORMAT)
    marks = {"+": 1.0, "-": 0.0}
    return {
        "prompt": IMAGE_PLACE.sub("", question).strip().removeprefix("### Question:").strip(),
        "completions": [step.strip(), *(turn.get("value") for turn in steps[1:])],
        "labels": [
            marks.get(value, value) if isinstance(value := turn.get("value"), str) else None for turn in labels
        ],
    }


def rated_steps(record: dict) -> dict:
    """
    PRM800K: steps that people rated 1, 0 or -1. A neutral step (0), or one that nobody rated, has no label.

    Of several candidates for a step, the chosen one is taken, else the one that a person wrote, else the first.

    Examples:
    ```python
    >>> from trl_mprm.data.formats import rated_steps
    >>> step = {"completions": [{"text": "It is 3.", "rating": -1}], "human_completion": None, "chosen_completion": None}
    >>> rated_steps({"question": {"problem": "1 + 1?"}, "label": {"steps": [step]}})
    {'prompt': '1 + 1?', 'completions': ['It is 3.'], 'labels': [0.0]}

    ```
    """
    steps = record["label"].get("steps")
    if not isinstance(steps, list) or not steps:
        raise Refused(Reason.EMPTY_STEPS)
    taken = []
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("completions"), list):
            raise Refused(Reason.STEP_WITHOUT_TEXT)
        candidates, chosen = step["completions"], step.get("chosen_completion")
        if count(chosen) is None and isinstance(step.get("human_completion"), dict):
            candidates, chosen = [step["human_completion"]], 0
        candidates = candidates[count(chosen) or 0 :]
        if not candidates or not isinstance(candidates[0], dict):
            raise Refused(Reason.STEP_WITHOUT_TEXT)
        taken.append(candidates[0])
    ratings = {1: 1.0, -1: 0.0, 0: -100, None: -100}
    return {
        "prompt": record["question"].get("problem"),
        "completions": [step.get("text") for step in taken],
        "labels": [ratings.get(rating, rating) for rating in (_hashable(step.get("rating")) for step in taken)],
    }


def _hashable(value: object) -> object:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def marked_text(text: str, marked: str) -> dict:
    """
    Math-Shepherd and URSA: question and steps in one text, and the same text with `+` or `-` after each step.

    Examples:
    ```python
    >>> from trl_mprm.data.formats import marked_text
    >>> marked_text("1 + 1? Step 1: It is 2. ки\\nStep 2: So 3. ки", "1 + 1? Step 1: It is 2. +\\nStep 2: So 3. -")
    {'prompt': '1 + 1?', 'completions': ['Step 1: It is 2.', 'Step 2: So 3.'], 'labels': [1.0, 0.0]}

    ```
    """
    question, *steps = re.split(r"(?=\bStep \d+ ?:)", marked)
    steps = [re.fullmatch(r"(.*?)\s*([+-]?)\s*", step.split("†Answer:")[0], re.DOTALL).groups() for step in steps]
    question = question.strip() or re.split(r"\bStep \d+ ?:", text)[0]
    return {
        "prompt": question[question.find("Question:") + len("Question:") :] if "Question:" in question else question,
        "completions": [step for step, _ in steps],
        "labels": [{"+": 1.0, "-": 0.0, "": None}[mark] for _, mark in steps],
    }


# ---- parts of a record


def prompt_text(record: dict) -> str:
    """The question without its `<image>` tags, since in our rendering the images come first."""
    text = record.get("question_orig") or record.get("question") or record.get("prompt")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict) and text[0].get("role") == "user":
        text = text[0].get("content")
    if not isinstance(text, str) or not (text := IMAGE_PLACE.sub("", text).strip()):
        raise Refused(Reason.PROMPT_MISSING)
    return check_unicode("the question", text)


IMAGE_PLACE = re.compile(r"<image>\n?")


def _score(value: object) -> float:
    if value is None:
        raise Refused(Reason.STEP_WITHOUT_SCORE)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise Refused(Reason.SCORE_NOT_A_NUMBER)
    if not 0 <= value <= 1:
        raise Refused(Reason.SCORE_OUT_OF_RANGE)
    return float(value)


def count(value: object) -> int | None:
    """A whole number of at least 0, else None. 16.0 is accepted because columns with nulls come back as floats."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if number and 0 <= value < 2**63 and value == int(value) else None


def parse(line: bytes) -> dict | None:
    """The JSON object of a line, or None. A whole number of more digits than Python reads becomes a float."""
    try:
        try:
            record = json.loads(line)
        except ValueError as error:
            if type(error) is not ValueError:  # not JSON, or not UTF-8
                return None
            record = json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 4300 else float(digits))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
