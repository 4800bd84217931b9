"""
The Hugging Face Hub: which names are repository ids, and local copies of repositories.

    snapshot("OpenGVLab/VisualPRM400K-v1.1-Raw", "dataset", allow_patterns="annotations.zip")
    -> ~/.cache/huggingface/hub/datasets--OpenGVLab--VisualPRM400K-v1.1-Raw/snapshots/3f0c...

`huggingface_hub` is imported only when the Hub is asked, so that selecting from local files does without it.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .shards import SUFFIXES


logger = logging.getLogger(__name__)

TIME_LIMIT = 20.0  # seconds to wait for the Hub; `huggingface_hub` would wait for ever


def is_hub_id(name: object) -> bool:
    """
    Whether a name is a repository id, `org/name` by the rules of the Hub, and not a local file or folder.

    Examples:
    ```python
    >>> from trl_mprm.data.hub import is_hub_id
    >>> [is_hub_id(name) for name in ("Qwen/ProcessBench", "raw/AI2D.jsonl", "a/b/c", "./here", "org/name.git")]
    [True, False, False, False, False]

    ```
    """
    return (
        isinstance(name, str)
        and re.fullmatch(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", name, re.ASCII) is not None
        and "--" not in name
        and ".." not in name
        and not name.endswith((*SUFFIXES, ".json", ".zip", ".git"))
        and not os.path.exists(name)
    )


def public_name(path: str) -> str:
    """Return a Hub id unchanged, and a local path without its parent folders."""
    return path if is_hub_id(path) else Path(path).name


def snapshot(repo_id: str, kind: str, revision: str | None = None, **patterns: Any) -> Path:
    """
    Fetch a repository and return its local folder; when the Hub cannot be reached, return the copy that an earlier run
    fetched.

    Args:
        repo_id (`str`):
            Id of the repository, `org/name`.
        kind (`str`):
            `"dataset"` or `"model"`.
        revision (`str`, *optional*):
            A branch, a tag or a commit.
        patterns (`Any`):
            `allow_patterns` and `ignore_patterns`, which choose the files.

    Raises:
        `FileNotFoundError`: no such repository, no access, or no usable answer from the Hub; the message is one line.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    options = {"repo_type": kind, "revision": revision, **patterns}
    try:
        with clear_hub_errors(repo_id, kind):
            # `snapshot_download` asks the same without a time limit
            if not constants.HF_HUB_OFFLINE:
                HfApi().repo_info(repo_id, repo_type=kind, revision=revision or "main", timeout=TIME_LIMIT)
            return Path(snapshot_download(repo_id, etag_timeout=TIME_LIMIT, **options))
    except FileNotFoundError as error:
        try:
            folder = Path(snapshot_download(repo_id, local_files_only=True, **options))
        except (OSError, ValueError):
            raise error from None
        logger.warning("%s; using the copy that an earlier run fetched", error)
        return folder


@contextmanager
def clear_hub_errors(repo_id: str, kind: str) -> Iterator[None]:
    """Turn any error of a request to the Hub into a `FileNotFoundError` with a one-line message."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    # A malformed answer (a list for an object, a page for JSON) fails wherever `huggingface_hub` first reads it.
    except (HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise FileNotFoundError(f"{repo_id}: {_problem(error, repo_id, kind)}") from error


def _problem(error: Exception, repo_id: str, kind: str) -> str:
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = "no such folder here" if kind == "model" else "no such file or folder here"
    login = "" if get_token() else "; you are not logged in: hf auth login"
    if isinstance(error, HFValidationError):
        return "no such folder, and no Hub id (org/name)"
    if isinstance(error, GatedRepoError):
        page = f"{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        return f"access to this {kind} must be requested at https://huggingface.co/{page}{login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{here}, and no such {kind} on the Hub, or a private one{login}"
    if isinstance(error, RevisionNotFoundError):
        return f"the {kind} on the Hub has no such revision"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return f"{here}, and the Hub cannot be reached"
    if isinstance(error, EntryNotFoundError):
        return f"the {kind} on the Hub has no such file"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = login or "; your token may not" if status in (401, 403) else ": try again later"
        return f"the Hub answers {status} {error.response.reason_phrase}{advice}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
        return f"cannot be kept on this disk ({error}): set HF_HOME to a folder that can be written"
    if isinstance(error, HTTPError | OSError):  # no connection, a closed one, no answer in time, a download cut short
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{here}, and the Hub cannot be reached or breaks off ({reason:.160})"
    return f"the answer of the Hub cannot be read ({error!s:.80}): does the network want a login, or is it no Hub?"


@cache
def hub_annotations(repo_id: str) -> Path | None:
    """Fetch the `annotations.zip` of a dataset on the Hub; None if it has no such file."""
    file = snapshot(repo_id, "dataset", allow_patterns="annotations.zip") / "annotations.zip"
    return file if file.is_file() else None


def hub_snapshot(repo_id: str, file: str) -> Path:
    """Fetch `file` of a dataset, if it has one, and return the local folder, whose name is the commit."""
    return snapshot(repo_id, "dataset", allow_patterns=file)


def download_model(model_id: str, **kwargs: Any) -> Path:
    """Fetch a model from the Hub. Raises `FileNotFoundError`, with a one-line message, if there is none."""
    return snapshot(model_id, "model", **kwargs)
