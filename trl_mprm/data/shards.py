"""
Divide the files of a corpus into pieces that can be read independently.

A folder, a glob, an archive or files become shards in corpus order:

    raw/AI2D.jsonl (150 MB)        ->  Shard(0, "raw/AI2D.jsonl", None, 0, 16778020, "AI2D", ...), Shard(1, ...), ...
    raw/DVQA.jsonl.zst             ->  Shard(3, "raw/DVQA.jsonl.zst", None, 0, None, "DVQA", ...)
    annotations.zip, read in place ->  Shard(4, "annotations.zip", "annotations/GEOS.jsonl", 0, None, "GEOS", ...)

A shard of a JSONL file begins and ends at a line end, one of a Parquet file is some of its row groups. A
compressed file is one shard.
"""

import glob
import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .containers import members_of, open_packed
from .evidence import is_refused_file, reports_beside
from .formats import READ_KEYS


class SplitFiles(NamedTuple):
    """The files of one split of a data set, which are read as one file, as `load_dataset` reads them."""

    dataset: str  # its Hub id, or its folder
    files: list[Path]


Paths = str | os.PathLike | SplitFiles | list[str | os.PathLike | SplitFiles]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

BATCH_BYTES = 2**18  # read at once: they stay in the processor's cache while their lines are read

SHARD_BYTES = 2**24  # some hundred times the cost of handing a shard to a process, and small beside the memory

# A longer line is no rollout, also not one with its pictures inside: the file is a bomb, or of another kind.
LINE_BYTES = 2**28


class Shard(NamedTuple):
    """
    Lines that stand together: bytes `start` to `stop` of a file, or all of it (`stop` None). Of a Parquet file, these
    are bytes of its row groups, counted one group after the other.
    """

    index: int
    file: str
    member: str | None  # of a zip
    start: int
    stop: int | None
    source: str  # by name
    stamp: tuple[int, int]  # size and time of the last change when the shards were made
    plan: str  # shards of one call of `plan_shards` have it in common
    dataset: str | None = None  # the data set that these rows are a split of: its Hub id, or its folder

    @property
    def place(self) -> str:
        """The name of what is read as one file, in which lines are counted from the first."""
        return self.dataset or (self.file if self.member is None else f"{self.file}/{self.member}")


