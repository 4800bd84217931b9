"""Write outputs that appear under their final name only when they are complete."""

import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_output(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path beside `path`; rename it to `path` when the block ends, or delete it if the block raises.

    Examples:
    ```python
    >>> import tempfile, pathlib
    >>> from trl_mprm.files import atomic_output
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic_output(folder / "a.txt") as part:
    ...     _ = part.write_text("whole")
    >>> [file.name for file in folder.iterdir()]
    ['a.txt']

    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the user's umask
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(value: object, path: str | os.PathLike) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN is refused, since JSON has none."""
    with atomic_output(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def work_folder(folder: Path, name: str) -> Iterator[Path]:
    """
    Yield a hidden folder `.{name}.*.part` in `folder` for an output in the making, deleted at the end.

    It is locked while this process lives; an unlocked one was left by a killed run and is deleted here.
    """
    for left in folder.glob(f".{name}.*.part"):
        with (
            suppress(OSError),
            _locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):  # in use, gone, or no locks here: leave it
            shutil.rmtree(left)
    with ExitStack() as stack:
        while True:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(".part", f".{name}.", folder)))
            with suppress(OSError):
                stack.enter_context(_locked(made, fcntl.LOCK_EX))
            if made.exists():  # else another process took it for a left one before it was locked
                break
        yield made


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
