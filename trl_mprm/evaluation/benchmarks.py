"""
Read benchmarks of labelled solutions into items to score. A benchmark is an entry of `BENCHMARKS`, which says where to
find it, how its records become items ([`~readers`]), what is measured and shown ([`~tasks`]), and its published rows.

An item is a row for [`ProcessRewardModel.score_batch`] with its labels, source and question:

    {"id": "DynaMath:0", "images": ["/data/images/12.png"], "prompt": "How many tiles are red?",
     "completions": ["A and C are red.", "So 3."], "labels": [1, -1], "source": "DynaMath", "group": "5f0c..."}
"""

import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.hub import is_hub_id, snapshot
from ..data.images import ImageFinder
from ..data.rows import Refused
from . import readers
from .metrics import prmbench_scores
from .published_results import TABLES, PublishedTable
from .tasks import BEST_OF_N, STEP_CORRECTNESS, Task


@dataclass(frozen=True)
class BenchmarkEntry:
    """
    The particulars of a benchmark.

    Args:
        title (`str`):
            Its name in tables.
        read (`Callable`):
            Turns a record into items: `(record, file stem, index, image finder, quirks) -> list[dict]`.
        headlines (`tuple[str, ...]`):
            The measures to show at the top of the page, the most important first.
        task ([`Task`], *optional*, defaults to `STEP_CORRECTNESS`):
            The task that is measured, and how tables and page show it.
        hub_id (`str`, *optional*):
            Dataset on the Hub.
        n_records (`int`, *optional*):
            How many records the published dataset has.
        files (`tuple[str, ...]`, *optional*):
            Its files of records, each JSONL or one JSON array. Defaults to every `*.jsonl` in a folder.
        threshold (`str` or `float`, *optional*, defaults to 0.5):
            Default threshold protocol.
        own_scores (`Callable`, *optional*):
            Computes the benchmark's own scores from [`step_metrics`]; results hold them under its name.
        published (`tuple[PublishedTable, ...]`, *optional*):
            Published rows to compare with.
    """

    title: str
    read: Callable[[dict, str, int, ImageFinder, Counter], list[dict]]
    headlines: tuple[str, ...]
    task: Task = STEP_CORRECTNESS
    hub_id: str | None = None
    n_records: int | None = None
    files: tuple[str, ...] = ()
    threshold: str | float = 0.5
    own_scores: Callable[[dict], dict] | None = None
    published: tuple[PublishedTable, ...] = ()


_BESIDE_F1 = ("auc", "first_error_accuracy", "average_precision_incorrect", "calibration_error")

BENCHMARKS = {
    "visualprocessbench": BenchmarkEntry(
        title="VisualProcessBench",
        read=readers.visualprocessbench,
        headlines=("macro_f1_step_weighted", "macro_f1_pooled", *_BESIDE_F1),
        hub_id="OpenGVLab/VisualProcessBench",
        n_records=2866,
        files=("test.jsonl",),
        threshold="held_out",
        published=TABLES["visualprocessbench"],
    ),
    "processbench": BenchmarkEntry(
        title="ProcessBench",
        read=readers.processbench,
        headlines=("processbench_f1_source_mean", "macro_f1_pooled", *_BESIDE_F1),
        hub_id="Qwen/ProcessBench",
        n_records=3400,
        files=("gsm8k.json", "math.json", "olympiadbench.json", "omnimath.json"),
    ),
    "prmbench": BenchmarkEntry(
        title="PRMBench",
        read=readers.prmbench,
        headlines=("macro_f1_pooled", *_BESIDE_F1),
        hub_id="hitsmy/PRMBench_Preview",
        n_records=6216,
        files=("prmbench_preview.jsonl",),
        own_scores=prmbench_scores,
        published=TABLES["prmbench"],
    ),
    "best-of-n": BenchmarkEntry(
        title="best of N",
        read=readers.best_of_n,
        headlines=("accuracy_mean", "accuracy_min", "accuracy_product", "accuracy_last", "pass_at_1", "pass_at_n"),
        task=BEST_OF_N,
    ),
}


