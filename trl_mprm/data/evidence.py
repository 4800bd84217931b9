"""
The evidence of a selection, named after its rows and bound to them by a hash of their content.

    rows                                report                      refused rows
    kept/AI2D.jsonl, kept/GEOS.jsonl    kept/selection.json         kept/refused.jsonl
    a.jsonl                             a.selection.json            a.refused.jsonl
    a.parquet                           a.parquet.selection.json    a.parquet.refused.jsonl

For each file of rows the report gives its hash, and the sources of its lines if the file name does not give them:

    "output": {"a.jsonl": {"xxh3_128": "4f1a...", "sources": [["AI2D", 40], ["GEOS", 3]]}}
"""

import json
import logging
import os
from pathlib import Path, PurePath
from typing import Annotated

import msgspec
import xxhash


logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 2**27  # room for 2 million changes of source from line to line; a larger file is not read


class _File(msgspec.Struct):
    xxh3_128: str
    sources: list[tuple[str, Annotated[int, msgspec.Meta(ge=1)]]] = []


class _Facts(msgspec.Struct):
    read: int
    refused: dict[str, int]
    valid: int
    kept: int
    cut_score: float | None


class _Report(msgspec.Struct):
    """The keys that readers of a report rely on; a foreign file of that name fails here with a one-line error."""

    rule: str
    by: str
    fraction: float
    alpha: float | None
    ties: str
    seed: int
    revision: str
    output: dict[str, _File]
    sources: dict[str, _Facts]
    total: _Facts


def report_path(output: str | os.PathLike, to_disk: bool = False) -> Path:
    """Path of the report of an output: inside a folder, or beside a file and named after it."""
    return _beside(Path(output), "selection.json", to_disk)


def refused_path(output: str | os.PathLike, to_disk: bool = False) -> Path:
    """Path of the file that lists the refused rows of an output."""
    return _beside(Path(output), "refused.jsonl", to_disk)


def _beside(output: Path, name: str, to_disk: bool) -> Path:
    if to_disk or output.suffix not in (".jsonl", ".parquet"):
        return output / name
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.{name}")


def is_refused_file(path: PurePath) -> bool:
    return path.name == "refused.jsonl" or path.name.endswith(".refused.jsonl")


def reports_beside(file: Path) -> list[Path]:
    """The reports that may cover a file: its own, and that of its folder."""
    return [path for path in (report_path(file), file.parent / "selection.json") if path.is_file()]


def read_report(path: Path) -> dict | None:
    """Read and check a report; None, with a warning, for one that an older version wrote without hashes."""
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        report = json.loads(path.read_bytes())
        if isinstance(report, dict) and report.get("version") in ("1", "2"):
            logger.warning("%s is from an older version, which has no hashes of the rows: ignored", path)
            return None
        msgspec.convert(report, _Report)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(
            f"{path}: expected the report of trl-mprm select, got {error}: delete it, or select again"
        ) from error
    return report


def content_hash(file: str | os.PathLike) -> tuple[str, int]:
    """Return the XXH3-128 hash of a file and its number of line ends."""
    digest, n_lines = xxhash.xxh3_128(), 0
    with open(file, "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
            n_lines += block.count(b"\n")
    return digest.hexdigest(), n_lines


def kept_sources(file: str | os.PathLike) -> list[str]:
    """Source of each line of a JSONL file to which `trl-mprm select` wrote several sources, else an empty list."""
    file = Path(file)
    for path in reports_beside(file) if file.suffix == ".jsonl" else []:
        report = read_report(path)
        told = None if report is None else report["output"].get(file.name)
        if told is None:
            continue
        runs = told.get("sources", [])
        if not runs:
            return []
        found, n_lines = content_hash(file)
        if found != told["xxh3_128"] or n_lines != sum(n_rows for _, n_rows in runs):
            raise ValueError(
                f"{file} changed after {path.name} was written, which has the sources of its lines: select again, or "
                f"delete {path.name}"
            )
        return [source for source, n_rows in runs for _ in range(n_rows)]
    return []
