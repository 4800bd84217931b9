"""What reaches into Trainer."""

import json
import logging
import os
from pathlib import Path

from transformers import (
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..models.anatomy import base_of


logger = logging.getLogger(__name__)


class DecoderInputGradients(TrainerCallback):
    """Under activation checkpointing Trainer lets gradients into every part's input; a frozen encoder needs none."""

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        base = base_of(model)
        base.disable_input_require_grads()
        base.get_decoder().enable_input_require_grads()


def last_whole_checkpoint(folder: str | os.PathLike) -> str:
    """
    The last checkpoint in `folder` that was written to its end.

    Trainer writes a checkpoint in place and `trainer_state.json` last: where a run was killed, it is missing or cut.
    """
    for checkpoint in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            logger.warning(f"{checkpoint} was not written to its end: looking at the one before")
        else:
            return str(checkpoint)
    raise ValueError(f"{folder} has no whole checkpoint to resume from: expected checkpoint-*/{TRAINER_STATE_NAME}")
