"""Read rows one by one, from files or the Hub; each is either usable or refused, with its file and line."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets import Features, Image, List
from tqdm.auto import tqdm

from .evidence import kept_sources
from .formats import parse, to_row
from .hub import hub_annotations, is_hub_id
from .images import ImageFinder, find_images
from .rows import Reason, Refused, own_text
from .shards import Paths, line_batches, plan_shards
from .splits import local_inputs


class Refusal(NamedTuple):
    """A row that was not used. `line` counts from 1, as in editors; `detail` says what was found."""

    file: str
    line: int
    source: str
    reason: Reason
    detail: str = ""


class Rollout(NamedTuple):
    """A row and its place. `line` counts from 1, as in editors; `source` is the one given by the file name."""

    file: str
    line: int
    source: str
    row: dict


@dataclass
class Tally:
    """Keeps the refusals among rows that are read, and whether any image was found."""

    refusals: list[Refusal] = field(default_factory=list)
    found: bool = False

    def rows(self, items: Iterable[Rollout | Refusal]) -> Iterator[dict]:
        """Yield the usable rows."""
        for item in items:
            if isinstance(item, Rollout):
                self.found = self.found or bool(item.row["images"])
                yield item.row
            else:
                self.found = self.found or item.reason is Reason.IMAGE_UNREADABLE
                self.refusals.append(item)

    @property
    def came_without_images(self) -> bool:
        """Whether images are missing and none was found; rows without images do not count either way."""
        return not self.found and any(refusal.reason is Reason.IMAGE_MISSING for refusal in self.refusals)


def came_without_images(items: Iterable[Rollout | Refusal]) -> bool:
    tally = Tally()
    for _ in tally.rows(items):
        if tally.found:
            return False
    return tally.came_without_images


def read_rollouts(
    inputs: Paths,
    image_root: str | os.PathLike | None = None,
    check_images: bool = True,
    drop_answer_step: bool = False,
    streaming: bool = False,
    split: str = "train",
    name: str | None = None,
    keep_missing: bool = False,
) -> Iterator[Rollout | Refusal]:
    """
    Read rollouts one by one: a [`Rollout`] for each row that can be used, a [`Refusal`] for each that cannot.

    An image is checked once, by its header and its last bytes: a known format, at most `MAX_PIXELS` pixels, the end
    mark of PNG or JPEG present. Only a file without that mark is decoded. `check_images=False` leaves image paths
    unchanged and does not look for the files. `streaming` applies to datasets on the Hub only. `split` and `name` are as
    in [`load_rollouts`]. `keep_missing` keeps rows whose images are missing, with the paths where they would be.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.data.reading import read_rollouts
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = file.write_text('{"prompt": "1 + 1?", "completions": ["2"], "labels": [true]}\\n{"prompt": "1 + 2?"}\\n')
    >>> for item in read_rollouts(file):
    ...     print(item.line, item.row["labels"] if hasattr(item, "row") else item.reason)
    1 [1.0]
    2 unknown_format

    ```
    """
    finders: dict[Path | None, ImageFinder] = {}
    for file, folder, number, source, record in _records(inputs, streaming, split, name):
        root = folder if image_root is None else Path(image_root)
        if root not in finders:
            finders[root] = ImageFinder(root, check_images)
        try:
            row = to_row(record, drop_answer_step)
            row["images"] = find_images(record, finders[root], keep_missing)
            # The default id names the file, not the row's own source, which two files may share.
            row["source"] = own_text(record, "source") or source
            row["rollout_id"] = own_text(record, "rollout_id") or f"{source}:{number}"
        except Refused as refused:
            yield Refusal(file, number + 1, own_text(record, "source") or source, refused.reason, refused.detail)
        else:
            yield Rollout(file, number + 1, source, row)


def describe_refusals(refusals: Iterable[Refusal]) -> list[str]:
    """One line per reason: how many rows were refused, from which sources, and the place of the first."""
    by_reason: dict[Reason, list[Refusal]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal)
    lines = []
    for reason, rows in by_reason.items():
        sources = ", ".join(f"{source} {count:,}" for source, count in Counter(row.source for row in rows).items())
        detail = f": {rows[0].detail}" * bool(rows[0].detail)
        lines.append(
            f"{reason}: refused {len(rows):,} rows ({sources}), the first at {rows[0].file}:{rows[0].line}{detail}"
        )
    return lines


def _records(
    inputs: Paths, streaming: bool, split: str, name: str | None
) -> Iterator[tuple[str, Path | None, int, str, object]]:
    """Yield for every row: file, its folder, line from 0, source by file name, parsed line (None: no JSON object)."""
    if is_hub_id(inputs) and (hub_annotations(inputs) is None or (split, name) != ("train", None)):
        for number, record in enumerate(_hub_rows(inputs, streaming, split, name)):
            yield str(inputs), None, number, str(inputs).split("/")[-1], record
        return
    shards = plan_shards(local_inputs(inputs, split, name))
    total = sum({shard.file: shard.stamp[0] for shard in shards}.values())
    with tqdm(total=total, unit="B", unit_scale=True, delay=2) as bar:
        place = ""
        for shard in shards:
            if shard.place != place:
                place, number = shard.place, 0
                sources = kept_sources(shard.file) if shard.dataset is None else []
            bar.set_description(f"reading {shard.source}", refresh=False)  # a refresh would ignore `delay`
            for block, lines in line_batches(shard):
                bar.update(len(block))
                for line in lines:
                    source = sources[number] if number < len(sources) else shard.source
                    if line.strip():
                        yield place, Path(shard.file).parent, number, source, parse(line)
                    number += 1


# ---- the Hub


def _hub_rows(repo_id: str, streaming: bool, split: str, name: str | None) -> Iterator[dict]:
    rows = datasets.load_dataset(repo_id, name, split=split, streaming=streaming)
    if streaming:
        yield from rows if rows.features is None else map(_undecoded(rows.features).decode_example, rows.decode(False))
        return
    for table in rows.with_format("arrow").iter(batch_size=1000):
        yield from map(_undecoded(rows.features).decode_example, table.to_pylist())


def _undecoded(features: Features) -> Features:
    """Features that leave images undecoded, as {"bytes", "path"}; mixed columns, stored as JSON, are decoded."""

    def walk(feature: object) -> object:
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, List):
            return List(walk(feature.feature))
        return {name: walk(value) for name, value in feature.items()} if isinstance(feature, dict) else feature

    return Features(walk(features))