@dataclass(frozen=True)
class Benchmark:
    """
    Items to score, and refused records, each as `{"file", "line", "reason", "detail"}` with `line` counting from 1.

    `quirks` counts oddities that were accepted. `name` is one of `BENCHMARKS`.
    """

    path: str
    items: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    quirks: dict[str, int] = field(default_factory=dict)
    name: str = "visualprocessbench"

    @property
    def entry(self) -> BenchmarkEntry:
        return BENCHMARKS[self.name]

    @property
    def hub_id(self) -> str | None:
        """Id of the published dataset if the number of records matches; results on other data are not results on it."""
        entry = self.entry
        return entry.hub_id if len(self.items) + len(self.refused) == entry.n_records else None

    @property
    def title(self) -> str:
        """Name for reports and cards, which says if the data are not the published ones or records were refused."""
        return self.titled(n_failed=0)

    def titled(self, n_failed: int) -> str:
        """The title, with the number of items that could not be scored."""
        title = self.entry.title if self.hub_id == self.entry.hub_id else f"{self.entry.title}, other data"
        n_refused, n_items = len(self.refused), len(self.items)
        missing = [f"{n_refused:,} of {n_items + n_refused:,} records refused"] if n_refused else []
        missing += [f"{n_failed:,} of {n_items:,} items not scored"] if n_failed else []
        return f"{title} ({', '.join(missing)})" if missing else title

    def check_measurable(self, threshold: float | str) -> None:
        """Measure scores of 0.5, so that data that cannot be measured raise an error before hours of scoring."""
        tried = [{**item, "scores": [0.5] * len(item["labels"])} for item in self.items]
        self.entry.task.measure(tried, threshold, n_resamples=0)

    @property
    def report(self) -> dict[str, Any]:
        """Counts of records read, refused and odd, for `results.json`."""
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
            Folder that image paths are relative to and must stay in. Defaults to the folder of the file.
        name (`str`, *optional*, defaults to `"visualprocessbench"`):
            Its format, one of `BENCHMARKS`: `visualprocessbench`, `processbench`, `prmbench` or `best-of-n`.

    Returns:
        [`Benchmark`]. Refused records have one of these reasons: `not_json`, `bad_field` (a key is missing or of another
        type), `text_not_unicode`, `empty_steps`, `step_without_text`, `labels_not_one_a_step`, `bad_label`,
        `duplicate_id`, or one of `image_not_a_path`, `image_missing`, `image_outside_root`, `image_unreadable`.
        `group` is the same for solutions of one question: a hash of the question and the bytes of its images.

    Raises:
        `FileNotFoundError`: no such file. `ValueError`: an unknown `name`, a file that is not a JSON array, no usable record.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}, expected one of {', '.join(BENCHMARKS)}")
    entry = BENCHMARKS[name]
    files = _files(Path(path), entry)
    finder = ImageFinder(image_root if image_root is not None else files[0].parent)
    items, refused, quirks, seen = [], [], Counter(), set()
    for file in files:
        for number, record in tqdm(_records(file), desc=f"reading {file.name}", unit="item", delay=2):
            try:
                read = entry.read(_object(record), file.stem, number - 1, finder, quirks)
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
    if entry.task.labelled:
        quirks["neutral_steps"] += sum(item["labels"].count(0) for item in items)
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
            Folder of the images. Defaults to the folder of the file, or to the unpacked `images.zip` from the Hub.
    """
    if data is None or is_hub_id(str(data)):
        data, unpacked = download_benchmark(name, data)
        image_root = image_root or unpacked
    return read_benchmark(data, image_root, name)


def download_benchmark(name: str, hub_id: str | None = None) -> tuple[Path, Path]:
    """
    Fetch a benchmark from the Hub, unpacking its `images.zip` if it has one.

    Args:
        name (`str`):
            One of `BENCHMARKS`.
        hub_id (`str`, *optional*):
            Another dataset in that format. Defaults to the published one.

    Returns:
        `tuple[Path, Path]`: folder of the files, and the root of its images, for [`read_benchmark`].
    """
    entry = BENCHMARKS[name]
    hub_id = hub_id or entry.hub_id
    if hub_id is None:
        raise ValueError(f"{name} has no dataset on the Hub: name a file or folder of yours with --data")
    patterns = [*entry.files, "images.zip"]
    folder = snapshot(hub_id, "dataset", allow_patterns=patterns)
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


def _files(path: Path, entry: BenchmarkEntry) -> list[Path]:
    files = [path / name for name in entry.files] if path.is_dir() else [path]
    if path.is_dir() and not entry.files:
        files = [file for file in sorted(path.glob("*.jsonl")) if file.is_file()] or [path / "*.jsonl"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; expected a file or a folder with {', '.join(entry.files) or '*.jsonl'} "
                "(download a Hub dataset first: hf download --repo-type dataset --local-dir FOLDER ID)"
            )
    return files


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield lines as bytes, or the objects of a JSON array, numbered from 1."""
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
