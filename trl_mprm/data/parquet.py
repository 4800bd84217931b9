"""
Convert rows of Parquet files to lines of JSON, so that code that reads lines can read them too.

Imported only when there is a Parquet file, because reading JSONL does without pyarrow's reader.
"""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .containers import damage_is_one_line


# Bytes of rows that become Python objects at once: rows with their pictures are large, others are read by the thousand.
BATCH_BYTES, BATCH_ROWS = 2**24, 1000

IMAGE_FIELDS = ("images", "image", "image_url")


def row_group_ranges(file: str, shard_bytes: int) -> Iterator[tuple[int, int]]:
    """The file in pieces of about `shard_bytes` that end at the ends of row groups, as bytes of its row groups."""
    with _open(file) as parquet:
        ends = _row_group_ends(parquet)
    start = 0
    for end, after in zip(ends, [*ends[1:], math.inf], strict=True):
        if after - start > shard_bytes:
            yield start, end
            start = end
    if not ends:
        yield 0, 0


def read_records(
    file: str, start: int, stop: int, keys: Iterable[str] | None = None, numbers: np.ndarray | None = None
) -> Iterator[list[dict]]:
    """Rows of the row groups from `start` to `stop`: all or those of `numbers`, with all columns or those of `keys`."""
    with _open(file) as parquet:
        ends = _row_group_ends(parquet)
        groups = [number for number, end in enumerate(ends) if start < end <= stop]
        columns = None if keys is None else [name for name in parquet.schema_arrow.names if name in keys]
        bytes_of_rows = sum(parquet.metadata.row_group(number).total_byte_size for number in groups)
        n_rows = sum(parquet.metadata.row_group(number).num_rows for number in groups)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * n_rows // max(bytes_of_rows, 1)))
        first = 0
        for batch in parquet.iter_batches(size, groups, columns):
            after = first + len(batch)
            if numbers is not None:
                low, high = np.searchsorted(numbers, [first, after])
                batch = batch.take(pa.array(numbers[low:high] - first))
            first = after
            yield batch.to_pylist()


def json_line(file: str, record: dict) -> bytes:
    """
    Convert a row to a line of JSON without its null fields; bytes become base64, pictures `{"bytes": ...}`.

    Examples:
    ```python
    >>> from trl_mprm.data.parquet import json_line
    >>> json_line("a.parquet", {"images": [b"GIF"], "prompt": "?", "source": None})
    b'{"images": [{"bytes": "R0lG"}], "prompt": "?"}\\n'

    ```
    """
    record = {key: value for key, value in record.items() if value is not None}
    for name in IMAGE_FIELDS:
        if isinstance(value := record.get(name), list):
            record[name] = [{"bytes": image} if isinstance(image, bytes) else image for image in value]
        elif isinstance(value, bytes):
            record[name] = {"bytes": value}
    try:
        return json.dumps(record, ensure_ascii=False, default=_as_text).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected rows that JSON can hold, got {error}: convert that column") from error


def _as_text(value: object) -> str:
    """Encode values that JSON lacks: bytes in base64, as [`~trl_mprm.data.images.ImageFinder`] reads them; times; decimals."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _row_group_ends(parquet: pq.ParquetFile) -> list[int]:
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
    sizes = (sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups)
    return list(accumulate(sizes))


@contextmanager
def _open(file: str) -> Iterator[pq.ParquetFile]:
    with damage_is_one_line(file):
        try:
            with pq.ParquetFile(file) as parquet:
                yield parquet
        except OSError as error:
            if error.errno is not None:
                raise
            raise EOFError(str(error)) from error  # the way pyarrow says that a page is broken
