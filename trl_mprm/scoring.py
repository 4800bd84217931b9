"""A trained process reward model scores steps and picks the best of N."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, PreTrainedModel

from .modeling import add_marker, is_vision_language, load_model, load_processing_class, step_logits
from .rendering import ProcessingClass, StepFormat, render_batch, tokenizer_of


AGGREGATES = {
    "mean": lambda scores: sum(scores) / len(scores),
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


@dataclass(frozen=True)
class Candidate:
    """One candidate of a ranking: its place in the input, its aggregated score, and P(step good) of its steps."""

    index: int
    score: float
    step_scores: list[float]


class ProcessRewardModel:
    """
    A process reward model that is ready to score.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model trained by [`ProcessRewardTrainer`].
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor or tokenizer, which knows the marker.
        step_format ([`StepFormat`], *optional*):
            Marker, reward tokens and joiner the model was trained with.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: ProcessingClass,
        step_format: StepFormat | None = None,
    ):
        self.model = model.eval()
        self.processing_class = processing_class
        self.step_format = step_format or StepFormat()
        self.step_ids = self.step_format.ids(tokenizer_of(processing_class))

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        base_model: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        revision: str | None = None,
        **model_init_kwargs: Any,
    ) -> "ProcessRewardModel":
        """
        Load a full checkpoint or a LoRA adapter saved by [`ProcessRewardTrainer`].

        Args:
            model_id (`str`):
                Hub id or local folder.
            base_model (`str`, *optional*):
                Base of an adapter, where it has moved since the training. Defaults to the one the adapter names.
            quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
                Load the text decoder in 4 bit, as a QLoRA adapter was trained.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            model_init_kwargs:
                Passed to `from_pretrained`, as `dtype` or `device_map`.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            try:
                ignore = ["*.bin", "*.pt", "*.pth", "checkpoint-*/*"]  # pickles are never loaded
                folder = Path(snapshot_download(str(model_id), revision=revision, ignore_patterns=ignore))
            except HFValidationError as error:
                raise FileNotFoundError(f"{model_id}: no such folder, and no Hub id (org/name)") from error
        step_format = StepFormat.load(folder)
        is_adapter = (folder / "adapter_config.json").is_file()
        if is_adapter:
            peft_config = PeftConfig.from_pretrained(folder)
            if base_model is None:
                base_model, base_revision = peft_config.base_model_name_or_path, peft_config.revision
                model_init_kwargs = {**({"revision": base_revision} if base_revision else {}), **model_init_kwargs}
        model = load_model(base_model if is_adapter else str(folder), quantization_config, **model_init_kwargs)
        processing_class = load_processing_class(str(folder), is_vision_language(model.config))
        if is_adapter:
            add_marker(model, processing_class, step_format)
            model = PeftModel.from_pretrained(model, folder, use_safetensors=True)
        return cls(model, processing_class, step_format)

    def merge_and_unload(self) -> "ProcessRewardModel":
        """Merge the adapter into plain weights; 4-bit weights are dequantised first, so that no rounding is added."""
        model = self.model
        if not isinstance(model, PeftModel):
            raise ValueError("expected a LoRA adapter to merge, this is a full model already")
        if getattr(model.get_base_model(), "is_quantized", False):
            # PEFT would merge into 4-bit weights and round again: put the adapter onto the dequantised base instead.
            adapter, peft_config = get_peft_model_state_dict(model), model.active_peft_config
            model = get_peft_model(model.unload().dequantize(), peft_config)
            set_peft_model_state_dict(model, adapter)
        return ProcessRewardModel(model.merge_and_unload(), self.processing_class, self.step_format)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model, processor and step format, to be loaded by [`ProcessRewardModel.from_pretrained`]."""
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        self.step_format.save(folder)

    def score(self, images: Sequence[Image.Image | str], question: str, steps: Sequence[str]) -> list[float]:
        """
        Score the steps of one solution.

        Args:
            images (`Sequence` of images or paths):
                Pictures of the question, in order; empty for a text question.
            question (`str`):
                The question.
            steps (`Sequence[str]`):
                Steps of the solution, in order.

        Returns:
            `list[float]`: P(step good) in [0, 1], one a step.
        """
        row = {"images": list(images), "prompt": question, "completions": list(steps)}
        return self.score_batch([row])[0]

    def score_batch(self, rows: Sequence[dict[str, Any]], batch_size: int = 8) -> list[list[float]]:
        """
        Score many solutions.

        Args:
            rows (`Sequence[dict]`):
                Rows with `prompt`, `completions` and optional `images`, as in training.
            batch_size (`int`, *optional*, defaults to `8`):
                Rows a forward.

        Returns:
            `list[list[float]]`: P(step good) of each step of each row, in the order of `rows`.
        """
        scores: list[list[float]] = []
        for start in tqdm(range(0, len(rows), batch_size), desc="Scoring", disable=len(rows) <= batch_size):
            chunk = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            batch, markers = render_batch(chunk, self.processing_class, self.step_format)
            inputs = {name: value.to(self.model.device) for name, value in batch.items()}
            with torch.inference_mode():
                logits = step_logits(
                    self.model, inputs, markers.to(self.model.device), self.step_ids.good, self.step_ids.bad
                )
            scores += [list(part) for part in logits.sigmoid().cpu().split(markers.sum(1).tolist())]
        return [[float(score) for score in row] for row in scores]

    def best_of_n(
        self,
        images: Sequence[Image.Image | str],
        question: str,
        candidates: Sequence[Sequence[str]],
        aggregate: Literal["mean", "min", "product", "last"] = "mean",
    ) -> list[Candidate]:
        """
        Rank candidate solutions of one question, best first.

        Args:
            images, question:
                As in [`ProcessRewardModel.score`].
            candidates (`Sequence[Sequence[str]]`):
                Solutions, each a list of steps.
            aggregate (`str`, *optional*, defaults to `"mean"`):
                How step scores become one score: `"mean"` (the paper's Table 3), `"min"`, `"product"` or `"last"`.

        Returns:
            `list[Candidate]`: all candidates, highest score first; equal scores keep their order.
        """
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {aggregate!r}, expected one of {', '.join(AGGREGATES)}")
        if not candidates:
            raise ValueError("`candidates` is empty, expected at least one solution")
        rows = []
        for index, steps in enumerate(candidates):
            if isinstance(steps, str):
                raise ValueError(f"candidate {index} is one string, expected a list of steps: split it first")
            rows.append({"images": list(images), "prompt": question, "completions": list(steps)})
        ranking = [
            Candidate(index, AGGREGATES[aggregate](scores), scores)
            for index, scores in enumerate(self.score_batch(rows))
        ]
        return sorted(ranking, key=lambda candidate: -candidate.score)
