"""
The files of a corpus, in pieces that can be read one without the other.

In, what a user names: a folder, a glob, an archive, files. Out, shards in corpus order:

    raw/AI2D.jsonl (150 MB)        ->  Shard(0, "raw/AI2D.jsonl", None, 0, 16778020, "AI2D", ...), Shard(1, ...), ...
    raw/DVQA.jsonl.zst             ->  Shard(3, "raw/DVQA.jsonl.zst", None, 0, None, "DVQA", ...)
    annotations.zip, read in place ->  Shard(4, "annotations.zip", "annotations/GEOS.jsonl", 0, None, "GEOS", ...)

A shard of a JSONL file begins and ends at a line end. What is compressed, or Parquet, is one shard a file.
"""

import glob
import gzip
import io
import json
import math
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


Paths = str | os.PathLike | list[str | os.PathLike]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BATCH = 2**18  # bytes read at once
SHARD_BYTES = 2**24


class Shard(NamedTuple):
    """Lines that stand together: bytes `start` to `stop` of a file, or all of it (`stop` None)."""

    index: int
    file: str
    member: str | None  # of a zip
    start: int
    stop: int | None
    source: str  # by name
    stamp: tuple[int, int]  # size and time of the last change when the shards were made
    plan: str  # shards of one call of `plan_shards` have it in common

    @property
    def place(self) -> str:
        return self.file if self.member is None else f"{self.file}/{self.member}"


