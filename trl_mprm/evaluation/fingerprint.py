"""Hash everything that determines the scores of a benchmark, so that a run resumes only scores with the same hash."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..scoring import ProcessRewardModel
from ..step_scorer import StepScorer
from .readers import image_digest


CHUNK = 1 << 26  # bytes of a tensor that are on the CPU at once


def fingerprint(model: Any, items: Sequence[dict[str, Any]], batch_size: int) -> str:
    """
    Hash every weight to its last byte, the configurations of model and adapter, tokenizer, chat template and image
    processor, the step format, the items with their pictures, and the batch size.

    The weights of a model behind a server cannot be seen, so its scores of one small solution stand for them. For any
    other object only the type is known.
    """
    digest = xxhash.xxh3_128(f"{type(model).__qualname__} {batch_size}".encode())
    if isinstance(model, ProcessRewardModel):
        digest.update(repr(model.step_format).encode())
        for text in _settings(model):
            digest.update(text.encode())
        for name, weight in model.model.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:
                flat = weight.detach().flatten().view(torch.uint8)
                for start in range(0, len(flat), CHUNK):
                    digest.update(flat[start : start + CHUNK].cpu().numpy().data)
    elif isinstance(model, StepScorer):
        scores = model.score([], "What is 1 + 1?", ["1 + 1 is 2.", "So 3."])
        digest.update(f"{model.name} {[round(score, 3) for score in scores]}".encode())
    for item in items:
        facts = [item[key] for key in ("id", "group", "prompt", "completions", "labels")]
        digest.update(json.dumps([*facts, *map(image_digest, item["images"])]).encode())
    return digest.hexdigest()[:16]


def _settings(model: ProcessRewardModel) -> list[str]:
    """Hash what affects scores besides tensors: configurations, and every file that the processing class saves."""
    adapters = getattr(model.model, "peft_config", {})  # a model without an adapter lacks the attribute
    configs = [model.model.config.to_dict(), *(adapters[name].to_dict() for name in sorted(adapters))]
    texts = [json.dumps(_without_paths(config), sort_keys=True, default=str) for config in configs]
    with tempfile.TemporaryDirectory() as folder:
        model.processing_class.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return texts + [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files]


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the path, since a model that was moved is the same model."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("_name_or_path", "name_or_path", "base_model_name_or_path")
    }
