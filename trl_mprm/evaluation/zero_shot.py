"""Load a base model that was never trained as a process reward model, to compare it with one that was."""

from pathlib import Path
from typing import Any

from ..data.hub import download_model
from ..models.anatomy import is_vision_language
from ..models.loading import add_marker, load_model, load_processing_class
from ..prompting.published import CHECKPOINTS
from ..prompting.step_format import StepFormat
from ..scoring import ProcessRewardModel


def is_base(model_id: str) -> bool:
    """Whether a folder or Hub id holds a model without a step format, so that it is no process reward model."""
    if model_id in CHECKPOINTS:
        return False
    folder = Path(model_id) if Path(model_id).is_dir() else download_model(model_id, allow_patterns=["*.json"])
    return (folder / "config.json").is_file() and not (folder / StepFormat.FILE_NAME).is_file()


def load_zero_shot(model_id: str, quantization_config: Any = None, **model_init_kwargs: Any) -> ProcessRewardModel:
    """
    Load a base model and add the marker, a token that it has never seen, in memory; this is the state of a trainer before
    its first step. Its scores compare P("Yes") with P("No") at the marker.
    """
    model = load_model(model_id, quantization_config, **model_init_kwargs)
    processing_class = load_processing_class(model_id, is_vision_language(model.config))
    add_marker(model, processing_class, StepFormat())
    return ProcessRewardModel(model, processing_class)
