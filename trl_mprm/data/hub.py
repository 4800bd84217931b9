"""
Data sets and models on the Hub: what is an id, and its files on this disk.

`datasets` and `huggingface_hub` are imported when the Hub is asked: a selection from local files does without them.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from .shards import SUFFIXES, HubRows, Paths


def local_inputs(inputs: Paths) -> Paths:
    """Inputs on this disk: of a dataset on the Hub its `annotations.zip`, else the files of its split `train`."""
    if isinstance(inputs, list):
        return [local_inputs(item) for item in inputs]
    if not is_hub_id(inputs):
        return inputs
    return hub_annotations(inputs) or _hub_files(inputs)


# ---- the Hub


def is_hub_id(path: Paths) -> bool:
    return (
        isinstance(path, str)
        and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None
        and not path.endswith((*SUFFIXES, ".zip"))
        and not os.path.exists(path)
    )


def public_name(path: str) -> str:
    """A Hub id as it is; of a local folder its name alone."""
    return path if is_hub_id(path) else Path(path).name


@cache
def hub_annotations(repo_id: str) -> Path | None:
    """The `annotations.zip` of a dataset on the Hub, None if it has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo_id, "annotations.zip", repo_type="dataset"))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: no such folder here, and no such dataset on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id}: no such file or folder here, and the Hub cannot be reached") from error
    except EntryNotFoundError:
        return None


def hub_snapshot(repo_id: str, file: str) -> Path:
    """The local folder of a dataset on the Hub, with `file` in it if there is one; its name is the commit."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=file))


def _hub_files(repo_id: str) -> HubRows:
    """What `load_dataset` would read of the split `train`, in its order, as files on this disk."""
    from datasets import load_dataset_builder
    from huggingface_hub import snapshot_download

    files = (load_dataset_builder(repo_id).config.data_files or {}).get("train", [])
    # hf://datasets/org/name@commit/path
    commits, paths = zip(*(file.split("@", 1)[1].split("/", 1) for file in files), strict=True) if files else ((), ())
    odd = next((path for path in paths if not path.endswith(SUFFIXES)), None if paths else "no such files")
    if odd is not None:
        raise ValueError(
            f"{repo_id}: expected annotations.zip, or a split train of {', '.join(f'*{end}' for end in SUFFIXES)}, got "
            f"{odd}: read that dataset with load_rollouts, and select in Python"
        )
    folder = snapshot_download(repo_id, repo_type="dataset", revision=commits[0], allow_patterns=list(paths))
    return HubRows(repo_id, [Path(folder, path) for path in paths])


def download_model(model_id: str, **kwargs: Any) -> Path:
    """A snapshot of a model on the Hub. Raises `FileNotFoundError`, in one line, where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model_id, **kwargs))
    except HFValidationError as error:
        raise FileNotFoundError(f"{model_id}: no such folder, and no Hub id (org/name)") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{model_id}: no such folder here, and no such model on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{model_id}: no such folder here, and the Hub cannot be reached") from error
