"""
Load a model with its processor, give it the marker, freeze and quantise the right parts.

Works with any `AutoModelForImageTextToText` and `AutoModelForCausalLM`: transformers itself says where the text decoder
(`get_decoder`) and the vision encoder (`get_encoder("image")`) of an architecture are.
"""

import copy
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from PIL import Image
from safetensors import safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .rendering import ProcessingClass, render_prefixes, tokenizer_of
from .step_format import StepFormat


logger = logging.getLogger(__name__)

# What stands between vision encoder and decoder is trained, as in the paper. Most architectures keep it outside the
# encoder (`multi_modal_projector`, `connector`); the Qwen-VL families and their kin keep it inside, under these names.
PROJECTORS_IN_ENCODER = re.compile(r"(merger|deepstack_merger_list)\b")


def is_vision_language(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(
    model_id: str,
    quantization_config: BitsAndBytesConfig | None = None,
    reward_head: str = "lm",
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """
    Load a vision-language or text-only model by Hub id or folder; never with remote code unless asked.

    Args:
        model_id (`str`):
            Hub id or local folder.
        quantization_config (`BitsAndBytesConfig`, *optional*):
            Quantise the text decoder, and nothing else: not the vision encoder, the projector or the LM head.
        reward_head (`str`, *optional*, defaults to `"lm"`):
            `"classification"` loads a text-only model with a head of two labels, new where it has none.
        model_init_kwargs:
            Passed to `from_pretrained`; `dtype` is float32 by default, as in TRL.
    """
    if (Path(model_id) / "adapter_config.json").is_file():
        raise ValueError(f"{model_id} is an adapter: name its base here, or score it with ProcessRewardModel")
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_init_kwargs}
    config = AutoConfig.from_pretrained(model_id, **pinned(kwargs))
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
            empty = auto.from_config(config, trust_remote_code=kwargs.get("trust_remote_code", False))
        quantization_config.llm_int8_skip_modules = modules_beside_decoder(empty)
        kwargs["quantization_config"] = quantization_config
    model = auto.from_pretrained(model_id, **kwargs)
    keep_4bit_gradients_on_cpu(model)
    return model


class StepClassifier(torch.nn.Module):
    """
    A text decoder with a classification head, called as a causal language model is.

    Args:
        decoder ([`~transformers.PreTrainedModel`]):
            Decoder without language-model head.
        head (`torch.nn.Module`):
            From hidden size to one output (its sigmoid is P(step good)) or two (the second is good).
    """

    def __init__(self, decoder: PreTrainedModel, head: torch.nn.Module):
        super().__init__()
        self.decoder, self.head, self.config = decoder, head, decoder.config

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def forward(self, logits_to_keep: torch.Tensor, **inputs: Any) -> CausalLMOutputWithPast:
        """`logits` of shape `(logits_to_keep.sum(), 2)`, bad then good; a single output stands against 0."""
        output = self.decoder(**inputs)
        logits = self.head(output.last_hidden_state[logits_to_keep])
        if logits.shape[-1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=-1)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def load_step_classifier(folder: str, head: str, **model_init_kwargs: Any) -> StepClassifier:
    """
    Load a decoder with the classification head that its checkpoint holds under the name `head`.

    The head is one linear layer (`score.weight`) or several with ReLU between them (`score.0.weight`,
    `score.2.weight`, as in Qwen2.5-Math-PRM). The class in the checkpoint's own remote code is not needed.

    Raises:
        `ValueError`: the safetensors of the folder hold no such head, or one of more than two outputs.
    """
    kwargs = {"dtype": torch.float32, "use_safetensors": True, **model_init_kwargs}
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.startswith(head + ".")]
            tensors |= {name.removeprefix(head + "."): weights.get_tensor(name) for name in names}
    layers: list[torch.nn.Module] = []
    for name in sorted(name for name in tensors if name.endswith("weight")):
        weight, bias = tensors[name], tensors.get(name.removesuffix("weight") + "bias")
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        layers += [torch.nn.ReLU(), layer] if layers else [layer]
    if not layers or layers[-1].out_features > 2:
        got = f"one of {layers[-1].out_features} outputs" if layers else "none"
        raise ValueError(f"{folder}: expected a head of one or two outputs named {head!r} in *.safetensors, got {got}")
    decoder = AutoModel.from_pretrained(folder, **kwargs)
    return StepClassifier(decoder, torch.nn.Sequential(*layers).to(decoder.device, decoder.dtype))


def check_classifier(model: torch.nn.Module) -> None:
    """Raise `ValueError` where a model has no head of two labels; switch its dropout off, as TRL's `PRMTrainer` did."""
    base = base_of(model)
    if type(base) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.values() or base.config.num_labels != 2:
        raise ValueError(
            f'reward_head="classification" needs an AutoModelForTokenClassification of 2 labels, got '
            f"{type(base).__name__} of {base.config.num_labels}: give its id, or load it with num_labels=2"
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def pinned(model_init_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that config and processor share with the weights."""
    return {key: model_init_kwargs[key] for key in ("revision", "trust_remote_code") if key in model_init_kwargs}


def load_processing_class(model_id: str, vision: bool, **kwargs: Any) -> ProcessingClass:
    """Load the processor of a vision-language model, or the tokenizer of a text-only one."""
    if not vision:
        return AutoTokenizer.from_pretrained(model_id, **kwargs)
    processor = AutoProcessor.from_pretrained(model_id, **kwargs)
    # AutoProcessor returns a bare tokenizer, without a word, where it does not know the processor class.
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"expected a processor for images and text in {model_id}, got {type(processor).__name__}: "
            "the folder lacks processor files, save the model's processor there"
        )
    return processor


def check_processing_class(model: torch.nn.Module, processing_class: ProcessingClass) -> None:
    """Raise `ValueError` unless a model that reads images has its own processor, and one that does not a tokenizer."""
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
    if token is None or processing_class.chat_template is None:  # cross attention; rows without images only
        return
    (written,), _ = render_prefixes([{"images": [Image.new("RGB", (64, 64))], "prompt": "?"}], processing_class)
    if token not in written["input_ids"]:
        raise ValueError(
            f"a picture goes to {name} as token {token}, which this {got} does not write: give the processor of the "
            "model itself"
        )


def decoder_name(model: PreTrainedModel) -> str:
    """Full name of the text decoder, as `model.language_model` or, text-only, `model`."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def modules_beside_decoder(model: PreTrainedModel) -> list[str]:
    """
    Full names of the outermost modules that neither hold the text decoder nor stand in it.

    A list given to bitsandbytes replaces its defaults and is matched on full names: `["vision_tower"]` would leave the
    vision tower in 4 bit, and quantise the LM head too.
    """
    decoder = decoder_name(model)
    around = {decoder.rsplit(".", depth)[0] for depth in range(decoder.count(".") + 1)}
    beside = []
    for name, _ in model.named_modules():
        parent = name.rpartition(".")[0]
        if name and name not in around and (parent in around - {decoder} or not parent):
            beside.append(name)
    return beside


def decoder_linears(model: PreTrainedModel) -> str:
    """
    Regular expression for LoRA's `target_modules`: the linear layers of the text decoder.

    `"all-linear"` and bare names such as `"up_proj"` would also reach into the vision encoder.
    """
    prefix = decoder_name(model) + "."
    # 4-bit and 8-bit layers are subclasses of nn.Linear.
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, torch.nn.Linear)
    }
    return rf"{re.escape(prefix)}.*\.({'|'.join(sorted(linears))})"


