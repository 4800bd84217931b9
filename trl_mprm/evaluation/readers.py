"""
Convert the records of benchmarks, in their published formats, to items to score, with one function per format.

A line of VisualProcessBench (labels 1 correct, 0 neutral, -1 incorrect):

    {"image": ["images/12.png"], "question": "How many tiles are red?", "data_source": "DynaMath",
     "response": {"steps": ["A and C are red.", "So 3."], "process_correctness": [1, -1]}, "policy_model": "GPT-4o"}

becomes an item that [`ProcessRewardModel.score_batch`] reads:

    {"id": "DynaMath:0", "images": ["/data/images/12.png"], "prompt": "How many tiles are red?",
     "completions": ["A and C are red.", "So 3."], "labels": [1, -1], "source": "DynaMath", "group": "5f0c...",
     "policy_model": "GPT-4o"}

ProcessBench names the first error (`label`, from 0, or -1); the steps after it are unlabelled, hence neutral here:

    {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "...", "steps": ["...", "..."], "label": 1}

PRMBench lists the errors, counting from 1:

    {"idx": "circular_p1_0", "original_question": "...", "modified_question": "...", "classification": "circular",
     "modified_process": ["1. ...", "2. ..."], "error_steps": [2]}

Best-of-N is our own format: a question with candidates whose answers are known to be right or wrong. A candidate is a
list of `steps`, or a `text` that [`~trl_mprm.data.splitting.split_steps`] splits at blank lines. Each becomes an item with
neutral steps and `correct`:

    {"question": "How many tiles are red?", "images": ["12.png"], "source": "tiles",
     "candidates": [{"steps": ["A and C are red.", "2"], "correct": true}, {"text": "One.\\n\\n1", "correct": false}]}
"""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from ..data.images import ImageFinder
from ..data.rows import Refused, check_steps, check_unicode, picture_key, question_key
from ..data.splitting import split_steps


# <image>, <image1>, <image 1>: images come before the question here, and "<image>" is an image token of some models.
IMAGE_TAG = re.compile(r"<image ?(\d*)>\s*")


def visualprocessbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
    response = _field(record, "response", dict)
    steps, labels = _steps(_field(response, "steps", list)), _field(response, "process_correctness", list)
    question, source = _field(record, "question", str), _field(record, "data_source", str)
    images = _field(record, "image", str | list)
    if len(steps) != len(labels):
        raise Refused("labels_not_one_a_step", f"{len(steps)} steps, {len(labels)} labels")
    for number, label in enumerate(labels):
        if isinstance(label, bool) or label not in (1, 0, -1):
            raise Refused("bad_label", f"label {number} is {label!r:.80}, expected 1, 0 or -1")
    paths = _images([images] if isinstance(images, str) else images, finder)
    tags = IMAGE_TAG.findall(question)
    quirks["items_naming_more_images_than_supplied"] += _images_named(tags) > len(paths)
    question = IMAGE_TAG.sub("", question).strip()
    return [
        {
            "id": f"{source}:{index}",
            "images": paths,
            "prompt": question,
            "completions": steps,
            "labels": [int(label) for label in labels],
            "source": source,
            "group": _group(question, paths),
            "policy_model": record.get("policy_model"),
        }
    ]


def processbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
    question, steps = _field(record, "problem", str), _steps(_field(record, "steps", list))
    first_error = _field(record, "label", int)
    if isinstance(first_error, bool) or not -1 <= first_error < len(steps):
        raise Refused("bad_label", f"label is {first_error!r}, expected -1 or the index of one of {len(steps)} steps")
    wrong = [] if first_error == -1 else [-1] + [0] * (len(steps) - first_error - 1)
    return [
        {
            "id": _field(record, "id", str),
            "images": [],
            "prompt": question,
            "completions": steps,
            "labels": [1] * (len(steps) - len(wrong)) + wrong,
            "source": stem,
            "group": _group(question),
            "policy_model": record.get("generator"),
        }
    ]


def prmbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
    question, steps = _field(record, "modified_question", str), _steps(_field(record, "modified_process", list))
    errors, source = _field(record, "error_steps", list), _field(record, "classification", str)
    for error in errors:
        if isinstance(error, bool) or not isinstance(error, int):
            raise Refused("bad_label", f"error_steps holds {error!r:.80}, expected the number of a step")
    # PRMBench's own evaluator ignores numbers that do not belong to a step.
    quirks["error_steps_out_of_range"] += sum(not 1 <= error <= len(steps) for error in errors)
    return [
        {
            "id": f"{source}:{_field(record, 'idx', str)}",
            "images": [],
            "prompt": question,
            "completions": steps,
            "labels": [-1 if number in errors else 1 for number in range(1, len(steps) + 1)],
            "source": source,
            "group": _group(_field(record, "original_question", str)),
        }
    ]


def best_of_n(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
    question, candidates = _field(record, "question", str), _field(record, "candidates", list)
    source = _field(record, "source", str) if "source" in record else stem
    paths = _images(_field(record, "images", list) if "images" in record else [], finder)
    if not candidates:
        raise Refused("bad_field", "candidates is empty, expected at least one")
    items = []
    for number, candidate in enumerate(candidates):
        try:
            if not isinstance(candidate, dict):
                raise Refused("bad_field", f"expected an object, got {candidate!r:.80}")
            steps = _steps(_field(candidate, "steps", list) if "steps" in candidate else _split(candidate))
            correct = _field(candidate, "correct", bool)
        except Refused as refusal:
            raise Refused(refusal.reason, f"candidate {number}: {refusal}") from refusal
        items.append(
            {
                "id": f"{source}:{index}:{number}",
                "images": paths,
                "prompt": question,
                "completions": steps,
                "labels": [0] * len(steps),
                "source": source,
                "group": f"{stem}:{index}",
                "correct": correct,
            }
        )
    return items


def _steps(steps: list) -> list[str]:
    check_steps(steps, "the list of steps")
    return steps


def _split(candidate: dict) -> list[str]:
    text = _field(candidate, "text", str)
    return split_steps(text) if text.strip() else []


def _images(names: list, finder: ImageFinder) -> list[str]:
    return [finder.find(name) for name in names]


def _images_named(tags: list[str]) -> int:
    """The number of images that the `<image>` and `<imageN>` tags of a question refer to."""
    if any(len(tag) > 9 for tag in tags):
        longest = max(tags, key=len)
        raise Refused("bad_field", f"question: expected the number of an image, got <image{longest:.9}...>")
    return max([tags.count(""), *(int(tag) for tag in tags if tag)])


def _group(question: str, images: list[str] = ()) -> str:
    question, *pictures = question_key(question, map(image_digest, images))
    identity = json.dumps([question, pictures])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


@cache
def image_digest(path: str) -> str:
    """Hash the bytes of pictures rather than their paths, so that copies of a picture count as one."""
    return picture_key(Path(path).read_bytes())


def _field(record: dict[str, Any], key: str, kind: Any) -> Any:
    if not isinstance(record.get(key), kind):
        got = f"{record[key]!r:.80}" if key in record else "no such key"
        raise Refused("bad_field", f"{key}: expected {getattr(kind, '__name__', kind)}, got {got}")
    if kind is str:
        check_unicode(key, record[key])
    return record[key]
