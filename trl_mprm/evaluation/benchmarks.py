"""
Benchmarks of labelled solutions, in the formats in which they are published, as items to score.

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

Best-of-N is our own: a question with candidates whose answers are known to be right or wrong. A candidate is a list of
`steps`, or a `text` that [`~trl_mprm.splitting.split_steps`] splits at blank lines. Each becomes an item with neutral
steps and `correct`:

    {"question": "How many tiles are red?", "images": ["12.png"], "source": "tiles",
     "candidates": [{"steps": ["A and C are red.", "2"], "correct": true}, {"text": "One.\\n\\n1", "correct": false}]}
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.images import ImageFinder
from ..data.rows import Refused, check_steps, check_unicode
from ..data.splitting import split_steps


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)")

# <image>, <image1>, <image 1>: images come before the question here, and "<image>" is an image token of some models.
IMAGE_TAG = re.compile(r"<image ?(\d*)>\s*")


@dataclass(frozen=True)
class Benchmark:
    """
    Items to score, and what cannot be scored: `{"file", "line", "reason", "detail"}` each, `line` counting from 1.

    `quirks` counts what is peculiar and was kept. `name` is one of `BENCHMARKS`.
    """

    path: str
    items: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    quirks: dict[str, int] = field(default_factory=dict)
    name: str = "visualprocessbench"

    @property
    def hub_id(self) -> str | None:
        """The published dataset, if these are as many records as it has; results on others are not results on it."""
        layout = BENCHMARKS[self.name]
        return layout.hub_id if len(self.items) + len(self.refused) == layout.n_records else None

    @property
    def title(self) -> str:
        """Name for cards, which tells records of one's own from the published ones."""
        layout = BENCHMARKS[self.name]
        return layout.title if self.hub_id == layout.hub_id else f"{layout.title}, other data"

    @property
    def report(self) -> dict[str, Any]:
        """What was read, refused and peculiar, for `results.json`."""
        reasons = dict(sorted(Counter(refusal["reason"] for refusal in self.refused).items()))
        return {
            "name": self.name,
            "title": self.title,
            "hub_id": self.hub_id,
            "path": self.path,
            "read": len(self.items) + len(self.refused),
            "refused": reasons,
            "refused_lines": self.refused,
            "quirks": self.quirks,
        }


@dataclass(frozen=True)
class BenchmarkFormat:
    """
    Where a benchmark is found and how its records are read.

    Args:
        title (`str`):
            Its name in tables.
        hub_id (`str` or `None`):
            Dataset on the Hub; `None` where none is published.
        n_records (`int` or `None`):
            How many records the published dataset has.
        files (`tuple[str, ...]`):
            Its files of records, JSONL or one JSON array each.
        threshold (`str` or `float`):
            Threshold protocol unless another is asked for.
        items (`Callable`):
            Turns a record into items: `(record, file stem, index, image finder, quirks) -> list[dict]`.
    """

    title: str
    hub_id: str | None
    n_records: int | None
    files: tuple[str, ...]
    threshold: str | float
    items: Callable[[dict, str, int, ImageFinder, Counter], list[dict]]


