"""The hidden folder in which an output is prepared before it appears under its name."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """
    A hidden folder for the parts, deleted at the end. It is locked while this process lives; an unlocked one was left by
    an interrupted run and is deleted here.
    """
    for left in folder.glob(".select.*.part"):
        with suppress(OSError), _locked(left):  # in use, or no locks on this file system: leave it
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".select.", suffix=".part", dir=folder) as name, ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(_locked(Path(name)))
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def room_left(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder}: expected room for the kept rows and for a copy of them, got {error.strerror!r}: free some and "
            "run again; no output was touched"
        ) from error
