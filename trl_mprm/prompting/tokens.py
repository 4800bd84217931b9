"""Rows as checked texts, pictures and tokens: what every layout needs."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.images import open_image
from ..data.rows import check_unicode


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

# What a processor returns with one value a token; every step token is plain text, type 0.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class Rendered(NamedTuple):
    """One row as tokens: ids, the position where each step is read, and one value a token by name (`TOKEN_TYPES`)."""

    input_ids: list[int]
    positions: list[int]
    token_types: dict[str, list[int]]


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def row_name(row: dict[str, Any], index: int) -> str:
    """Name a row in an error: its `rollout_id`, else its place in the batch."""
    return f"row {row['rollout_id']}" if row.get("rollout_id") else f"row {index} of the batch"


def images_of(row: dict[str, Any]) -> Sequence[Any]:
    images = row.get("images") or []
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise ValueError(f"`images` is one {type(images).__name__}, expected a list: write images=[image]")
    return images


def prompt_key(row: dict[str, Any]) -> tuple:
    """The same for rows with the same images and question; a picture in memory counts by its pixels."""
    return json.dumps(row["prompt"]), *(
        hashlib.sha256(open_image(image).tobytes()).hexdigest()
        if isinstance(image, Image.Image | dict)
        else str(image)
        for image in images_of(row)
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that no question may contain: one could forge an image, a turn or a marker."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    if not isinstance(prompt, str | list):
        raise ValueError(f"`prompt` is {prompt!r:.60}, expected the question, or a list of chat messages")
    return prompt if isinstance(prompt, str) else "\n".join(texts_of(prompt))


def check_prompt(prompt: str | list[dict[str, Any]], forbidden: Sequence[str]) -> None:
    """Raise `ValueError` where a question is not Unicode or contains one of the tokens `forbidden`."""
    text = prompt_text(prompt)
    check_unicode("the prompt", text)
    for token in forbidden:
        if token in text:
            raise ValueError(
                f"the prompt contains the special token {token!r}: remove it "
                "(images come from `images`, before the question)"
            )


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """All texts in a conversation, whether contents are text or lists of parts."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    texts = [part if isinstance(part, str) else part.get("text") for part in parts]
    return [text for text in texts if text is not None]  # a column of parts has `text: None` for an image


def encode_texts(
    texts: list[str], images: list[list[Image.Image]], processing_class: ProcessingClass, special: bool
) -> tuple[list[dict], dict]:
    """Tokenise `texts`, the placeholders in them expanded to the tokens of `images`."""
    prefixes: list[dict] = [{} for _ in texts]
    image_tensors: dict[str, torch.Tensor] = {}
    with_images = [index for index, row_images in enumerate(images) if row_images]
    text_only = [index for index, row_images in enumerate(images) if not row_images]
    if with_images:
        encoded = processing_class(
            text=[texts[index] for index in with_images],
            images=[images[index] for index in with_images],
            add_special_tokens=special,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        lengths = encoded.pop("attention_mask").sum(-1).tolist()
        for name in ("input_ids", *TOKEN_TYPES):
            if name in encoded:
                for index, values, length in zip(with_images, encoded.pop(name).tolist(), lengths, strict=True):
                    prefixes[index][name] = values[:length]
        image_tensors = dict(encoded)
    if text_only:
        tokenizer = tokenizer_of(processing_class)
        encoded = tokenizer([texts[index] for index in text_only], add_special_tokens=special)
        for index, ids in zip(text_only, encoded["input_ids"], strict=True):
            # Some tokenizers close plain text, before the steps have come.
            closed = special and ids[-1:] == [tokenizer.eos_token_id]
            prefixes[index]["input_ids"] = ids[:-1] if closed else ids
    return prefixes, image_tensors


@contextmanager
def errors_name_row(row: dict[str, Any], index: int) -> Iterator[None]:
    """Name the row in the errors raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row_name(row, index)}: {error}") from error


def joined(prefix: dict[str, list[int]], tokens: list[int], positions: list[int]) -> Rendered:
    start = len(prefix["input_ids"])
    types = {name: prefix[name] + [0] * len(tokens) for name in TOKEN_TYPES if name in prefix}
    return Rendered(prefix["input_ids"] + tokens, [start + position for position in positions], types)


def first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
