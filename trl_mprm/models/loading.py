"""
Load a model and its processor, add the marker, freeze and quantise the right parts.

Works with any `AutoModelForImageTextToText` and `AutoModelForCausalLM`, because transformers says where the text
decoder (`get_decoder`) and the vision encoder (`get_encoder("image")`) of an architecture are.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ..prompting.rendering import render_prefix_text, render_prefixes
from ..prompting.step_format import StepFormat
from ..prompting.tokens import ProcessingClass, tokenizer_of
from .anatomy import base_of, is_vision_language, modules_beside_decoder
from .quiet import quiet_upstream


logger = logging.getLogger(__name__)

quiet_upstream()


def load_model(
    model_id: str,
    quantization_config: BitsAndBytesConfig | None = None,
    reward_head: str = "lm",
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """
    Load a vision-language or text-only model by Hub id or folder, without remote code unless asked.

    Args:
        model_id (`str`):
            Hub id or local folder.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantises only the text decoder: not the vision encoder, the projector or the LM head.
        reward_head (`str`, *optional*, defaults to `"lm"`):
            `"classification"` loads a text-only model with a head of two labels, a new one if it has none.
        model_init_kwargs:
            Passed to `from_pretrained`; `dtype` is float32 by default, as in TRL.
    """
    if (Path(model_id) / "adapter_config.json").is_file():
        raise ValueError(f"{model_id} is an adapter: name its base here, or score it with ProcessRewardModel")
    kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **model_init_kwargs}
    check_safetensors(Path(model_id))
    with remote_code_refused(model_id):
        config = AutoConfig.from_pretrained(model_id, **shared_load_kwargs(kwargs))
    auto = AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM
    if reward_head == "classification":
        if is_vision_language(config):
            raise ValueError(
                f"{model_id} reads images, and no vision-language model has a token classification class: "
                'set reward_head="lm"'
            )
        auto, config.num_labels = AutoModelForTokenClassification, 2
        kwargs["config"] = config
    if quantization_config is not None:
        quantization_config = copy.deepcopy(quantization_config)
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=kwargs["trust_remote_code"])
        quantization_config.llm_int8_skip_modules = modules_beside_decoder(empty)
        kwargs["quantization_config"] = quantization_config
    with remote_code_refused(model_id):
        model = auto.from_pretrained(model_id, **kwargs)
    keep_4bit_gradients_on_cpu(model)
    return model


def shared_load_kwargs(model_init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that config and processor share with the weights; refuses remote code unless asked for it."""
    shared = {key: model_init_kwargs[key] for key in ("revision", "trust_remote_code") if key in model_init_kwargs}
    return {"trust_remote_code": False, **shared}


@contextmanager
def remote_code_refused(model_id: str) -> Iterator[None]:
    """Say what to do about a model with its own code; left unset, `trust_remote_code` makes transformers ask for a `y`."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{model_id} comes with code of its own, which is not run: convert it (`trl-mprm convert`, for internvl_chat "
            "checkpoints), take a copy in transformers' own format (often named -hf), or pass trust_remote_code=True "
            "if you have read the code"
        ) from error


def check_safetensors(folder: Path) -> None:
    """Raise `ValueError` for the first incomplete *.safetensors file in a local folder."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            with path.open("rb") as file:
                pointer = file.read(64).startswith(b"version https://git-lfs")
            what = (
                "is a Git LFS pointer, not the weights: run `git lfs pull`"
                if pointer
                else (f"is cut short or damaged ({error}): download or save it again")
            )
            raise ValueError(f"{path} {what}") from error


def load_processing_class(model_id: str, vision: bool, **kwargs: Any) -> ProcessingClass:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one."""
    kwargs = {"trust_remote_code": False, **kwargs}
    with remote_code_refused(model_id):
        processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(model_id, **kwargs)
    # AutoProcessor silently returns a bare tokenizer if it does not know the processor class.
    if vision and not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"expected a processor for images and text in {model_id}, got {type(processor).__name__}: "
            "the folder lacks processor files, save the model's processor there"
        )
    return processor


def check_processing_class(model: torch.nn.Module, processing_class: ProcessingClass) -> None:
    """Raise `ValueError` unless a vision-language model comes with its own processor, and a text-only one a tokenizer."""
    name, got = type(base_of(model)).__name__, type(processing_class).__name__
    if not is_vision_language(model.config):
        if isinstance(processing_class, ProcessorMixin):
            raise ValueError(
                f"{name} reads text only, and processing_class is a processor for images ({got}): give the model's "
                "tokenizer, or train a vision-language model"
            )
        return
    if not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"{name} reads images, and processing_class is a tokenizer ({got}): give the model's processor "
            "(AutoProcessor.from_pretrained), or leave it out"
        )
    token = getattr(model.config, "image_token_id", None)
    if token is None or processing_class.chat_template is None:  # cross attention, or rows without images only
        return
    (written,), _ = render_prefixes([{"images": [Image.new("RGB", (64, 64))], "prompt": "?"}], processing_class)
    if token not in written["input_ids"]:
        raise ValueError(
            f"a picture goes to {name} as token {token}, which this {got} does not write: give the processor of the "
            "model itself"
        )


def check_template(processing_class: ProcessingClass) -> None:
    """Raise `ValueError` if the chat template cannot be rendered, or leaves out the question."""
    question = "How many of the 7 tiles are red?"
    try:
        text = render_prefix_text({"prompt": question}, processing_class)
    except TemplateError as error:
        raise ValueError(
            f"the chat template of {processing_class.name_or_path or type(processing_class).__name__} cannot be rendered "
            f"({error}): take the model's own chat_template"
        ) from error
    if question not in text:
        raise ValueError(
            f"the chat template leaves the question out: it renders {question!r} as {text!r:.80}; take the model's own "
            "chat_template"
        )


def keep_4bit_gradients_on_cpu(model: torch.nn.Module) -> None:
    """
    Keep bitsandbytes >= 0.49 from repacking 4-bit weights on the first `eval()` on a CPU with AVX512-BF16.

    The repacked layer has no autograd: every later gradient is wrong, or raises an error if the layer has a bias.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def add_marker(model: PreTrainedModel, processing_class: ProcessingClass, step_format: StepFormat) -> None:
    """Add the marker to tokenizer and embeddings if it is missing; its row starts as the mean of the others."""
    tokenizer = tokenizer_of(processing_class)
    known = tokenizer.get_vocab()
    rows = model.get_input_embeddings().weight.shape[0]
    if step_format.marker not in known:
        tokenizer.add_tokens([step_format.marker], special_tokens=True)
    # Many checkpoints have spare rows (Qwen2.5-VL: 152,064 for 151,665 tokens) and need no resizing.
    short = len(tokenizer) > rows
    if short:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if short or step_format.marker not in known:
        marker = tokenizer.convert_tokens_to_ids(step_format.marker)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                layer.weight[marker] = layer.weight[:marker].mean(0)
