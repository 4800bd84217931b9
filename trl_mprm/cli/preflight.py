"""
Check the arguments of `trl-mprm train` before torch is imported, so that a typo is reported at once:

    trl-mprm train --learnin_rate 1e-5
    error: --learnin_rate: no such field, did you mean learning_rate?
    trl-mprm train --loss_type hrad
    error: loss_type is 'hrad', expected one of hard, soft, beta_binomial; did you mean hard?
"""

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from ..selection.bis import ALPHA
from ..selection.rules import CutSpec
from .fields import train_fields


# The module of a tracker, where it is not called as the tracker is.
MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "comet_ml": ("comet_ml",), "azure_ml": ("azureml",)}

# A message lists at most this many choices; `--help` lists all.
LISTED = 12


def check_train(argv: list[str]) -> dict[str, Any]:
    """
    Check the arguments of `trl-mprm train` as far as possible without torch.

    Returns:
        `dict`: the fields that are set, on the command line (as text) or in the YAML file.

    Raises:
        `ValueError`, `FileNotFoundError`, `ImportError`: the first mistake, in one line.
    """
    flags = _flags(argv)
    config = flags.pop("config", None)
    given = {**_recipe(config), **flags}
    for name, value in given.items():
        _check_choice(name, value)
    if not given.get("model_name_or_path"):
        raise ValueError("no model to train: set model_name_or_path to a Hub id or folder")
    if not given.get("rule") and "fraction" not in given:
        for name in ("alpha", "ties"):
            if name in given:
                raise ValueError(f"{name} belongs to a selection: set rule (as bis) or fraction with it")
    else:
        _check_selection(given)
    if str(given.get("load_in_4bit", False)).lower() in ("true", "1") and not importlib.util.find_spec("bitsandbytes"):
        raise ImportError('load_in_4bit needs bitsandbytes: pip install "trl-mprm[qlora]"')
    if "smoke" not in given:  # a smoke run has stand-ins for all of these
        _check_here(given)
    return given


def _check_here(given: dict[str, Any]) -> None:
    if not given.get("dataset_name"):
        raise ValueError("no rollouts to train on: set dataset_name to a folder, file or Hub id")
    for name in ("dataset_name", "eval_dataset_name", "model_name_or_path", "image_root"):
        _check_path(name, given.get(name))
    resume = given.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume not in ("true", "True") and not Path(resume).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no folder {resume}, expected one, or true for the last one")
    trackers = given.get("report_to")
    for tracker in [trackers] if isinstance(trackers, str) else trackers or []:
        _check_tracker(tracker)


def _check_choice(name: str, value: Any) -> None:
    """Raise `ValueError` for a value that is not one of the few that a field may have."""
    choices = train_fields()[name].choices if name in train_fields() else ()
    if not choices or value is None or value in choices:
        return
    listed = ", ".join(choices) if len(choices) <= LISTED else "those that `trl-mprm train --help` lists"
    near = difflib.get_close_matches(str(value), choices, n=1)
    raise ValueError(
        f"{name} is {value!r}, expected one of {listed}"
        + (f"; did you mean {near[0]}?" if near else "")
        + ('; YAML reads no as false: write "no" in quotes' if value is False else "")
    )


def _check_selection(given: dict[str, Any]) -> None:
    """Raise `ValueError` for a selection that cannot be made."""
    fraction, alpha = _number(given, "fraction", 0.1), _number(given, "alpha", ALPHA)
    CutSpec(given.get("rule") or "bis", fraction=fraction, alpha=alpha, ties=given.get("ties", "first"))


def _number(given: dict[str, Any], name: str, default: float) -> float:
    try:
        return default if given.get(name) is None else float(given[name])
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {given[name]!r}, expected a number") from None


def _flags(argv: list[str]) -> dict[str, Any]:
    """The fields on the command line. Their spelling is checked: `--a_b`, `--a-b`, `--no_a`, or a unique beginning."""
    known = train_fields()
    fields = known.keys() | {"config", "smoke", "help"}
    given: dict[str, Any] = {}
    unknown = []
    name = None
    for word in argv:
        if not word.startswith("--"):
            if name is not None:
                given[name] = word if given[name] is True else given[name]
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        name = name if name in fields else name.removeprefix("no_")
        if name not in fields and len(longer := [field for field in fields if field.startswith(name)]) == 1:
            (name,) = longer
        if name in fields or not known:
            given[name] = value if equals else True
        else:
            unknown.append(f"--{flag}")
            name = None
    if unknown:
        raise ValueError(_no_such_field("", unknown))
    return given


def _recipe(path: str | bool | None) -> dict[str, Any]:
    """Read the fields in a YAML file; a path of True is a flag without a value."""
    if path is None:
        return {}
    if isinstance(path, bool):
        raise ValueError("--config stands alone, expected the path of a YAML file after it")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: no such file, expected a YAML file of fields")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds {type(recipe).__name__}, expected a YAML mapping of fields to values")
    unknown = [str(key) for key in recipe if key not in train_fields().keys() | {"env"}]
    if unknown and train_fields():
        raise ValueError(_no_such_field(f"{path}: ", unknown))
    return recipe


def _no_such_field(where: str, unknown: list[str]) -> str:
    told = []
    for name in unknown:
        plain = name.lstrip("-").replace("-", "_")
        near = [
            match
            for word in (plain, plain.removeprefix("no_"))
            for match in difflib.get_close_matches(word, train_fields(), n=1)
        ]
        told.append(f"{name}: no such field" + (f", did you mean {near[0]}?" if near else ""))
    return where + "; ".join(told) + " (`trl-mprm train --help` lists all)" * (not told[-1].endswith("?"))


def _check_path(name: str, value: Any) -> None:
    """Raise `FileNotFoundError` for a missing path; a name that looks like a Hub id is left to the Hub."""
    if not isinstance(value, str) or os.path.exists(value):
        return
    looks_local = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1
    if name == "image_root" or looks_local or (name != "model_name_or_path" and "/" not in value):
        raise FileNotFoundError(f"{name}: no such file or folder: {value}")


def _check_tracker(name: str) -> None:
    modules = MODULES.get(name, (name,))
    if name not in ("none", "all") and not any(importlib.util.find_spec(module) for module in modules):
        raise ImportError(f"report_to: {name} is not installed: install it, or set report_to to none")
