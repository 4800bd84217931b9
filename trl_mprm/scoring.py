"""Score steps, and pick the best of N solutions, with a trained process reward model."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import (
    BitsAndBytesConfig,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .data.hub import download_model
from .data.rows import question_key
from .models.adapters import base_of_adapter, read_adapter
from .models.anatomy import base_of, is_vision_language
from .models.classifier import StepClassifier, load_step_classifier
from .models.distinct_images import encode_distinct_images
from .models.loading import add_marker, load_model, load_processing_class
from .models.reader import StepReader, batch_inputs, concentration, good_minus_bad
from .models.shared_prefix import can_share_prefix, prefix_inputs, run_prefix, shared_length, suffix_inputs
from .prompting.published import CHECKPOINTS, VISUALPRM_SYSTEM, published_format
from .prompting.rendering import render_rows
from .prompting.step_format import StepFormat
from .prompting.tokens import ProcessingClass, Rendered, errors_name_row, images_of, row_name, tokenizer_of
from .step_scorer import StepScorer


logger = logging.getLogger(__name__)


class ProcessRewardModel(StepScorer):
    """
    A process reward model ready to score.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model trained by [`ProcessRewardTrainer`].
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            The model's processor or tokenizer, which must know the marker.
        step_format ([`StepFormat`], *optional*):
            Marker, reward tokens and joiner the model was trained with.
        name (`str`, *optional*):
            Name after which its reward functions are called. Defaults to the last part of the path of the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: ProcessingClass,
        step_format: StepFormat | None = None,
        name: str | None = None,
    ):
        self.model = model.eval()
        self.processing_class = processing_class
        self.step_format = step_format or StepFormat()
        self.name = name or Path(base_of(model).config.name_or_path).name or "process_reward"
        if isinstance(processing_class, ProcessorMixin):
            encode_distinct_images(base_of(model))
        self.reader = StepReader(self.step_format, tokenizer_of(processing_class))
        self.step_ids = self.reader.step_ids

    @property
    def reads_images(self) -> bool:
        """Whether both the model and the layout of its prompt take images."""
        return isinstance(self.processing_class, ProcessorMixin) and self.step_format.reads_images

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        base_model: str | None = None,
        step_format: StepFormat | str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        revision: str | None = None,
        **model_init_kwargs: Any,
    ) -> "ProcessRewardModel":
        """
        Load a full checkpoint or a LoRA adapter saved by [`ProcessRewardTrainer`], or a published checkpoint.

        Args:
            model_id (`str`):
                Hub id or local folder.
            base_model (`str`, *optional*):
                Base of an adapter, if it has moved since training. Defaults to the one that the adapter names.
            step_format ([`StepFormat`] or `str`, *optional*):
                Layout of a checkpoint that was trained elsewhere, or its name in [`published.PUBLISHED`], e.g.
                `"math-shepherd"`. Defaults to the one saved beside the weights, else to the one known for the Hub id.
            quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
                Load the text decoder in 4 bit, as a QLoRA adapter was trained.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            model_init_kwargs:
                Passed to `from_pretrained`, e.g. `dtype` or `device_map`.
        """
        if step_format is None:
            step_format = CHECKPOINTS.get(str(model_id))
        if isinstance(step_format, str):
            step_format = published_format(step_format)
        folder = Path(model_id)
        if not folder.is_dir():
            ignore = ["*.bin", "*.pt", "*.pth", "checkpoint-*/*"]  # pickles are never loaded
            folder = download_model(str(model_id), revision=revision, ignore_patterns=ignore)
        step_format = step_format or StepFormat.load(folder)
        if ("system", VISUALPRM_SYSTEM) in (step_format.messages or ()):
            logger.warning(
                "visualprm: scored with the system message of its training data (published.VISUALPRM_SYSTEM); the one in "
                "config.json of the checkpoint may be another, and only the real checkpoint can settle which is right"
            )
        is_adapter = (folder / "adapter_config.json").is_file()
        if step_format.head is not None and quantization_config is not None:
            raise ValueError(
                "a checkpoint with a classification head is not loaded in 4 bit: leave the quantisation out"
            )
        if step_format.head is not None and not is_adapter:
            model = load_step_classifier(str(folder), step_format.head, **model_init_kwargs)
            return cls(model, load_processing_class(str(folder), vision=False), step_format, Path(model_id).name)
        if is_adapter:
            peft_config = read_adapter(folder)
            if base_model is None and peft_config.revision:
                model_init_kwargs = {"revision": peft_config.revision, **model_init_kwargs}
            base_model = base_of_adapter(peft_config, str(model_id), base_model)
        reward_head = "lm" if step_format.head is None else "classification"
        source = base_model if is_adapter else str(folder)
        model = load_model(source, quantization_config, reward_head, **model_init_kwargs)
        processing_class = load_processing_class(str(folder), is_vision_language(model.config))
        if is_adapter:
            trained_on = (peft_config.auto_mapping or {}).get("base_model_class", type(model).__name__)
            misfit = f"{model_id} is an adapter of a {trained_on}, and {base_model} is a {type(model).__name__}"
            if trained_on != type(model).__name__:
                raise ValueError(f"{misfit}: name the base it was trained on (base_model)")
            if step_format.head is None:
                add_marker(model, processing_class, step_format)
            try:
                model = PeftModel.from_pretrained(model, folder, use_safetensors=True, config=peft_config)
            except RuntimeError as error:  # torch lists every tensor of another shape
                raise ValueError(f"{misfit} of another size: name the base it was trained on (base_model)") from error
        if step_format.head is not None:
            merged = model.merge_and_unload()
            model = StepClassifier(merged.base_model, merged.get_submodule(step_format.head))
        return cls(model, processing_class, step_format, Path(model_id).name)

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
        return ProcessRewardModel(model.merge_and_unload(), self.processing_class, self.step_format, self.name)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model, processor and step format, to be loaded by [`ProcessRewardModel.from_pretrained`]."""
        if isinstance(self.model, StepClassifier):
            raise ValueError("a checkpoint with a classification head is already saved: copy its folder")
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        self.step_format.save(folder)

    def score_batch(
        self,
        rows: Sequence[dict[str, Any]],
        batch_size: int = 8,
        max_batch_tokens: int = 16384,
        share_prefix: bool = True,
    ) -> list[list[float]]:
        """
        Score many solutions. Rows with the same images and question are scored together, their prefix computed once.

        Args:
            rows (`Sequence[dict]`):
                Rows with `prompt`, `completions` and optional `images`, as in training.
            batch_size (`int`, *optional*, defaults to `8`):
                Rows per forward pass, for rows that share no prefix.
            max_batch_tokens (`int`, *optional*, defaults to `16384`):
                Maximum number of tokens per forward pass, including padding. A row behind a shared prefix counts its own
                tokens and an eighth of the prefix, whose keys and values each layer repeats for it: these are at most
                two hidden sizes wide, against about sixteen that a layer holds for a token it runs. A longer row is
                scored alone. Lower this if memory runs out.
            share_prefix (`bool`, *optional*, defaults to `True`):
                `False` scores every row from scratch, e.g. to check that sharing changes nothing.

        Returns:
            `list[list[float]]`: P(step good) of each step of each row, in the order of `rows`.
        """
        logits = self._marker_logits(rows, batch_size, max_batch_tokens, share_prefix)
        return [good_minus_bad(row).sigmoid().tolist() for row in logits]

    def concentrations(self, rows: Sequence[dict[str, Any]], **kwargs: Any) -> list[list[float]]:
        """
        How sure a model trained with `loss_type="beta_binomial"` is of each score, in continuations.

        A score s with concentration c has the standard deviation `sqrt(s * (1 - s) / (c + 1))`. The arguments are those
        of [`ProcessRewardModel.score_batch`].
        """
        if self.step_format.loss_type != "beta_binomial":
            raise ValueError(
                f'this model was trained with loss_type="{self.step_format.loss_type}": '
                'only "beta_binomial" learns a concentration'
            )
        return [concentration(row[:, 2]).tolist() for row in self._marker_logits(rows, **kwargs)]

    def _marker_logits(
        self,
        rows: Sequence[dict[str, Any]],
        batch_size: int = 8,
        max_batch_tokens: int = 16384,
        share_prefix: bool = True,
    ) -> list[torch.Tensor]:
        """Logits of the reward tokens and the marker at each step, `(steps, 3)` per row."""
        sharing = share_prefix and can_share_prefix(self.model)
        groups: dict[Any, list[int]] = {}
        for index in range(len(rows)):
            row = {"rollout_id": str(index)} | rows[index]
            with errors_name_row(row, index):
                if missing := {"prompt", "completions"} - row.keys():
                    raise ValueError(f"no `{min(missing)}`, expected `prompt`, `completions` and optional `images`")
                key = question_key(row["prompt"], images_of(row)) if sharing else index
            groups.setdefault(key, []).append(index)
        together = [group for group in groups.values() if len(group) > 1]
        alone = [index for group in groups.values() if len(group) == 1 for index in group]
        chunks = [(self._plain_logits, alone[at : at + batch_size]) for at in range(0, len(alone), batch_size)]
        chunks += [(self._shared_logits, group) for group in together]
        logits: dict[int, torch.Tensor] = {}
        with tqdm(total=len(rows), desc="Scoring", unit="row", delay=2) as progress, torch.inference_mode():
            for score, chunk in chunks:
                # A row without a name is named by its place in `rows`, not in the chunk.
                named = [{"rollout_id": str(index)} | rows[index] for index in chunk]
                logits |= zip(chunk, score(named, max_batch_tokens), strict=True)
                progress.update(len(chunk))
        return [logits[index] for index in range(len(rows))]

    def _render(
        self, rows: list[dict[str, Any]], same_prompt: bool = False
    ) -> tuple[list[Rendered], dict[str, torch.Tensor]]:
        rendered, image_tensors = render_rows(rows, self.processing_class, self.step_format, same_prompt)
        limit = _tokens_read(base_of(self.model).config, tokenizer_of(self.processing_class))
        for index, (row, tokens) in enumerate(zip(rows, rendered, strict=True)):
            if len(tokens.input_ids) > limit:
                raise ValueError(
                    f"{row_name(row, index)} has {len(tokens.input_ids)} tokens and this model reads {limit}: "
                    "shorten the solution or the images"
                )
        return rendered, image_tensors

    def _plain_logits(self, rows: list[dict[str, Any]], max_batch_tokens: int) -> list[torch.Tensor]:
        rendered, image_tensors = self._render(rows)
        if len(rows) > 1 and len(rows) * max(len(row.input_ids) for row in rendered) > max_batch_tokens:
            half = len(rows) // 2
            return [
                logits for part in (rows[:half], rows[half:]) for logits in self._plain_logits(part, max_batch_tokens)
            ]
        return self._read(rendered, batch_inputs(rendered, image_tensors, tokenizer_of(self.processing_class)))

    def _shared_logits(self, rows: list[dict[str, Any]], max_batch_tokens: int) -> list[torch.Tensor]:
        rendered, image_tensors = self._render(rows, same_prompt=True)
        length = shared_length(rendered)
        if length == 0:
            return self._plain_logits(rows, max_batch_tokens)
        inputs = prefix_inputs(rendered[0], length, image_tensors)
        prefix = run_prefix(self.model, send_to_device(inputs, self.model.device))
        logits: dict[int, torch.Tensor] = {}
        order = sorted(range(len(rows)), key=lambda index: len(rendered[index].input_ids))
        while order:
            longest = len(rendered[order[-1]].input_ids) - length
            order, chunk = _split_off(order, int(max_batch_tokens // (longest + length / 8)))
            following = [rendered[index] for index in chunk]
            read = self._read(following, suffix_inputs(following, length), past_key_values=prefix)
            logits |= zip(chunk, read, strict=True)
        return [logits[index] for index in range(len(rows))]

    def _read(
        self, rendered: Sequence[Rendered], inputs: dict[str, torch.Tensor], **past: Cache
    ) -> list[torch.Tensor]:
        logits = self.reader.read(self.model, send_to_device(inputs, self.model.device) | past)
        return list(logits.split([len(row.positions) for row in rendered]))


def _tokens_read(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The maximum number of tokens that a model reads, by its tokenizer and its positions with rope scaling."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)  # a model without positions has none
    if positions is None:
        return tokenizer.model_max_length
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or positions)
    return min(tokenizer.model_max_length, max(positions, int(scaled)))


def _split_off(order: list[int], n: int) -> tuple[list[int], list[int]]:
    """Split the last `n` off, at least one."""
    cut = len(order) - max(1, n)
    return order[: max(0, cut)], order[max(0, cut) :]