def read_benchmark(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None, name: str = "visualprocessbench"
) -> Benchmark:
    """
    Read a benchmark, checking every record and every image.

    Args:
        path (`str` or `os.PathLike`):
            A file, or a folder with the files of the benchmark (`test.jsonl`; `gsm8k.json`, `math.json`,
            `olympiadbench.json`, `omnimath.json`; `prmbench_preview.jsonl`).
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that image paths are relative to and must stay in. Default: the folder of the file.
        name (`str`, *optional*, defaults to `"visualprocessbench"`):
            Its format, one of `BENCHMARKS`: `visualprocessbench`, `processbench`, `prmbench` or `best-of-n`.

    Returns:
        [`Benchmark`]. Refused records have one of these reasons: `not_json`, `bad_field` (a key is missing or of another
        type), `text_not_unicode`, `empty_steps`, `step_without_text`, `labels_not_one_a_step`, `bad_label`,
        `duplicate_id`, or one of `image_not_a_path`, `image_missing`, `image_outside_root`, `image_unreadable`.
        `group` is the same for solutions of one question: a hash of the question and the bytes of its images.

    Raises:
        `FileNotFoundError`: no such file. `ValueError`: another `name`, a file that is no JSON array, no usable record.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    layout = BENCHMARKS[name]
    files = _files(Path(path), layout)
    finder = ImageFinder(image_root if image_root is not None else files[0].parent)
    items, refused, quirks, seen = [], [], Counter(), set()
    for file in files:
        for number, record in tqdm(_records(file), desc=f"reading {file.name}", unit="item", delay=2):
            try:
                read = layout.items(_object(record), file.stem, number - 1, finder, quirks)
                repeated = [item["id"] for item in read if item["id"] in seen]
                if repeated:
                    raise Refused("duplicate_id", f"{repeated[0]!r} came before")
            except Refused as refusal:
                refused.append({"file": file.name, "line": number, "reason": refusal.reason, "detail": refusal.detail})
            else:
                items += read
                seen.update(item["id"] for item in read)
    if not items:
        first = "it is empty" if not refused else "line {line}: {reason}, {detail}".format(**refused[0])
        raise ValueError(f"{files[0]} has no usable line ({first}); expected the format of {name}")
    quirks["multi_image_items"] += sum(len(item["images"]) > 1 for item in items)
    quirks["neutral_steps"] += sum(item["labels"].count(0) for item in items if "correct" not in item)
    counts = {quirk: quirks[quirk] for quirk in sorted(quirks) if quirks[quirk]}
    benchmark = Benchmark(str(files[0] if len(files) == 1 else path), items, refused, counts, name)
    if refused:
        counts = ", ".join(f"{count} {reason}" for reason, count in benchmark.report["refused"].items())
        first = "line {line}: {detail}".format(**refused[0])
        warnings.warn(f"{refused[0]['file']}: {len(refused)} lines refused ({counts}); first, {first}", stacklevel=2)
    return benchmark


def load_benchmark(
    name: str, data: str | os.PathLike | None = None, image_root: str | os.PathLike | None = None
) -> Benchmark:
    """
    Read a benchmark from a file or folder, or from the Hub.

    Args:
        name (`str`):
            One of `BENCHMARKS`.
        data (`str` or `os.PathLike`, *optional*):
            A file, a folder, or the id of a dataset on the Hub. Defaults to the published dataset.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder of the images. Defaults to the folder of the file, or to what the Hub's `images.zip` held.
    """
    if data is None or (HUB_ID.fullmatch(str(data)) and not Path(data).exists()):
        data, unpacked = download_benchmark(name, data)
        image_root = image_root or unpacked
    return read_benchmark(data, image_root, name)


def download_benchmark(name: str, hub_id: str | None = None) -> tuple[Path, Path]:
    """
    Fetch a benchmark from the Hub, unpacking its `images.zip` where it has one.

    Args:
        name (`str`):
            One of `BENCHMARKS`.
        hub_id (`str`, *optional*):
            Another dataset in that format. Defaults to the published one.

    Returns:
        `tuple[Path, Path]`: folder of the files, and the root of its images, for [`read_benchmark`].
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    layout = BENCHMARKS[name]
    hub_id = hub_id or layout.hub_id
    if hub_id is None:
        raise ValueError(f"{name} has no dataset on the Hub: name a file or folder of yours with --data")
    patterns = [*layout.files, "images.zip"]
    try:
        folder = Path(snapshot_download(hub_id, repo_type="dataset", allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{hub_id}: no such file or folder here, and no such dataset on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{hub_id}: no such file or folder here, and the Hub cannot be reached") from error
    archive = folder / "images.zip"
    if not archive.is_file():
        return folder, folder
    root = folder / "unpacked-images"
    if not root.is_dir():
        part = Path(tempfile.mkdtemp(prefix=".unpacked-images.", dir=folder))
        try:
            with zipfile.ZipFile(archive) as members:  # extract() keeps every member below `part`
                for member in tqdm(members.infolist(), desc=f"unpacking {hub_id}", unit="file", delay=2):
                    members.extract(member, part)
            part.replace(root)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive} is no whole archive ({error}): delete it and run again") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder, root


def _files(path: Path, layout: BenchmarkFormat) -> list[Path]:
    files = [path / name for name in layout.files] if path.is_dir() else [path]
    if path.is_dir() and not layout.files:
        files = sorted(path.glob("*.jsonl")) or [path / "*.jsonl"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; expected a file or a folder with {', '.join(layout.files) or '*.jsonl'} "
                "(download a Hub dataset first: hf download --repo-type dataset --local-dir FOLDER ID)"
            )
    return files


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbers from 1, and lines as bytes; or the objects of a JSON array."""
    if file.suffix != ".json":
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            if line.strip():
                yield number, line
        return
    try:
        records = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a JSON array of records ({error}): download it again") from error
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected a JSON array of records, got {type(records).__name__}")
    yield from enumerate(records, start=1)


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise Refused("not_json", str(error)) from error
    if not isinstance(record, dict):
        raise Refused("not_json", f"expected an object, got {type(record).__name__}")
    return record


# ---- the formats


def _visualprocessbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
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


def _processbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
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


def _prmbench(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
    question, steps = _field(record, "modified_question", str), _steps(_field(record, "modified_process", list))
    errors, source = _field(record, "error_steps", list), _field(record, "classification", str)
    for error in errors:
        if isinstance(error, bool) or not isinstance(error, int):
            raise Refused("bad_label", f"error_steps holds {error!r:.80}, expected the number of a step")
    # PRMBench's own evaluator passes over numbers that name no step.
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


def _best_of_n(record: dict, stem: str, index: int, finder: ImageFinder, quirks: Counter) -> list[dict]:
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


BENCHMARKS = {
    "visualprocessbench": BenchmarkFormat(
        title="VisualProcessBench",
        hub_id="OpenGVLab/VisualProcessBench",
        n_records=2866,
        files=("test.jsonl",),
        threshold="held_out",
        items=_visualprocessbench,
    ),
    "processbench": BenchmarkFormat(
        title="ProcessBench",
        hub_id="Qwen/ProcessBench",
        n_records=3400,
        files=("gsm8k.json", "math.json", "olympiadbench.json", "omnimath.json"),
        threshold=0.5,
        items=_processbench,
    ),
    "prmbench": BenchmarkFormat(
        title="PRMBench",
        hub_id="hitsmy/PRMBench_Preview",
        n_records=6216,
        files=("prmbench_preview.jsonl",),
        threshold=0.5,
        items=_prmbench,
    ),
    "best-of-n": BenchmarkFormat(
        title="best of N", hub_id=None, n_records=None, files=(), threshold=0.5, items=_best_of_n
    ),
}


def _steps(steps: list) -> list[str]:
    check_steps(steps, "the list of steps")
    return steps


def _split(candidate: dict) -> list[str]:
    text = _field(candidate, "text", str)
    return split_steps(text) if text.strip() else []


def _images(names: list, finder: ImageFinder) -> list[str]:
    return [finder.find(name) for name in names]


def _images_named(tags: list[str]) -> int:
    """How many images `<image>` and `<imageN>` tags of a question ask for."""
    if any(len(tag) > 9 for tag in tags):
        longest = max(tags, key=len)
        raise Refused("bad_field", f"question: expected the number of an image, got <image{longest:.9}...>")
    return max([tags.count(""), *(int(tag) for tag in tags if tag)])


def _group(question: str, images: list[str] = ()) -> str:
    identity = json.dumps([question, [_digest(path) for path in images]])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _field(record: dict[str, Any], key: str, kind: Any) -> Any:
    if not isinstance(record.get(key), kind):
        got = f"{record[key]!r:.80}" if key in record else "no such key"
        raise Refused("bad_field", f"{key}: expected {getattr(kind, '__name__', kind)}, got {got}")
    if kind is str:
        check_unicode(key, record[key])
    return record[key]
