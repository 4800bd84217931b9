"""Load and read classification heads on a text decoder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModel,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import CausalLMOutputWithPast

from .anatomy import base_of
from .loading import check_safetensors, remote_code_refused


class StepClassifier(torch.nn.Module):
    """
    A text decoder with a classification head, called like a causal language model.

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
        `ValueError`: the folder's safetensors files hold no such head, or one of more than two outputs.
    """
    kwargs = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **model_init_kwargs}
    check_safetensors(Path(folder))
    tensors: dict[str, torch.Tensor] = {}
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
    with remote_code_refused(folder):
        decoder = AutoModel.from_pretrained(folder, **kwargs)
    return StepClassifier(decoder, torch.nn.Sequential(*layers).to(decoder.device, decoder.dtype))


def check_classifier(model: torch.nn.Module) -> None:
    """Raise `ValueError` if a model has no head of two labels."""
    base = base_of(model)
    if not is_token_classifier(model) or base.config.num_labels != 2:
        raise ValueError(
            f'reward_head="classification" needs an AutoModelForTokenClassification of 2 labels, got '
            f"{type(base).__name__} of {base.config.num_labels}: give its id, or load it with num_labels=2"
        )


def is_token_classifier(model: torch.nn.Module) -> bool:
    return type(base_of(model)) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.values()


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch off the dropout of a model, as TRL's `PRMTrainer` did."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def classifier_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], markers: torch.Tensor) -> torch.Tensor:
    """
    Logits `(markers.sum(), 2)` of a token classifier at the marked positions, through any wrapper of the model.

    `GenericForTokenClassification.forward` (transformers/modeling_layers.py) has no `logits_to_keep`: it passes all
    hidden states to `self.score`, so a hook picks those of the markers. Other classes compute all logits.
    """
    generic = (module for module in model.modules() if isinstance(module, GenericForTokenClassification))
    classifier = next(generic, None)
    if classifier is None:
        return model(**inputs).logits[markers]
    hook = classifier.score.register_forward_pre_hook(lambda head, args: (args[0][markers],))
    try:
        return model(**inputs).logits
    finally:
        hook.remove()
