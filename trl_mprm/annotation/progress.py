"""
Keep the draws that were paid for in a file that is only appended to.

    {"settings": {"policy": "http://127.0.0.1:8000/v1 qwen", "checker": "math", "seed": 0, ...}}
    {"rollout": "AI2D:3", "row": "8f3a...", "step": 2, "first": 0, "seed": 1163, "right": [1, 0, null], "finish":
     ["stop", "stop", "length"], "tokens": [41, 38, 2048], "prompt_tokens": 310, "cached_tokens": 268}

A line is written as soon as its reply has come. A process that is killed leaves at most half a line, which the next run
removes; that run takes all draws that were paid for from this file and requests none of them again.
"""

import fcntl
import json
from pathlib import Path
from typing import Any


class Progress:
    """
    The progress file of a run, locked for this process.

    Args:
        path (`Path`):
            The file; it is created if it does not exist.
        settings (`dict`):
            The settings that the draws depend on. A file with other settings is refused.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.file = path, open(path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise OSError(f"{path}: another run is writing this file: wait for it, or give another output") from error
        self.draws: dict[tuple[str, str, int], list[dict]] = {}
        self.solutions: dict[tuple[str, str], dict] = {}
        try:
            self._read(settings)
        except ValueError:
            self.file.close()
            raise

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _read(self, settings: dict[str, Any]) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self._write({"settings": settings})
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                if number == 0:
                    found = record["settings"]
                elif "solutions" in record:
                    self.solutions[record["rollout"], record["row"]] = record
                else:
                    self.draws.setdefault((record["rollout"], record["row"], record["step"]), []).append(record)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}:{number + 1}: no record of draws ({error!r}): move the file") from error
        if lines and found != settings:
            differs = [name for name in settings | found if settings.get(name) != found.get(name)]
            values = "; ".join(f"{name} {found.get(name)!r}, now {settings.get(name)!r}" for name in differs)
            raise ValueError(f"{self.path} holds draws of other settings ({values}): move it, or give another output")

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write((json.dumps(record) + "\n").encode())
        self.file.flush()

    def add_solutions(self, record: dict[str, Any]) -> None:
        """Keep the sampled solutions of a question."""
        self._write(record)
        self.solutions[record["rollout"], record["row"]] = record

    def add(self, record: dict[str, Any]) -> None:
        """Keep the draws of one reply."""
        self._write(record)
        self.draws.setdefault((record["rollout"], record["row"], record["step"]), []).append(record)

    def outcomes(self, rollout: str, row: str, step: int) -> list[bool | None]:
        """Return all draws of a step so far, in the order of their numbers."""
        records = sorted(self.draws.get((rollout, row, step), []), key=lambda record: record["first"])
        return [None if right is None else bool(right) for record in records for right in record["right"]]
