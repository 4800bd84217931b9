"""
Resolve the name of a folder, a file or a data set on the Hub to files.

A folder of sources is read whole. A folder with splits in its names is a copy of a data set, and is read as
`datasets.load_dataset` reads the original:

    raw/AI2D.jsonl  raw/GEOS.jsonl                               both, a source each
    d/train.jsonl  d/test.jsonl                                  d/train.jsonl
    d/data/train-00000-of-00002.parquet  ...  d/data/test-...    the parts of train, together one source, `d`
    d/train/a.jsonl  d/train/b.jsonl  d/test/a.jsonl             the files of train, together one source, `d`
"""

import re
from pathlib import Path, PurePosixPath

from .hub import hub_annotations, is_hub_id, snapshot
from .shards import SUFFIXES, Paths, SplitFiles, input_files


# The words and separators that `datasets` looks for in the names of files and folders (datasets.data_files).
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_SPLITS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)") for split, words in SPLIT_WORDS.items()
}

_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")  # as `push_to_hub` names the files of any split


def local_inputs(inputs: Paths, split: str = "train", name: str | None = None) -> Paths:
    """
    Return inputs as local paths; a data set becomes the files of one of its splits.

    Args:
        inputs (`str`, path, or `list` of paths):
            As in [`~trl_mprm.load_rollouts`].
        split (`str`, *optional*, defaults to `"train"`):
            Split of a data set on the Hub, or of a folder that is a copy of one.
        name (`str`, *optional*):
            Configuration of the data set.

    Raises:
        `ValueError`: no such split, or names that leave unclear which split they belong to; both list what was found.

    Examples:
    ```python
    >>> import pathlib, tempfile
    >>> from trl_mprm.data.splits import local_inputs
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for file in ("train.jsonl", "test.jsonl"):
    ...     (folder / file).touch()
    >>> [pathlib.Path(local_inputs(folder, split)).name for split in ("train", "test")]
    ['train.jsonl', 'test.jsonl']

    ```
    """
    if isinstance(inputs, list):
        return [item for each in inputs for item in _as_list(local_inputs(each, split, name))]
    if is_hub_id(inputs):
        archive = hub_annotations(inputs) if split == "train" and name is None else None
        return archive or _hub_files(inputs, split, name)
    if isinstance(inputs, SplitFiles) or not Path(inputs).is_dir():
        return inputs  # a file that is named is read, whatever it is called
    return _folder_files(Path(inputs), split, name)


def _as_list(item: Paths) -> list:
    return item if isinstance(item, list) else [item]


def split_of(path: str) -> str | None:
    """
    The split that a path within a data set names, in its folders or else in its file name; None if it names none.

    Examples:
    ```python
    >>> from trl_mprm.data.splits import split_of
    >>> [split_of(path) for path in ("train.jsonl", "dev/a.jsonl", "data/main-00000-of-00002.parquet", "AI2D.jsonl")]
    ['train', 'validation', 'main', None]

    ```
    """
    if shard := _SHARD.fullmatch(path):
        return shard[1]
    *folders, file = PurePosixPath(path).parts
    for names in (folders, [file]):
        found = [split for split, words in _SPLITS.items() if any(map(words.search, names))]
        if len(found) > 1:
            raise ValueError(
                f"{path} names the splits {' and '.join(found)}: rename it, or name the files that you mean"
            )
        if found:
            return found[0]
    return None


def _folder_files(folder: Path, split: str, name: str | None) -> Paths:
    if any((folder / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"{folder}: expected files of rollouts, and it is a folder of save_to_disk: write a file with .to_parquet, or "
            "select in Python, with select(load_rollouts(...))"
        )
    readme = folder / "README.md"
    if name is not None or (
        readme.is_file() and "data_files:" in readme.read_text(encoding="utf-8", errors="replace")
    ):
        return _one_source(str(folder), _split(str(folder), split, _splits_of_dataset(str(folder), name)))
    files = _data_files(folder)
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file.relative_to(folder).as_posix()), []).append(file)
    if set(splits) <= {None}:  # a folder of sources: of no split, so all of it is train
        if split == "train":
            return list(map(str, files)) or str(folder)
        raise ValueError(f"{folder}: no split {split!r}, and no names with a split in them: {_listed(splits)}")
    if None in splits:
        raise ValueError(
            f"{folder}: not clear what to read, because some names have a split in them and others do not: {_listed(splits)}. "
            "Name the files that you mean"
        )
    return _one_source(str(folder), _split(str(folder), split, splits))


def _data_files(folder: Path) -> list[Path]:
    """Files with rollouts directly in a folder or, if there are none, in the folders below."""
    try:
        return input_files(folder)
    except FileNotFoundError:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [file for path in below for file in _data_files(path)]


def _split(place: str, split: str, splits: dict[str | None, list]) -> list:
    if split not in splits:
        raise ValueError(f"{place}: no split {split!r}, found {_listed(splits) or 'no files'}")
    return splits[split]


def _listed(splits: dict[str | None, list]) -> str:
    def few(files: list) -> str:
        names = [PurePosixPath(str(file)).name for file in files[:3]]
        return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "")

    return "; ".join(f"{split or 'no split'} ({few(files)})" for split, files in splits.items())


def _one_source(dataset: str, files: list[Path]) -> Paths:
    """Join the files of a split into one source, unless there is only one."""
    return str(files[0]) if len(files) == 1 else SplitFiles(dataset, [Path(file) for file in files])


def _splits_of_dataset(path: str, name: str | None) -> dict[str | None, list]:
    from datasets import load_dataset_builder

    return {
        str(split): list(files) for split, files in (load_dataset_builder(path, name).config.data_files or {}).items()
    }


def _hub_files(repo_id: str, split: str, name: str | None) -> SplitFiles:
    """Fetch the files that `load_dataset` would read for a split, in its order."""
    files = _split(repo_id, split, _splits_of_dataset(repo_id, name))
    # Each file is hf://datasets/org/name@commit/path.
    commits, paths = zip(*(file.split("@", 1)[1].split("/", 1) for file in files), strict=True)
    odd = next((path for path in paths if not path.endswith(SUFFIXES)), None)
    if odd is not None:
        raise ValueError(
            f"{repo_id}: expected annotations.zip, or a split {split} of {', '.join(f'*{end}' for end in SUFFIXES)}, "
            f"got {odd}: read that dataset with load_rollouts, and select in Python"
        )
    folder = snapshot(repo_id, "dataset", revision=commits[0], allow_patterns=list(paths))
    return SplitFiles(repo_id, [Path(folder, path) for path in paths])