def plan_shards(inputs: Paths, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """
    Divide the files that `inputs` names into shards of about `shard_bytes`, in the order of the corpus.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.shards import plan_shards
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "AI2D.jsonl"
    >>> _ = file.write_bytes(b"{}\\n" * 10)
    >>> [(shard.start, shard.stop) for shard in plan_shards(file, shard_bytes=16)]
    [(0, 18), (18, 30)]

    ```
    """
    shards: list[Shard] = []
    places: dict[str, str] = {}
    plan = uuid.uuid4().hex
    for file in input_files(inputs):
        stamp = _stamp(file)
        for member in _members(file) if file.suffix == ".zip" else [None]:
            source = source_name(member or file)
            place = str(file) if member is None else f"{file}/{member}"
            if (other := places.setdefault(source, place)) != place:
                raise ValueError(f"{other} and {place} have one name, and the name is the source: rename one of them")
            # A file of several sources is told apart line by line, from its first line on
            whole = file.suffix != ".jsonl" or (file.parent / "selection.json").is_file()
            for start, stop in [(0, None)] if whole else _ranges(file, stamp[0], shard_bytes):
                shards.append(Shard(len(shards), str(file), member, start, stop, source, stamp, plan))
    return shards


def _ranges(file: Path, size: int, shard_bytes: int) -> Iterator[tuple[int, int]]:
    with open(file, "rb") as lines:
        start = 0
        while start < size:
            lines.seek(min(start + shard_bytes, size) - 1)
            lines.readline()
            stop = lines.tell()
            yield start, stop
            start = stop
        if size == 0:
            yield 0, 0


def input_files(inputs: Paths) -> list[Path]:
    """The files that `inputs` names: those of a folder by name, the matches of a glob, an archive, one file."""
    if isinstance(inputs, list):
        files = [file for item in inputs for file in input_files(item)]
    elif Path(inputs).is_dir():
        # refused.jsonl is what `trl-mprm select` could not use
        names = sorted(entry for entry in Path(inputs).iterdir() if entry.name.endswith(SUFFIXES))
        files = [entry for entry in names if entry.name != "refused.jsonl"]
    elif Path(inputs).is_file():
        files = [Path(inputs)]
    elif glob.has_magic(str(inputs)):
        files = [Path(name) for name in sorted(glob.glob(str(inputs), recursive=True))]
    else:
        raise FileNotFoundError(f"{inputs}: no such file or folder, and no dataset id (org/name) of the Hub")
    if not files:
        raise FileNotFoundError(f"{inputs}: expected *.jsonl files with rollouts, found none")
    return files


def source_name(path: str | os.PathLike) -> str:
    """
    The name of a file without its format: the source of its rows.

    Examples:
    ```python
    >>> from trl_mprm.shards import source_name
    >>> source_name("raw/GeoQA+.v2.jsonl.gz"), source_name("annotations/AI2D.jsonl")
    ('GeoQA+.v2', 'AI2D')

    ```
    """
    path = PurePosixPath(str(path).replace("\\", "/"))
    return PurePosixPath(path.stem).stem if path.suffix in (".gz", ".zst") else path.stem


def _members(archive: Path) -> list[str]:
    with _clear_errors(str(archive)), zipfile.ZipFile(archive) as members:
        names = sorted(name for name in members.namelist() if name.endswith(".jsonl"))
    if not names:
        raise FileNotFoundError(f"{archive}: expected *.jsonl members with rollouts, found none")
    return names


# ---- reading


def line_batches(shard: Shard) -> Iterator[tuple[bytes, list[bytes]]]:
    """The bytes of a shard, a few lines at a time, and these lines with their ends; Parquet rows as lines of JSON."""
    if shard.file.endswith(".parquet"):
        yield from ((b"".join(lines), lines) for lines in _parquet_batches(shard))
        return
    left, tail = (math.inf if shard.stop is None else shard.stop - shard.start), []
    with open_shard(shard) as file:
        while left > 0 and (block := file.read(min(BATCH, left))):
            left -= len(block)
            end = block.rfind(b"\n") + 1
            if not end:
                tail.append(block)
                continue
            if tail or end < len(block):
                tail, block = [block[end:]], b"".join([*tail, block[:end]])
            yield block, io.BytesIO(block).readlines()
        if last := b"".join(tail):
            yield last, [last]
    check_unchanged(shard)


def lines_at(shard: Shard, numbers: np.ndarray, length: np.ndarray) -> Iterator[bytes]:
    """Some lines of a shard, as they are: their `numbers`, ascending, and the `length` of all its lines."""
    if shard.file.endswith(".parquet"):
        wanted = set(numbers.tolist())
        lines = (line for batch in _parquet_batches(shard) for line in batch)
        yield from (line for number, line in enumerate(lines) if number in wanted)
        return
    ends = np.cumsum(length, dtype=np.int64)
    with open_shard(shard) as file:
        place = 0
        for end, size in zip(ends[numbers].tolist(), length[numbers].tolist(), strict=True):
            file.seek(end - size - place, os.SEEK_CUR)  # reads on where the file is packed
            yield file.read(size)
            place = end
    check_unchanged(shard)


def check_unchanged(shard: Shard) -> None:
    if _stamp(shard.file) != shard.stamp:
        raise ValueError(f"{shard.file} changed while it was read: run again when nothing writes to it")


def _stamp(file: str | os.PathLike) -> tuple[int, int]:
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns


@contextmanager
def open_shard(shard: Shard) -> Iterator[BinaryIO]:
    """The bytes of a shard as a file, unpacked; a damaged archive is one clear error."""
    with _clear_errors(shard.place), ExitStack() as stack:
        if shard.member is not None:
            file = stack.enter_context(zipfile.ZipFile(shard.file)).open(shard.member)
        elif shard.file.endswith(".gz"):
            file = gzip.open(shard.file)
        elif shard.file.endswith(".zst"):
            file = _Zstandard(pa.input_stream(shard.file, compression="zstd"))
        else:
            file = open(shard.file, "rb", buffering=0)
        file = stack.enter_context(io.BufferedReader(file, 2**13))
        if shard.start:
            file.seek(shard.start)
        yield file


class _Zstandard(io.RawIOBase):
    """A stream of pyarrow as Python's own readers want it: it can go forward, by reading."""

    def __init__(self, stream: pa.NativeFile):
        self.stream, self.place = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + (self.place if whence == os.SEEK_CUR else 0)
        while self.place < target and (block := self.stream.read(min(BATCH, target - self.place))):
            self.place += len(block)
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        try:
            block = self.stream.read(len(buffer))
        except OSError as error:  # the way pyarrow says that a stream is cut short
            raise EOFError(str(error)) from error
        buffer[: len(block)] = block
        self.place += len(block)
        return len(block)


@contextmanager
def _clear_errors(place: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile, pa.ArrowException) as error:
        raise ValueError(f"{place}: expected a whole archive, and it is damaged ({error}): fetch it again") from error
    except RuntimeError as error:  # of zipfile: a password, or a packing that this Python does not know
        raise ValueError(
            f"{place}: expected a zip that this Python can open, got {error}: unpack it yourself"
        ) from error


def _parquet_batches(shard: Shard) -> Iterator[list[bytes]]:
    for batch in pq.ParquetFile(shard.file).iter_batches(batch_size=1000):
        lines = []
        for record in batch.to_pylist():
            record = {key: value for key, value in record.items() if value is not None}
            try:
                lines.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            except (TypeError, UnicodeEncodeError) as error:
                raise ValueError(f"{shard.file}: expected rows of text and numbers, but {error}") from error
        yield lines
    check_unchanged(shard)
