"""
Write kept rows under their final names: JSONL, Parquet, a dataset on disk, a dataset on the Hub.

Each shard contributes a file of kept lines, a file of refused rows, and line numbers. The result for `--output kept/`:

    kept/AI2D.jsonl        the kept lines, byte by byte
    kept/refused.jsonl     {"file": "raw/AI2D.jsonl", "line": 6, "reason": "score_not_a_number"}
    kept/selection.json    the evidence, bound to the files of rows by a hash of each

Nothing appears under its name before it is complete, and the evidence appears last. For an output that is a file,
`a.jsonl`, the evidence is named after it: `a.selection.json`, `a.refused.jsonl`.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import xxhash

from ..data.evidence import content_hash, is_refused_file, read_report, refused_path, report_path
from ..data.formats import READ_KEYS, parse, to_row
from ..data.images import ImageFinder, find_images
from ..data.rows import is_unicode, own_text
from ..data.shards import Paths, Shard
from ..files import atomic_output, write_json
from .passes import KeptRows


if TYPE_CHECKING:  # importing `datasets` takes longer than a small selection, so only code that makes a data set does
    from datasets import Features


logger = logging.getLogger(__name__)

OTHER_FORMS = (".gz", ".zst", ".zip", ".json", ".csv", ".arrow")  # not accepted as names of a folder


class SelectionWriter:
    """
    Writes the kept rows of one selection.

    Args:
        output (`Path`):
            `*.jsonl`, `*.parquet`, or a folder: one JSONL file for each source, or with `save_to_disk` a dataset.
        shards (`list` of [`~trl_mprm.data.shards.Shard`]):
            Shards of the inputs.
        inputs (`str`, path, or `list` of paths):
            The inputs as the user gave them.
        save_to_disk (`bool`):
            Write a folder for `datasets.load_from_disk`.
        image_root (`str` or path, *optional*):
            Folder of the images. Defaults to the folder of each file.
        page (`str` or path, *optional*):
            Path of the page about the selection.
    """

    def __init__(
        self,
        output: Path,
        shards: list[Shard],
        inputs: Paths,
        save_to_disk: bool = False,
        image_root: str | os.PathLike | None = None,
        page: str | os.PathLike | None = None,
    ):
        self.output, self.shards, self.save_to_disk, self.image_root = output, shards, save_to_disk, image_root
        self.inputs = [str(item) for item in (inputs if isinstance(inputs, list) else [inputs])]
        self.page = None if page is None else Path(page)
        one = save_to_disk or output.suffix in {".jsonl", ".parquet"}
        self.folder = output.parent if one else output
        sources = dict.fromkeys(shard.source for shard in shards)
        self.targets = [output] if one else [output / f"{source}.jsonl" for source in sources]
        self.report, self.refused = report_path(output, save_to_disk), refused_path(output, save_to_disk)
        self._check()

    def _check(self) -> None:
        output = self.output
        if output.suffix in OTHER_FORMS and not output.is_dir():
            raise ValueError(
                f"{output}: expected *.jsonl, *.parquet or a folder, got a name ending in {output.suffix}"
            )
        if output.is_file() if self.save_to_disk or output not in self.targets else output.is_dir():
            raise ValueError(
                f"{output}: expected a folder, *.jsonl or *.parquet, and this is the other kind: rename it"
            )
        for parent in output.absolute().parents:
            if parent.is_file():
                raise ValueError(f"{output}: expected {parent} to be a folder, got a file: give another output")
        if self.save_to_disk and output.is_dir() and any(output.iterdir()):
            _check_replaceable(output)
        used = {Path(shard.file).resolve() for shard in self.shards}
        inside = {folder for file in used for folder in file.parents} if self.save_to_disk else set()
        for target in (*self.targets, self.report, self.refused):
            if target.resolve() in used | inside:
                raise ValueError(f"{target} is an input and would be overwritten: give another output")
            if target in self.targets and is_refused_file(target):
                raise ValueError(f"{target} is where refused rows go: give another output, or rename that input")
        if self.page is not None:
            taken = used | {target.resolve() for target in (*self.targets, self.report, self.refused)}
            if self.page.is_dir() or taken & {self.page.resolve(), *self.page.resolve().parents}:
                raise ValueError(
                    f"{self.page}: expected a place for the page, and there is an input, an output or a folder: give "
                    "another one, as page.html"
                )
        if self.folder.resolve() in [Path(item).resolve() for item in self.inputs] and not self.save_to_disk:
            raise ValueError(
                f"{output} lies in the input folder, where the next run would read it: give another output"
            )
        for item in self.inputs:
            if glob.has_magic(item) and not Path(item).exists() and any(_matches(item, file) for file in self.targets):
                raise ValueError(f"{output} matches {item}, and the next run would read it: give another output")
        others = {*self.folder.glob("*.jsonl"), *self.folder.glob("*.parquet")}
        others -= {*self.targets, self.refused}
        if output not in self.targets and others:
            raise ValueError(
                f"{self.folder} already holds {min(others).name}, which is not of this run: give an empty folder"
            )

    def write(self, report: dict, emitted: list[KeptRows], parts: Path, page: str | None = None) -> None:
        """Join the parts of the shards in order, and move every output to its final name."""
        with ExitStack() as stack:
            if page is not None:
                stack.enter_context(atomic_output(self.page)).write_text(page, "utf-8")  # appears at the end
            if self.save_to_disk:
                self._write_dataset(report, emitted, parts)
                return
            ready = parts / "ready"
            ready.mkdir()
            if self.output.suffix == ".parquet":
                report["revision"] = self._revision(parts)
                self._write_parquet(ready / self.output.name, self.rows(emitted, parts, report, resolve=False))
                report["output"] = hashes([ready / self.output.name])
            else:
                self._write_lines(ready, report, emitted, parts)
            self._write_evidence(ready / self.report.name, ready / self.refused.name, report, parts)
            # An interruption from here on leaves rows without a report, never an earlier run's report beside other rows
            for file in (self.report, self.refused):
                file.unlink(missing_ok=True)
            for file in sorted(ready.iterdir(), key=lambda file: file.name == self.report.name):
                file.rename(self.folder / file.name)

    def _write_lines(self, ready: Path, report: dict, emitted: list[KeptRows], parts: Path) -> None:
        """Write the kept lines of each source to its file, or all to one; `revision` is the hash of all, in order."""
        names = [self.output.name if self.output in self.targets else f"{s.source}.jsonl" for s in self.shards]
        digests = {name: xxhash.xxh3_128() for name in names}
        revision = xxhash.xxh3_128()
        for shard, name in zip(self.shards, names, strict=True):
            with open(ready / name, "ab") as out:
                for block in _blocks(parts / f"{shard.index}.kept"):
                    out.write(block)
                    digests[name].update(block)
                    revision.update(block)
        sources = _sources_of_lines(names, emitted)
        report["output"] = {
            name: {"xxh3_128": digest.hexdigest()} | ({"sources": sources[name]} if name in sources else {})
            for name, digest in digests.items()
        }
        report["revision"] = revision.hexdigest()

    def _write_evidence(self, target: Path, refused: Path, report: dict, parts: Path) -> None:
        if report["total"]["refused"]:
            with open(refused, "wb") as out:
                for shard in self.shards:
                    out.writelines(_blocks(parts / f"{shard.index}.refused"))
        write_json(report, target)

    def _revision(self, parts: Path) -> str:
        """XXH3-128 of the kept lines in order, whatever their files, which names a subset."""
        revision = xxhash.xxh3_128()
        for shard in self.shards:
            for block in _blocks(parts / f"{shard.index}.kept"):
                revision.update(block)
        return revision.hexdigest()

    def _write_dataset(self, report: dict, emitted: list[KeptRows], parts: Path) -> None:
        from datasets import Dataset, DatasetInfo, Features
        from datasets.table import MemoryMappedTable

        from ..data.rollouts import chunks

        rows, table = self.rows(emitted, parts, report, resolve=True), parts / "rows.arrow"
        schema = self.features(rows()).arrow_schema
        with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for chunk in chunks(rows(), 1000):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
        with open(table, "rb") as file:
            name = hashlib.file_digest(file, "blake2b").hexdigest()[:32]  # the same rows make the same dataset
        info = DatasetInfo(features=Features.from_arrow_schema(schema))
        kept = Dataset(MemoryMappedTable.from_file(str(table)), info=info, fingerprint=name)
        kept.save_to_disk(parts / "dataset")
        report["revision"] = self._revision(parts)
        report["output"] = hashes(sorted((parts / "dataset").glob("*.arrow")))
        self._write_evidence(
            parts / "dataset" / self.report.name, parts / "dataset" / self.refused.name, report, parts
        )
        if self.output.is_dir():
            self.output.rename(parts / "earlier")
        (parts / "dataset").rename(self.output)

    def _write_parquet(self, target: Path, rows: Callable[[], Iterator[dict]]) -> None:
        import pyarrow.parquet as pq

        from ..data.rollouts import chunks

        schema = self.features(rows()).arrow_schema
        with pq.ParquetWriter(target, schema) as writer:
            for chunk in chunks(rows(), 1000):
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))

    def rows(self, emitted: list[KeptRows], parts: Path, report: dict, resolve: bool) -> Callable[[], Iterator[dict]]:
        """Kept records in the row type; can be iterated repeatedly. `resolve` makes image paths real paths."""
        check = resolve and report["images"] == "checked"
        return partial(self._read_rows, emitted, parts, report["drop_answer_step"], check)

    def _read_rows(self, emitted: list[KeptRows], parts: Path, drop_answer_step: bool, check: bool) -> Iterator[dict]:
        finders: dict[object, ImageFinder] = {}
        for shard, given in zip(self.shards, emitted, strict=True):
            root = Path(shard.file).parent if self.image_root is None else self.image_root
            finder = finders.setdefault(root, ImageFinder(root, check))
            sources = (source for source, n_rows in given.runs for _ in range(n_rows))
            with open(parts / f"{shard.index}.kept", "rb") as lines:
                for line, number, source in zip(lines, given.lines.tolist(), sources, strict=True):
                    record = parse(line)
                    own = {
                        "source": source,
                        "rollout_id": own_text(record, "rollout_id") or f"{shard.source}:{number}",
                    }
                    row = to_row(record, drop_answer_step) | {"images": find_images(record, finder)} | own
                    yield row | {  # all other fields of a record, as text
                        self._text(key): self._text(value)
                        for key, value in record.items()
                        if value is not None and key not in READ_KEYS
                    }

    def _text(self, value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if is_unicode(text):
            return text
        self.escaped += 1
        return text.encode(errors="backslashreplace").decode()

    def features(self, rows: Iterator[dict]) -> "Features":
        from datasets import Features, Value

        from ..data.rollouts import FEATURES

        self.escaped = 0
        others = dict.fromkeys(key for row in rows for key in row if key not in FEATURES)
        if self.escaped:
            logger.warning("%s: %d texts hold half of a surrogate pair, written as \\ud...", self.output, self.escaped)
        return Features({**FEATURES, **{key: Value("string") for key in others}})


def _matches(pattern: str, path: Path) -> bool:
    """Whether a glob would match a path that need not exist."""

    def fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
        if not pattern or not names:
            return names == pattern
        if pattern[0] == "**":
            return fits(names, pattern[1:]) or fits(names[1:], pattern)
        return fnmatch(names[0], pattern[0]) and fits(names[1:], pattern[1:])

    return fits(*(Path(os.path.realpath(name)).parts for name in (path, pattern)))


def _check_replaceable(folder: Path) -> None:
    """Raise unless this program wrote a folder and nobody has changed it since, so that it may be replaced."""
    report = read_report(folder / "selection.json") if (folder / "selection.json").is_file() else None
    files = {} if report is None else report["output"]
    ours = {*files, "state.json", "dataset_info.json", "selection.json", "refused.jsonl"}
    foreign = sorted(path.name for path in folder.iterdir() if report is None or path.name not in ours)
    foreign += [
        name
        for name, facts in files.items()
        if (folder / name).is_file() and content_hash(folder / name)[0] != facts["xxh3_128"]
    ]
    if foreign:
        raise ValueError(
            f"{folder} is no dataset of an earlier run alone, and would be replaced: expected an empty folder, got "
            f"{foreign[0]} there, which is not ours: give another output"
        )


def _sources_of_lines(names: list[str], emitted: list[KeptRows]) -> dict[str, list]:
    """Files whose name does not tell the source of each line, with the sources of their lines in order."""
    runs: dict[str, list] = {}
    for name, shard in zip(names, emitted, strict=True):
        for source, n_rows in shard.runs:
            run = runs.setdefault(name, [])
            if run and run[-1][0] == source:
                run[-1][1] += n_rows
            else:
                run.append([source, n_rows])
    return {name: run for name, run in runs.items() if {source for source, _ in run} != {Path(name).stem}}


def hashes(files: Iterable[Path]) -> dict[str, dict]:
    return {file.name: {"xxh3_128": content_hash(file)[0]} for file in files}


def _blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as content:
        while block := content.read(2**20):
            yield block