def plan_shards(inputs: Paths, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """
    Divide the files that `inputs` names into shards of about `shard_bytes`, in the order of the corpus.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.data.shards import plan_shards
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "AI2D.jsonl"
    >>> _ = file.write_bytes(b"{}\\n" * 10)
    >>> [(shard.start, shard.stop) for shard in plan_shards(file, shard_bytes=16)]
    [(0, 18), (18, 30)]

    ```
    """
    shards: list[Shard] = []
    places: dict[str, str] = {}
    seen: dict[str, Path] = {}
    plan = uuid.uuid4().hex
    for item in inputs if isinstance(inputs, list) else [inputs]:
        dataset = item.dataset if isinstance(item, SplitFiles) else None
        for file in item.files if isinstance(item, SplitFiles) else input_files(item):
            # In the cache of the Hub, files of the same content are links to one file
            real = str(file) if dataset else os.path.realpath(file)
            if real in seen:
                raise ValueError(
                    f"expected each file once, got {file} after {seen[real]}, which is the same file: its rows would "
                    "count twice, name it once"
                )
            seen[real] = file
            stamp = _stamp(file)
            for member in _members(file) if file.suffix == ".zip" else [None]:
                source = source_name(member or file) if dataset is None else os.path.basename(os.path.abspath(dataset))
                shard = Shard(0, str(file), member, 0, None, source, stamp, plan, dataset)
                if (other := places.setdefault(source, shard.place)) != shard.place:
                    raise ValueError(
                        f"{other} and {shard.place} have one name, and the name is the source: rename one of them"
                    )
                for start, stop in _ranges(shard, shard_bytes):
                    shards.append(shard._replace(index=len(shards), start=start, stop=stop))
    return shards


def _ranges(shard: Shard, shard_bytes: int) -> Iterator[tuple[int, int | None]]:
    file = Path(shard.file)
    if file.suffix == ".parquet":
        from .parquet import row_group_ranges

        yield from row_group_ranges(shard.file, shard_bytes)
    # A file of several sources is told apart line by line, from its first line on
    elif file.suffix != ".jsonl" or (shard.dataset is None and reports_beside(file)):
        yield 0, None
    else:
        yield from _line_ranges(file, shard.stamp[0], shard_bytes)


def _line_ranges(file: Path, size: int, shard_bytes: int) -> Iterator[tuple[int, int]]:
    with open(file, "rb") as lines:
        start = 0
        while start < size:
            lines.seek(min(start + shard_bytes, size) - 1)
            while (piece := lines.readline(BATCH_BYTES)) and not piece.endswith(b"\n"):
                pass  # a line may be longer than the memory: reading it will show
            stop = lines.tell()
            yield start, stop
            start = stop
        if size == 0:
            yield 0, 0


def input_files(name: str | os.PathLike) -> list[Path]:
    """Return the files that an input stands for: those of a folder or its `annotations.zip`, matches of a glob, one file."""
    path = Path(name)
    if path.is_dir():
        files = [entry for entry in sorted(path.iterdir()) if entry.name.endswith(SUFFIXES) and not _aside(entry)]
        archive = path / "annotations.zip"
        files = files or [archive] * archive.is_file()
    elif path.exists():
        files = [path]
    elif glob.has_magic(str(name)):
        files = [Path(match) for match in sorted(glob.glob(str(name), recursive=True)) if not _aside(Path(match))]
    else:
        raise FileNotFoundError(f"{name}: no such file or folder, and no dataset id (org/name) of the Hub")
    if not files:
        raise FileNotFoundError(f"{name}: expected *.jsonl files with rollouts, found none")
    for file in files:
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "a pipe or a device" if file.exists() else "a link to nothing"
            raise ValueError(
                f"{file}: expected a file with rollouts, and it is {kind}: name the files, or move it away"
            )
    return files


def _aside(path: PurePosixPath | Path) -> bool:
    """Whether a file holds no rollouts: refused rows of `trl-mprm select`, or a companion file of macOS in an archive."""
    return is_refused_file(path) or path.name.startswith("._") or "__MACOSX" in path.parts


def source_name(path: str | os.PathLike) -> str:
    """
    The name of a file without its format: the source of its rows.

    Examples:
    ```python
    >>> from trl_mprm.data.shards import source_name
    >>> source_name("raw/GeoQA+.v2.jsonl.gz"), source_name("annotations/AI2D.jsonl")
    ('GeoQA+.v2', 'AI2D')

    ```
    """
    path = PurePosixPath(str(path).replace("\\", "/"))
    return PurePosixPath(path.stem).stem if path.suffix in (".gz", ".zst") else path.stem


def _members(archive: Path) -> list[str]:
    names = [name for name in members_of(archive) if name.endswith(".jsonl") and not _aside(PurePosixPath(name))]
    if not names:
        raise FileNotFoundError(f"{archive}: expected *.jsonl members with rollouts, found none")
    return names


# ---- reading


def line_batches(shard: Shard, keys: Iterable[str] = READ_KEYS) -> Iterator[tuple[bytes, list[bytes]]]:
    """
    The bytes of a shard, a few lines at a time, and these lines with their ends. Parquet rows come as lines of JSON,
    with the fields of `keys` alone.
    """
    if shard.file.endswith(".parquet"):
        from .parquet import json_line, read_records

        for records in read_records(shard.file, shard.start, shard.stop, keys):
            lines = [json_line(shard.file, record) for record in records]
            yield b"".join(lines), lines
        check_unchanged(shard)
        return
    left, tail = (math.inf if shard.stop is None else shard.stop - shard.start), []
    with open_packed(shard.file, shard.member) as file:
        file.seek(shard.start)
        while left > 0 and (block := file.read(min(BATCH_BYTES, left))):
            if shard.start == 0 and left == (math.inf if shard.stop is None else shard.stop):
                _check_encoding(shard.place, block)
            left -= len(block)
            end = block.rfind(b"\n") + 1
            if not end:
                tail.append(block)
                if len(tail) * BATCH_BYTES > LINE_BYTES:
                    raise ValueError(
                        f"{shard.place}: expected one rollout per line, got a line of more than {LINE_BYTES:,} bytes: is "
                        "this file of another kind?"
                    )
                continue
            if tail or end < len(block):
                tail, block = [block[end:]], b"".join([*tail, memoryview(block)[:end]])
            yield block, io.BytesIO(block).readlines()
        if last := b"".join(tail):
            yield last, [last]
    check_unchanged(shard)


def _check_encoding(place: str, block: bytes) -> None:
    encoding = json.detect_encoding(block[:4])
    if not encoding.startswith("utf-8"):
        raise ValueError(
            f"{place}: expected JSON lines in UTF-8, got {encoding.upper()}: convert it, as by "
            f"iconv -f {encoding.upper()} -t UTF-8"
        )


def lines_at(shard: Shard, numbers: np.ndarray, length: np.ndarray) -> Iterator[tuple[bytes, bytes]]:
    """
    Some lines of a shard, each as `line_batches` gives it and whole (they differ for Parquet alone).

    Args:
        numbers (`np.ndarray`):
            Of the lines, ascending.
        length (`np.ndarray`):
            Of all lines of the shard.
    """
    if shard.file.endswith(".parquet"):
        from .parquet import json_line, read_records

        for records in read_records(shard.file, shard.start, shard.stop, numbers=numbers):
            for record in records:
                seen = {key: value for key, value in record.items() if key in READ_KEYS}
                yield json_line(shard.file, seen), json_line(shard.file, record)
        check_unchanged(shard)
        return
    ends, sizes = np.cumsum(length, dtype=np.int64)[numbers].tolist(), length[numbers].tolist()
    with open_packed(shard.file, shard.member) as file:
        if shard.stop is None:  # perhaps packed: read on to each line
            offset = 0
            for end, size in zip(ends, sizes, strict=True):
                file.seek(end - size - offset, os.SEEK_CUR)
                line = file.read(size)
                yield line, line
                offset = end
        else:
            for end, size in zip(ends, sizes, strict=True):
                line = os.pread(file.fileno(), size, shard.start + end - size)
                yield line, line
    check_unchanged(shard)


def check_unchanged(shard: Shard) -> None:
    if _stamp(shard.file) != shard.stamp:
        raise ValueError(f"{shard.file} changed while it was read: run again when nothing writes to it")


def _stamp(file: str | os.PathLike) -> tuple[int, int]:
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns
