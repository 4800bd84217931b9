"""
LoRA on the text decoder, with the marker's embedding row. What reaches into PEFT is here:

- `PeftModel.save_pretrained` (peft/peft_model.py), in [`adapted`];
- `TrainableTokensLayer.forward_adapters` (peft/tuners/trainable_tokens/layer.py), in [`train_marker_in_place`].
"""

import copy
import functools
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import (
    PreTrainedModel,
)

from .anatomy import decoder_linears


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


def adapted(
    model: PreTrainedModel,
    peft_config: LoraConfig,
    marker_id: int,
    reward_head: str = "lm",
    revision: str | None = None,
) -> PeftModel:
    """
    Put an adapter onto a model, see [`fill_peft_config`].

    PEFT would save the whole embedding, frozen as it is, where the marker made the vocabulary longer.
    """
    peft_config = fill_peft_config(peft_config, model, marker_id, reward_head)
    model = get_peft_model(model, peft_config, revision=revision)
    train_marker_in_place(model)
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


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
