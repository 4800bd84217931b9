"""The parts of a model: text decoder, projector, vision encoder."""

import re

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)


# The projector between vision encoder and decoder is trained, as in the paper. Most architectures keep it outside the
# encoder (`multi_modal_projector`, `connector`); the Qwen-VL families and their kin keep it inside, under these names.
PROJECTORS_IN_ENCODER = re.compile(r"(merger|deepstack_merger_list)\b")


def is_vision_language(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_name(model: PreTrainedModel) -> str:
    """Full name of the text decoder, e.g. `model.language_model` or, in a text-only model, `model`."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def modules_beside_decoder(model: PreTrainedModel) -> list[str]:
    """
    Full names of the outermost modules that neither contain the text decoder nor lie inside it.

    A list given to bitsandbytes replaces its defaults and is matched on full names: `["vision_tower"]` would quantise
    the vision tower all the same, and the LM head too.
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
