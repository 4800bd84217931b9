"""
Read the rewards of steps off a model; training and scoring both do so through this module.

    rendered batch          {"input_ids": (rows, tokens), images, "markers": (rows, tokens)}
    rows of one question    {"prefix": {"input_ids": (1, P), images}, "input_ids": (rows, R), "markers": (rows, R)}
    logits                  (steps, tokens read): of "Yes", of "No", of the marker itself

Training applies a loss to these logits; a score is the sigmoid of the first minus the second.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ..prompting.rendering import pad_batch
from ..prompting.step_format import StepFormat
from ..prompting.tokens import Rendered
from .anatomy import base_of, is_vision_language
from .classifier import StepClassifier, classifier_logits
from .distinct_images import encoded_once
from .shared_prefix import run_prefix


class StepReader:
    """
    Reads one row of logits per step. It holds no weights, so that only the model is saved, adapted or sharded.

    Args:
        step_format ([`StepFormat`]):
            Says which token ends a step, and whether the logits of two tokens or a classification head judge it.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer, which must know the marker.

    Examples:
    ```python
    >>> import torch
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> from trl_mprm import StepFormat
    >>> from trl_mprm.models.reader import StepReader, batch_inputs
    >>> from trl_mprm.models.tiny import tiny_tokenizer
    >>> from trl_mprm.prompting.rendering import render_rows
    >>> tokenizer, step_format = tiny_tokenizer("qwen2"), StepFormat(marker="<|vision_end|>")
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    >>> model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes))
    >>> rows = [{"prompt": "2 + 2?", "completions": ["2 + 2", "is 4"]}, {"prompt": "1?", "completions": ["1"]}]
    >>> inputs = batch_inputs(*render_rows(rows, tokenizer, step_format), tokenizer)
    >>> StepReader(step_format, tokenizer).read(model, inputs).shape  # three steps, three tokens
    torch.Size([3, 3])

    ```
    """

    def __init__(self, step_format: StepFormat, tokenizer: PreTrainedTokenizerBase):
        self.step_ids = step_format.ids(tokenizer)
        self.has_head = step_format.head is not None
        marker = [] if self.has_head else self.step_ids.marker[-1:]
        self.token_ids = [self.step_ids.good, self.step_ids.bad, *marker]

    def read(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Compute the logits of the reward tokens and of the marker at the marked positions, and at no others.

        Args:
            model (`torch.nn.Module`):
                Model, possibly wrapped (PEFT, DDP, FSDP).
            inputs (`dict`):
                Tensors on the device of the model, in one of three forms: the arguments of `forward` and `markers`, a
                bool mask `(rows, tokens)`; the same for the tokens after a `prefix` (see
                [`~shared_prefix.prefix_inputs`]); or several of both, as `{"plain": ..., "groups": [...]}`, whose
                pictures are encoded once.

        Returns:
            `torch.Tensor`: float32, shape `(markers.sum(), 3)`, in row order; `(markers.sum(), 2)` with a
            classification head.

        Raises:
            `ValueError`: the model ignores the request and computes the logits of all positions.
        """
        if "groups" in inputs:
            plain = [inputs["plain"]] if "plain" in inputs else []
            with encoded_once(base_of(model)) if is_vision_language(model.config) else nullcontext():
                return torch.cat([self.read(model, part) for part in plain + inputs["groups"]])
        features = {name: value for name, value in inputs.items() if name not in ("markers", "prefix")}
        markers = inputs["markers"]
        if "prefix" in inputs:
            features["past_key_values"] = run_prefix(model, inputs["prefix"])
        if self.has_head and not isinstance(model, StepClassifier):
            logits = classifier_logits(model, features, markers)
        else:
            logits = model(**features, logits_to_keep=markers, use_cache="past_key_values" in features).logits
        if logits.ndim != 2:
            raise ValueError(
                f"expected logits at the {int(markers.sum())} markers only, got shape {tuple(logits.shape)}: this "
                "model's forward does not take a boolean `logits_to_keep` (transformers >= 5.21 native classes do)"
            )
        return logits[:, self.token_ids].float()


def batch_inputs(
    rendered: Sequence[Rendered], image_tensors: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Turn rendered rows into inputs of [`StepReader.read`]: right-padded tokens, images, and the `markers`."""
    tokens, markers = pad_batch(rendered, tokenizer)
    return {**image_tensors, **tokens, "markers": markers}


def good_minus_bad(logits: torch.Tensor) -> torch.Tensor:
    """Logit of P(step good), the first reward token's logit minus the second's, shape `(steps,)`."""
    return logits[:, 0] - logits[:, 1]


CONCENTRATION_AT_START = 4.0

CONCENTRATION_FLOOR = 1e-3


def concentration(logits: torch.Tensor) -> torch.Tensor:
    """
    How sure a model trained with `beta_binomial` is of its mean, in continuations: always above 0, and 4 at logit 0.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.models.reader import concentration
    >>> concentration(torch.tensor([0.0, 10.0]))
    tensor([ 4.0010, 57.7091])

    ```
    """
    return CONCENTRATION_AT_START * F.softplus(logits.float()) / math.log(2) + CONCENTRATION_FLOOR
