"""
Score solutions of one question in one pass over what they share.

Sixteen solutions of one question begin alike: picture, question, and all that stands around them. The plain way runs
that prefix sixteen times. Here it runs once; then all solutions run side by side, each seeing the prefix and itself:

    prefix     [picture][question]                          P tokens, once
    solutions                     [A and C.<prm> So 2.<prm>]    R tokens each,
                                  [B is red.<prm>]              together
    tokens run: P + 16 R instead of 16 (P + R)

The keys and values of the prefix are neither copied nor repeated: each layer joins them to those of the solutions
while it runs, and forgets the result.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .modeling import step_logits
from .rendering import Rendered


class _PrefixLayer(DynamicLayer):
    """The keys and values of a prefix in one layer, read by many rows and changed by none."""

    def __init__(self, prefix: DynamicLayer):
        super().__init__()
        self.prefix, self.is_sliding, self.is_initialized = prefix, prefix.is_sliding, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rows = key_states.shape[0]
        keys, values = (states.expand(rows, -1, -1, -1) for states in (self.prefix.keys, self.prefix.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.prefix.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix.get_mask_sizes(query_length)


def can_share_prefix(model: torch.nn.Module) -> bool:
    """Whether every layer keeps its past as keys and values (linear attention does not)."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def shared_length(rows: Sequence[Rendered]) -> int:
    """
    Tokens that all rows begin with, and in which no step is read.

    Examples:
    ```python
    >>> from trl_mprm.rendering import Rendered
    >>> from trl_mprm.shared_prefix import shared_length
    >>> shared_length([Rendered([5, 6, 7, 9], [3], {}), Rendered([5, 6, 8, 8, 9], [4], {})])
    2

    ```
    """
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    limit = min(min(row.positions) for row in rows)
    return next((index for index in range(limit) if first[index] != last[index]), limit)


def shared_prefix_logits(
    model: torch.nn.Module,
    rows: Sequence[Rendered],
    image_tensors: dict[str, torch.Tensor],
    good_id: int,
    bad_id: int,
    max_batch_tokens: int,
) -> list[torch.Tensor]:
    """
    Logit of P(step good) at each position of each row, the prefix that the rows share computed once.

    Args:
        model (`torch.nn.Module`):
            Model in evaluation mode.
        rows (`Sequence[Rendered]`):
            Rows that begin with the same images and at least one more token.
        image_tensors (`dict[str, torch.Tensor]`):
            The images of one row, as the processor returns them.
        good_id, bad_id (`int`):
            Token ids of the two reward tokens.
        max_batch_tokens (`int`):
            Tokens a forward holds at most, padding included, the prefix not; a longer row runs alone.

    Returns:
        `list[torch.Tensor]`: `logit(good) - logit(bad)` in float32, one tensor a row, one number a step.
    """
    length = shared_length(rows)
    # Qwen-VL models keep the offset of their last image's positions; a prefix without image would inherit it.
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
    cache = DynamicCache(config=model.config)
    first = rows[0]
    inputs = {name: tensor.to(model.device) for name, tensor in image_tensors.items()}
    for name, values in {"input_ids": first.input_ids, **first.token_types}.items():
        inputs[name] = torch.tensor([values[:length]], device=model.device)
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    model(**inputs, logits_to_keep=nothing, past_key_values=cache, use_cache=True)
    prefix = Cache(layers=[_PrefixLayer(layer) for layer in cache.layers])

    logits: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    while order:
        longest = len(rows[order[-1]].input_ids) - length
        chunk = order[-max(1, max_batch_tokens // longest) :]
        order = order[: -len(chunk)]
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        tokens = torch.zeros(len(chunk), longest, dtype=torch.long)
        markers = torch.zeros(len(chunk), longest, dtype=torch.bool)
        for place, index in enumerate(chunk):
            ids, positions = rows[index].input_ids[length:], rows[index].positions
            tokens[place] = torch.tensor(ids + ids[-1:] * (longest - len(ids)))
            markers[place, [position - length for position in positions]] = True
        inputs = {"input_ids": tokens.to(model.device), "past_key_values": prefix}
        flat = step_logits(model, inputs, markers.to(model.device), good_id, bad_id)
        for index, part in zip(chunk, flat.split(markers.sum(1).tolist()), strict=True):
            logits[index] = part
    return logits
