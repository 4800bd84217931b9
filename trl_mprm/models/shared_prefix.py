"""
Run the shared beginning of a question's solutions only once, in scoring and in training.

Sixteen solutions of one question begin alike, with the picture, the question and the template around them. The plain way
runs that prefix sixteen times. Here it runs once; then all solutions run side by side, each seeing the prefix and itself:

    prefix     [picture][question]                          P tokens, once
    solutions                     [A and C.<prm> So 2.<prm>]    R tokens each,
                                  [B is red.<prm>]              together
    tokens run: P + 16 R instead of 16 (P + R)

The keys and values of the prefix are kept once: each layer repeats them for every row, joined to those of the solutions,
while it runs, and forgets the result. Gradients flow back through them into the prefix.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..prompting.tokens import Rendered


class _Written(DynamicLayer):
    """Stores the keys and values of a prefix in one layer. Storing them twice does no harm, as checkpointing requires."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Read(DynamicLayer):
    """Provides the keys and values of a prefix to many rows, and stores none of theirs."""

    def __init__(self, written: _Written):
        super().__init__()
        self.written, self.is_initialized = written, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rows = key_states.shape[0]
        keys, values = (states.expand(rows, -1, -1, -1) for states in (self.written.keys, self.written.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.written.keys.shape[-2]


def can_share_prefix(model: torch.nn.Module) -> bool:
    """Whether every layer caches the past as keys and values (linear attention does not)."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_length(rows: Sequence[Rendered]) -> int:
    """
    Length of the prefix that all rows share, up to where the first step is read.

    Examples:
    ```python
    >>> from trl_mprm.prompting.tokens import Rendered
    >>> from trl_mprm.models.shared_prefix import shared_length
    >>> shared_length([Rendered([5, 6, 7, 9], [3], {}), Rendered([5, 6, 8, 8, 9], [4], {})])
    2

    ```
    """
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    limit = min(min(row.positions) for row in rows)
    return next((index for index in range(limit) if first[index] != last[index]), limit)


def prefix_inputs(row: Rendered, length: int, image_tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of [`run_prefix`]: the first `length` tokens of a row, and its images."""
    tokens = {"input_ids": row.input_ids, **row.token_types}
    return {**image_tensors, **{name: torch.tensor([values[:length]]) for name, values in tokens.items()}}


def suffix_inputs(rows: Sequence[Rendered], length: int) -> dict[str, torch.Tensor]:
    """
    The `input_ids` after the first `length` tokens, and `markers`, the positions to read, both `(rows, tokens)`.

    Padding is on the right, where causal attention never looks, so no attention mask is needed.
    """
    longest = max(len(row.input_ids) for row in rows) - length
    tokens = torch.tensor([(row.input_ids + row.input_ids[-1:] * longest)[length : length + longest] for row in rows])
    markers = torch.zeros(tokens.shape, dtype=torch.bool)
    for row_markers, row in zip(markers, rows, strict=True):
        row_markers[[position - length for position in row.positions]] = True
    return {"input_ids": tokens, "markers": markers}


def run_prefix(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Cache:
    """
    Run a prefix, and return its `past_key_values` for a forward pass over its continuations.

    Args:
        model (`torch.nn.Module`):
            Model, possibly wrapped.
        inputs (`dict[str, torch.Tensor]`):
            From [`prefix_inputs`], on the device of the model.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # checkpointing may run layers with either cache again
            module._can_checkpoint_with_cache = True
        # Qwen-VL models keep the position offset of their last image, and a prefix without images would inherit it.
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
    written = [_Written() for _ in DynamicCache(config=model.config).layers]
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    model(**inputs, logits_to_keep=nothing, past_key_values=Cache(layers=written), use_cache=True)
    return Cache(layers=[_Read(layer) for layer in written])
