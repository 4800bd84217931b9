"""
Read the bytes of a file that may be compressed: plain, `.gz`, `.zst`, or a member of a `.zip`.

A damaged file raises one clear error that names it. Nothing is unpacked to disk.
"""

import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa


@contextmanager
def open_packed(file: str, member: str | None = None) -> Iterator[BinaryIO]:
    """
    Open the unpacked bytes of a file, or of a member of a zip, as a file that can be read forwards.

    Raises `ValueError`, with a one-line message, if the file is damaged or cannot be unpacked.

    Examples:
    ```python
    >>> import gzip, pathlib, tempfile
    >>> from trl_mprm.data.containers import open_packed
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl.gz"
    >>> _ = path.write_bytes(gzip.compress(b"{}"))
    >>> with open_packed(str(path)) as file:
    ...     file.read()
    b'{}'

    ```
    """
    with damage_is_one_line(file if member is None else f"{file}/{member}"), ExitStack() as stack:
        if member is not None:
            unpacked = stack.enter_context(zipfile.ZipFile(file)).open(member)
        elif file.endswith(".gz"):
            unpacked = gzip.open(file)
        elif file.endswith(".zst"):
            unpacked = _Zstandard(pa.input_stream(file, compression="zstd"))
        else:
            unpacked = open(file, "rb", buffering=0)
        yield stack.enter_context(io.BufferedReader(unpacked, 2**13))


def members_of(archive: Path) -> list[str]:
    """Names of the files in a zip, sorted."""
    with damage_is_one_line(str(archive)), zipfile.ZipFile(archive) as members:
        return sorted(members.namelist())


class _Zstandard(io.RawIOBase):
    """Adapts a pyarrow stream for Python's readers, which seek forwards by reading."""

    def __init__(self, stream: pa.NativeFile):
        self.stream, self.offset = stream, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset + (self.offset if whence == os.SEEK_CUR else 0)
        while self.offset < target and (block := self.stream.read(min(2**18, target - self.offset))):
            self.offset += len(block)
        return self.offset

    def readinto(self, buffer: memoryview) -> int:
        try:
            block = self.stream.read(len(buffer))
        except OSError as error:  # the way pyarrow says that a stream is cut short
            raise EOFError(str(error)) from error
        buffer[: len(block)] = block
        self.offset += len(block)
        return len(block)


@contextmanager
def damage_is_one_line(name: str) -> Iterator[None]:
    """Turn the errors that readers raise on a damaged file into a `ValueError` that names it."""
    try:
        yield
    except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile, pa.ArrowException, UnicodeError) as error:
        raise ValueError(f"{name}: expected a whole file, and it is damaged ({error}): fetch it again") from error
    except RuntimeError as error:  # of zipfile: a password, or a packing that this Python does not know
        raise ValueError(
            f"{name}: expected a zip that this Python can open, got {error}: unpack it yourself"
        ) from error