def keep_4bit_gradients_on_cpu(model: torch.nn.Module) -> None:
    """
    Keep bitsandbytes >= 0.49 from repacking 4-bit weights on the first `eval()` on a CPU with AVX512-BF16.

    The repacked layer has no autograd: every later gradient is wrong, or raises where the layer has a bias.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def add_marker(model: PreTrainedModel, processing_class: ProcessingClass, step_format: StepFormat) -> None:
    """Add the marker to tokenizer and embeddings where it is missing; its row starts as the mean of the others."""
    tokenizer = tokenizer_of(processing_class)
    known = tokenizer.get_vocab()
    rows = model.get_input_embeddings().weight.shape[0]
    if step_format.marker not in known:
        tokenizer.add_tokens([step_format.marker], special_tokens=True)
    # Many checkpoints have spare rows (Qwen2.5-VL: 152,064 for 151,665 tokens); then nothing is resized.
    short = len(tokenizer) > rows
    if short:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if short or step_format.marker not in known:
        marker = tokenizer.convert_tokens_to_ids(step_format.marker)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                layer.weight[marker] = layer.weight[:marker].mean(0)


def freeze_vision_encoder(model: PreTrainedModel) -> None:
    """Freeze the vision encoder, not the projector behind it, as the paper does (its Table 7)."""
    encoder = model.get_encoder("image")
    if encoder is model or encoder is model.base_model:
        raise ValueError(
            f"cannot tell the vision encoder of {type(model).__name__} from the rest: "
            "set freeze_vision_encoder=False, or freeze it yourself"
        )
    for name, parameter in encoder.named_parameters():
        if not PROJECTORS_IN_ENCODER.match(name):
            parameter.requires_grad_(False)


def fill_peft_config(
    peft_config: LoraConfig, model: PreTrainedModel, marker_id: int, reward_head: str = "lm"
) -> LoraConfig:
    """Where the user left them open: adapt the decoder's linear layers, train the marker's embedding row or the head."""
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = decoder_linears(model)
    if reward_head == "classification":
        peft_config.modules_to_save = peft_config.modules_to_save or ["score"]
        peft_config.task_type = "TOKEN_CLS"
    elif peft_config.trainable_token_indices is None:
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        peft_config.trainable_token_indices = {name.rpartition(".")[2]: [marker_id]}
    return peft_config


def train_marker_in_place(model: PeftModel) -> None:
    """
    Put the trained row of the marker into the embedded text.

    PEFT copies the whole embedding in every forward and takes a gradient of all of it, to train one row: for
    Qwen2.5-VL-7B in bfloat16, 1.1 GB each time. What is computed, trained and saved is the same.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and isinstance(module.base_layer, torch.nn.Embedding):
            module.forward_adapters = functools.partial(_embed, module, module.forward_adapters)


def _embed(
    layer: TrainableTokensLayer, forward_of_peft: Callable, tokens: torch.Tensor, active_adapters: list[str], **kwargs
) -> torch.Tensor:
    if layer.disable_adapters or layer.merged:
        return forward_of_peft(tokens, active_adapters, **kwargs)
    embedded = layer.base_layer(tokens)
    scale = getattr(layer.base_layer, "embed_scale", 1.0)  # Gemma scales what it embeds
    for adapter in active_adapters:
        rows = layer.trainable_tokens_delta[adapter] * scale
        for row, token in zip(rows, layer.token_indices[adapter], strict=True):
            embedded = torch.where((tokens == token)[..., None], row.to(embedded.dtype), embedded)
    return embedded


def marker_logits(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], markers: torch.Tensor, token_ids: Sequence[int]
) -> torch.Tensor:
    """
    Logits of a few tokens at each marker, computed by one forward whose LM head sees the markers only.

    Args:
        model (`torch.nn.Module`):
            Model, possibly wrapped (PEFT, DDP, FSDP).
        inputs (`dict[str, torch.Tensor]`):
            What `forward` takes; `input_ids` of shape `(rows, tokens)`.
        markers (`torch.Tensor`):
            Bool mask of shape `(rows, tokens)`, True at each marker.
        token_ids (`Sequence[int]`):
            Tokens, the two reward tokens first.

    Returns:
        `torch.Tensor`: float32, shape `(markers.sum(), len(token_ids))`, in row order.
    """
    logits = model(**inputs, logits_to_keep=markers, use_cache="past_key_values" in inputs).logits
    if logits.ndim != 2:
        raise ValueError(
            f"expected logits at the {int(markers.sum())} markers only, got shape {tuple(logits.shape)}: this model's "
            "forward does not take a boolean `logits_to_keep` (transformers >= 5.21 native classes do)"
        )
    return logits[:, list(token_ids)].float()


def good_minus_bad(logits: torch.Tensor) -> torch.Tensor:
    """Logit of P(step good): that of the first reward token minus that of the second, shape `(steps,)`."""
    return logits[:, 0] - logits[:, 1]
