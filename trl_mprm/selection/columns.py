"""Read the fields that a rule needs beside the step scores, as one number per line of a shard."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from ..data.formats import READ_KEYS, parse
from ..data.shards import Shard, line_batches
from .rules import CutSpec


def read_values(shard: Shard, spec: CutSpec) -> np.ndarray:
    """
    Apply `spec.entry.value` to each line; NaN where there is no number, and for blank lines.

    The lines are read a second time because the first pass owes its speed to parsing only what every rule needs.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.data.shards import plan_shards
    >>> from trl_mprm.selection.columns import read_values
    >>> from trl_mprm.selection.rules import CutSpec
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "toy.jsonl"
    >>> _ = file.write_text('{"hops": 2}\\n\\n{"hops": "many"}\\n')
    >>> read_values(plan_shards(file)[0], CutSpec("column", fraction=0.5, column="hops")).tolist()
    [2.0, nan, nan]

    ```
    """
    names = spec.entry.reads(spec)
    decode = _decoder(names)
    values = [np.zeros(0)]
    for _, lines in line_batches(shard, {*READ_KEYS, *names}):
        rows = [_read(line, decode, names) for line in lines]
        values.append(spec.entry.value({name: [row[i] for row in rows] for i, name in enumerate(names)}, spec))
    return np.concatenate(values)


def _decoder(names: tuple[str, ...]) -> Callable[[bytes], tuple]:
    fields = [(f"field_{number}", Any, None) for number in range(len(names))]  # a name need not be a Python identifier
    rename = {field: name for (field, *_), name in zip(fields, names, strict=True)}
    decode = msgspec.json.Decoder(msgspec.defstruct("Fields", fields, rename=rename)).decode
    return lambda line: msgspec.structs.astuple(decode(line))


def _read(line: bytes, decode: Callable[[bytes], tuple], names: tuple[str, ...]) -> tuple:
    try:
        return decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        record = parse(line) or {}
        return tuple(record.get(name) for name in names)
