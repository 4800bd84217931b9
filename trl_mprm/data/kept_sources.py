"""The sources of a file in which `trl-mprm select` put several together."""

import json
from pathlib import Path

from .shards import Shard


def kept_sources(shard: Shard) -> list[str]:
    """Source of each line of a file in which `trl-mprm select` put several sources together, else nothing."""
    file = Path(shard.file)
    report = file.parent / "selection.json"
    if file.suffix != ".jsonl" or shard.repo_id is not None or not report.is_file():
        return []
    try:
        runs = json.loads(report.read_bytes()).get("output", {}).get(file.name, [])
        return [source for source, rows in runs for _ in range(rows)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{report}: expected the report of trl-mprm select, got {error}: delete it") from error


def check_kept_sources(file: str, n_lines: int, sources: list[str]) -> None:
    if len(sources) != n_lines:
        raise ValueError(
            f"{file} has {n_lines} lines, but selection.json beside it tells the sources of "
            f"{len(sources)}: select again, or delete selection.json"
        )
