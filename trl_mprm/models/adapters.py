"""
LoRA on the text decoder, with the marker's embedding row. This module holds all code that reaches into PEFT:

- `PeftModel.save_pretrained` (peft/peft_model.py), in [`adapted`];
- `TrainableTokensLayer.forward_adapters` (peft/tuners/trainable_tokens/layer.py), in [`train_marker_in_place`].
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel

from .anatomy import decoder_linears
from .loading import check_safetensors


def fill_peft_config(
    peft_config: LoraConfig, model: PreTrainedModel, marker_id: int, reward_head: str = "lm"
) -> LoraConfig:
    """Fill in unset fields: adapt the decoder's linear layers, and train the marker's embedding row or the head."""
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

    PEFT would save the whole embedding, although frozen, if the marker has enlarged the vocabulary.
    """
    peft_config = fill_peft_config(peft_config, model, marker_id, reward_head)
    model = get_peft_model(model, peft_config, revision=revision)
    train_marker_in_place(model)
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


def read_adapter(folder: Path) -> PeftConfig:
    """
    Read the settings of an adapter, ready to be put onto its base.

    The adapted modules are read off the names of its weights: a foreign `target_modules` expression is never run, since
    catastrophic backtracking would never end.

    Raises:
        `ValueError`: the folder is not an adapter that PEFT knows, names no base, or has pickled weights only.
    """
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, base = values["peft_type"], values["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the settings of a PEFT adapter ({error!r}): save it again") from error
    if kind not in list(PeftType):
        raise ValueError(f"{path}: peft_type is {kind!r}, which this PEFT does not know: expected LORA")
    if not (base is None or isinstance(base, str)):
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected the id or folder of the base")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        has_pickle = (folder / WEIGHTS_NAME).is_file()
        raise ValueError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            + (f", only {WEIGHTS_NAME}, a pickle, which is never loaded" if has_pickle else "")
            + ": save the adapter with PEFT's save_pretrained"
        )
    check_safetensors(folder)
    peft_config = PeftConfig.from_pretrained(folder)
    if isinstance(peft_config, LoraConfig) and isinstance(peft_config.target_modules, str):
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as weights:
            names = [name.split(".lora_")[0] for name in weights.keys() if ".lora_" in name]
        peft_config.target_modules = sorted({name.removeprefix("base_model.model.") for name in names})
        peft_config.exclude_modules = None
    return peft_config


def base_of_adapter(peft_config: PeftConfig, adapter: str, base_model: str | None = None) -> str:
    """
    The base to load: `base_model`, or else the base that the adapter names.

    Raises:
        `ValueError`: the adapter names no base, or a folder that does not exist.
    """
    base = base_model or peft_config.base_model_name_or_path
    do = "name the base, or the folder that it is in (base_model; --base-model)"
    if not base:
        raise ValueError(f"{adapter} is an adapter and does not say of which model: {do}")
    if not Path(base).is_dir() and (Path(base).is_absolute() or base.startswith(".") or base.count("/") > 1):
        raise ValueError(f"{adapter} is an adapter of {base}, a folder that is not here: {do}")
    return base


def train_marker_in_place(model: PeftModel) -> None:
    """
    Put the trained row of the marker into the embedded text.

    To train one row, PEFT copies the whole embedding in every forward pass and computes a gradient for all of it: for
    Qwen2.5-VL-7B in bfloat16, 1.1 GB each time. The results, the trained row and the saved file are the same here.
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
