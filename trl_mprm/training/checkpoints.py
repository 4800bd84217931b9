"""
Find the checkpoint to resume from, and say what is wrong with the others.

    run/checkpoint-2/{adapter_model.safetensors, adapter_config.json, optimizer.pt, scheduler.pt, rng_state.pth,
                      trainer_state.json}      Trainer writes the weights first and trainer_state.json last, in place
"""

import json
import logging
import os
import pickle
import re
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from ..models.loading import check_safetensors


logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: str | os.PathLike) -> str:
    """Find the last checkpoint in `folder` whose files all load; a warning says what is wrong with any later one."""
    numbered = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in numbered.items() if match}
    for checkpoint in sorted(steps, key=steps.__getitem__, reverse=True):
        fault = checkpoint_fault(checkpoint)
        if fault is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} was not written to its end, or is damaged ({fault}): looking at the one before")
    raise ValueError(f"{folder} has no whole checkpoint to resume from: expected checkpoint-*/{TRAINER_STATE_NAME}")


def checkpoint_fault(checkpoint: str | os.PathLike) -> str | None:
    """Return the reason why training cannot resume from a checkpoint; None if all of its files load."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not isinstance(state.global_step, int) or not isinstance(state.log_history, list):
            return f"{TRAINER_STATE_NAME} is not the state of a training"
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, TypeError, AttributeError):
        return f"{TRAINER_STATE_NAME} is not the state of a training"
    # FSDP and DeepSpeed keep weights and optimizer in parts and formats of their own, and check them when they load.
    if any(path.name.startswith(("pytorch_model_fsdp", "global_step")) for path in checkpoint.iterdir()):
        return None
    names = {path.name for path in checkpoint.iterdir()}
    adapter = ADAPTER_CONFIG_NAME in names
    weights = ADAPTER_SAFE_WEIGHTS_NAME if adapter else "*.safetensors"
    if not list(checkpoint.glob(weights)):
        return f"{weights} is missing"
    random = sorted(name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name))
    for name in (ADAPTER_CONFIG_NAME if adapter else CONFIG_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *random[:1]):
        if name not in names:
            return f"{name} is missing"
    if not random:
        return "rng_state.pth is missing"
    try:
        check_safetensors(checkpoint)
        json.loads((checkpoint / (ADAPTER_CONFIG_NAME if adapter else CONFIG_NAME)).read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error)
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME, *random):
        try:
            with safe_globals():  # mapped, not read; a truncated file lacks the directory at its end
                torch.load(checkpoint / name, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            return f"{name} does not load: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def check_checkpoint(checkpoint: str | os.PathLike) -> None:
    """Raise `ValueError` unless training can resume from a checkpoint."""
    fault = checkpoint_fault(checkpoint)
    if fault is not None:
        raise ValueError(
            f"cannot resume from {checkpoint}: {fault}; resume_from_checkpoint=True takes the last whole checkpoint"
        )
