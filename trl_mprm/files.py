"""Write outputs that appear under their final name only when they are complete."""

import fcntl
import json
import os
import platform
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
    Yield a hidden folder `.{name}.{host}.*.part` in `folder` for an output in the making, deleted at the end.

    It is locked while this process lives; an unlocked one of this host was left by a killed run and is deleted here. Those
    of other hosts stay: on network file systems a folder's lock is seen by its own host alone.
    """
    name = f".{name}.{platform.node()}."
    with ExitStack() as stack:
        with _opened(folder) as whole:
            _lock(whole, fcntl.LOCK_EX)  # nobody else takes what is made here, and not locked yet, for left
            for left in folder.glob(f"{name}*.part"):
                with suppress(OSError), _opened(left) as handle:  # gone, or of another user
                    if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(left)
            made = stack.enter_context(tempfile.TemporaryDirectory(".part", name, folder))
            _lock(stack.enter_context(_opened(Path(made))), fcntl.LOCK_EX)
        yield Path(made)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        _lock(handle, fcntl.LOCK_UN)  # closing is not enough while a forked child has the handle too
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """False: another has the lock, or the file system has no locks, where nothing is deleted either."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True
