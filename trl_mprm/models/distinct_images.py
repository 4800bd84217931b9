"""
Encode a picture once, however often a batch shows it.

Four rollouts of one question in a batch show one picture four times. The vision encoder sees it once, and all four
rollouts get its output:

    pictures      A A A A B      encoded    A B      handed out    A A A A B

A picture is a row of `pixel_values` or, where the encoder takes one grid per picture (the Qwen-VL families), the patches
of one grid. With `share_prefix` the encoder is called once per question of the batch:

    first call    A B    encoded    A B      second call    A C    encoded    C      handed out    A C
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel


class _Encoded(NamedTuple):
    """Distinct pictures, their numbers of rows, and the encoder's output for all of them."""

    pictures: list[tuple[torch.Tensor, ...]]
    sizes: list[int]
    output: Any


def encode_distinct_images(model: PreTrainedModel) -> None:
    """Make the vision encoder of `model` encode equal pictures of a batch only once."""
    encoder = model.get_encoder("image")
    if not isinstance(encoder.forward, functools.partial):
        once = functools.partial(_forward_distinct, encoder.forward)
        encoder.forward = functools.update_wrapper(once, encoder.forward)


@contextmanager
def encoded_once(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context, later calls of the encoder reuse pictures of earlier ones ([`encode_distinct_images`])."""
    encoder = model.get_encoder("image")
    once = encoder.forward
    encoder.forward = functools.update_wrapper(functools.partial(once, seen={}), once)
    try:
        yield
    finally:
        encoder.forward = once


def _forward_distinct(
    forward: Callable, *args: Any, seen: dict[tuple[torch.Size, ...], _Encoded] | None = None, **kwargs: Any
) -> Any:
    name, pixels = ("", args[0]) if args else next(iter(kwargs.items()))
    others = dict(kwargs) if args else {key: value for key, value in kwargs.items() if key != name}
    grid = others.get("grid_thw")
    if len(args) > 1 or pixels.ndim < 2:
        return forward(*args, **kwargs)
    sizes = [1] * len(pixels) if grid is None else grid.prod(-1).tolist()
    # Other arguments with one row per picture, such as a mask of patches.
    aligned = {
        key: value for key, value in others.items() if isinstance(value, torch.Tensor) and len(value) == len(sizes)
    }
    parts = list(zip(pixels.split(sizes), *(value.split(1) for value in aligned.values()), strict=True))
    shape = tuple(part.shape[1:] for part in parts[0])  # outputs of other shapes cannot be joined
    before = (seen or {}).get(shape, _Encoded([], [], None))
    place, first = _places(before.pictures + parts)
    n_before, place = len(before.pictures), place[len(before.pictures) :]
    new = [index - n_before for index in first[n_before:]]
    if len(new) == len(parts):
        output = forward(*args, **kwargs)
    elif new:
        others |= {key: value[new] for key, value in aligned.items()}
        distinct = torch.cat([parts[index][0] for index in new])
        output = forward(distinct, **others) if args else forward(**{name: distinct}, **others)
    if n_before:
        output = _joined(before.output, output) if new else before.output
    sizes = before.sizes + [sizes[index] for index in new]
    if seen is not None:
        seen[shape] = _Encoded(before.pictures + [parts[index] for index in new], sizes, output)
    whole = seen is None and len(new) == len(parts)  # a kept output is not handed out: models write into it
    return output if whole else _spread(output, sizes, place)


def _places(parts: list[tuple[torch.Tensor, ...]]) -> tuple[list[int], list[int]]:
    """For each part the index of its distinct value, and for each distinct value the place of its first part."""
    sums = torch.stack([part[0].double().sum() for part in parts]).tolist()  # synchronises with the device once
    place: list[int] = []
    first: list[int] = []
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


def _joined(first: Any, second: Any) -> Any:
    """Join the outputs of two calls into what the encoder would have returned for all the pictures at once."""
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return type(first)({key: _joined(first[key], second[key]) for key in first})
    if isinstance(first, list | tuple):
        return type(first)([_joined(*pair) for pair in zip(first, second, strict=True)])
    return first


def _spread(output: Any, sizes: Sequence[int], place: list[int]) -> Any:
    """Repeat the rows of each distinct picture throughout the encoder's output."""
    if isinstance(output, torch.Tensor):
        shrink = sum(sizes) // len(output)  # an encoder may merge patches
        rows = output.split([size // shrink for size in sizes])
        return torch.cat([rows[number] for number in place])
    if isinstance(output, dict):
        return type(output)({key: _spread(value, sizes, place) for key, value in output.items()})
    if isinstance(output, list | tuple):
        return type(output)([_spread(value, sizes, place) for value in output])
    return output
