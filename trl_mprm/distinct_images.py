"""
Encode a picture once, however often a batch shows it.

Four rollouts of one question in a batch show one picture four times. The vision encoder gets it once; its output is
handed to all four:

    pictures      A A A A B      encoded    A B      handed out    A A A A B

A picture is a row of `pixel_values`, or, where the encoder is told a grid for each picture (the Qwen-VL families), the
patches of one grid.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def encode_distinct_images(model: PreTrainedModel) -> None:
    """Let the vision encoder of `model` encode equal pictures of a batch once."""
    encoder = model.get_encoder("image")
    if not isinstance(encoder.forward, functools.partial):
        once = functools.partial(_forward_distinct, encoder.forward)
        encoder.forward = functools.update_wrapper(once, encoder.forward)


def _forward_distinct(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    name, pixels = ("", args[0]) if args else next(iter(kwargs.items()))
    others = dict(kwargs) if args else {key: value for key, value in kwargs.items() if key != name}
    grid = others.get("grid_thw")
    if len(args) > 1 or pixels.ndim < 2:
        return forward(*args, **kwargs)
    sizes = [1] * len(pixels) if grid is None else grid.prod(-1).tolist()
    # What else has a row a picture, as a mask of patches.
    aligned = {
        key: value for key, value in others.items() if isinstance(value, torch.Tensor) and len(value) == len(sizes)
    }
    parts = list(zip(pixels.split(sizes), *(value.split(1) for value in aligned.values()), strict=True))
    place, first = _places(parts)
    if len(first) == len(parts):
        return forward(*args, **kwargs)
    others |= {key: value[first] for key, value in aligned.items()}
    distinct = torch.cat([parts[index][0] for index in first])
    output = forward(distinct, **others) if args else forward(**{name: distinct}, **others)
    return _spread(output, [sizes[index] for index in first], place)


def _places(parts: list[tuple[torch.Tensor, ...]]) -> tuple[list[int], list[int]]:
    """For each part the number of its distinct one, and for each distinct one where it stands first."""
    sums = torch.stack([part[0].double().sum() for part in parts]).tolist()  # one wait for the device
    place, first = [], []
    for index, part in enumerate(parts):
        same = (
            number
            for number, other in enumerate(first)
            if sums[index] == sums[other] and all(map(torch.equal, part, parts[other]))
        )
        place.append(next(same, len(first)))
        if place[-1] == len(first):
            first.append(index)
    return place, first


def _spread(output: Any, sizes: Sequence[int], place: list[int]) -> Any:
    """Repeat the rows of each distinct picture in everything that the encoder returned."""
    if isinstance(output, torch.Tensor):
        shrink = sum(sizes) // len(output)  # an encoder may merge patches
        rows = output.split([size // shrink for size in sizes])
        return torch.cat([rows[number] for number in place])
    if isinstance(output, dict):
        return type(output)({key: _spread(value, sizes, place) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)([_spread(value, sizes, place) for value in output])
    return output
