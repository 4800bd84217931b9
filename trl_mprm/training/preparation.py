"""Prepare a model for training: load it, add the marker, freeze the vision encoder, put an adapter on it."""

import copy
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers.utils import ADAPTER_CONFIG_NAME

from ..models.adapters import adapted
from ..models.anatomy import base_of, decoder_name, freeze_vision_encoder, is_vision_language
from ..models.classifier import check_classifier, disable_dropout, is_token_classifier
from ..models.distinct_images import encode_distinct_images
from ..models.loading import (
    add_marker,
    check_processing_class,
    check_template,
    keep_4bit_gradients_on_cpu,
    load_model,
    load_processing_class,
    shared_load_kwargs,
)
from ..prompting.tokens import ProcessingClass, tokenizer_of
from .config import ProcessRewardConfig


def with_head(args: ProcessRewardConfig, model: str | PreTrainedModel | PeftModel) -> ProcessRewardConfig:
    """Return a copy of the configuration that says which head is trained, decided by the model if it was unset."""
    args = copy.copy(args)
    if args.reward_head is None:
        if isinstance(model, str) and (Path(model) / ADAPTER_CONFIG_NAME).is_file():
            classifies = False  # [`load_model`] will say what is wrong with the model
        elif isinstance(model, str):
            config = AutoConfig.from_pretrained(model, **shared_load_kwargs(args.model_init_kwargs or {}))
            classifies = any(name.endswith("ForTokenClassification") for name in config.architectures or [])
        else:
            classifies = is_token_classifier(model)
        args.reward_head = "classification" if classifies else "lm"
        args.check_head()
    args.overlong = args.overlong or ("drop_steps" if args.reward_head == "classification" else "error")
    return args


def prepare_model(
    model: str | PreTrainedModel | PeftModel,
    args: ProcessRewardConfig,
    processing_class: ProcessingClass | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel | PeftModel, ProcessingClass]:
    """
    Load a model and its processor, unless they are given, and prepare them to read steps.

    Args:
        model, processing_class, quantization_config:
            As in [`ProcessRewardTrainer`].
        args ([`ProcessRewardConfig`]):
            Configuration.

    Returns:
        `tuple`: the model and its processor or tokenizer, which know the marker.
    """
    init_kwargs = args.model_init_kwargs or {}
    model_id = model if isinstance(model, str) else model.name_or_path
    set_seed(args.seed)  # Trainer seeds too late for the random weights of a new head and LoRA
    if isinstance(model, str):
        model = load_model(model, quantization_config, args.reward_head, **init_kwargs)
    elif quantization_config is not None:
        raise ValueError("`quantization_config` needs the model as a string; this one is loaded already")
    if processing_class is None:
        processor_kwargs = {**shared_load_kwargs(init_kwargs), **(args.processor_kwargs or {})}
        processing_class = load_processing_class(model_id, is_vision_language(model.config), **processor_kwargs)
    check_processing_class(model, processing_class)
    keep_4bit_gradients_on_cpu(model)  # `load_model` does this, but a model object bypasses it
    if args.reward_head == "classification":
        check_classifier(model)
        if args.disable_dropout:
            disable_dropout(model)
    else:
        check_template(processing_class)
        add_marker(model, processing_class, args.step_format)
    if is_vision_language(model.config):
        encode_distinct_images(base_of(model))
        if args.freeze_vision_encoder:
            freeze_vision_encoder(model)
    return model, processing_class


def adapt_model(
    model: PreTrainedModel, args: ProcessRewardConfig, peft_config: PeftConfig, processing_class: ProcessingClass
) -> PeftModel:
    """Put an adapter onto a prepared model."""
    marker = args.step_format.ids(tokenizer_of(processing_class)).marker[0]
    return adapted(model, peft_config, marker, args.reward_head, (args.model_init_kwargs or {}).get("revision"))


def describe_model(model: PreTrainedModel | PeftModel, optim: str) -> str:
    """
    Summarise the trained parameters, the 4-bit layers, and the memory for weights, gradients and optimizer states.
    """
    stored = trained = four_bit = weights = gradients = states = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        size = parameter.numel() * parameter.element_size()
        count = size * 2 if packed else parameter.numel()  # two per byte, whatever type they are stored as
        stored += count
        weights += size
        four_bit += packed * count
        if parameter.requires_grad:
            trained += count
            gradients += size
            states += 2 * (count if "8bit" in optim else size)
    total = weights + gradients + states
    quantised = f"{four_bit:,}, the linear layers of {decoder_name(base_of(model))}" if four_bit else "none"
    return (
        f"trained parameters: {trained:,} of {stored:,} ({trained / stored:.2%})\n"
        f"in 4 bit: {quantised}\n"
        f"memory: {_size(total)} (weights {_size(weights)}, gradients {_size(gradients)}, optimizer states "
        f"{_size(states)}), activations not counted"
    )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
