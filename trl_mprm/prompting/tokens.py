"""Turn rows into checked texts, pictures and tokens, for every layout."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.rows import check_unicode


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

# Outputs of a processor with one value per token; every step token is plain text, type 0.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class Rendered(NamedTuple):
    """One row as tokens: ids, the position where each step is read, and one value per token by name (`TOKEN_TYPES`)."""

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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that no question may contain: one could forge an image, a turn or a marker."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def conceal(texts: Sequence[str], tokens: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """
    Replace whatever looks like one of `tokens` by a private character, so that tokenising the whole text leaves it text.

    Returns:
        `tuple[list[str], dict[str, str]]`: the texts, and the meaning of each private character, for [`encode_text`].
    """
    found = [token for token in sorted(tokens, key=len, reverse=True) if any(token in text for text in texts)]
    if not found:
        return list(texts), {}
    used = set("".join(texts))
    private = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    hidden = {token: next(private) for token in found}
    pattern = re.compile("|".join(map(re.escape, found)))
    concealed = [pattern.sub(lambda match: hidden[match.group()], text) for text in texts]
    return concealed, {character: token for token, character in hidden.items()}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, hidden: dict[str, str]) -> list[int]:
    """
    Tokenise a whole text, where anything that [`conceal`] has hidden is text although it looks like a special token.

    Raises `ValueError` if this tokenizer does not tokenise the text between two special tokens separately.
    """
    if not any(character in text for character in hidden):
        return tokenizer.encode(text, add_special_tokens=False)
    bare = "".join(character for character in text if character not in hidden)
    if _encode_between(tokenizer, bare, {}) != tokenizer.encode(bare, add_special_tokens=False):
        token = next(token for character, token in hidden.items() if character in text)
        raise ValueError(f"a step contains the special token {token!r}, and this tokenizer cannot split it: remove it")
    return _encode_between(tokenizer, text, hidden)


def _encode_between(tokenizer: PreTrainedTokenizerBase, text: str, hidden: dict[str, str]) -> list[int]:
    special = sorted(special_tokens(tokenizer), key=len, reverse=True)
    ids: list[int] = []
    for number, piece in enumerate(re.split(f"({'|'.join(map(re.escape, special))})", text)):
        if number % 2:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            text = piece.translate(str.maketrans(hidden))
            ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=text != piece)
    return ids


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    if not isinstance(prompt, str | list):
        raise ValueError(f"`prompt` is {prompt!r:.60}, expected the question, or a list of chat messages")
    return prompt if isinstance(prompt, str) else "\n".join(texts_of(prompt))


def check_prompt(prompt: str | list[dict[str, Any]], forbidden: Sequence[str]) -> None:
    """
    Raise `ValueError` if a question is not Unicode or contains one of the tokens `forbidden`.

    Parts and messages are checked joined without separators, since a chat template may join them so. Roles and all other
    texts of a message are checked too, since a template may write them.
    """
    text = prompt_text(prompt)
    check_unicode("the prompt", text)
    texts = [text]
    if not isinstance(prompt, str):
        texts = ["".join(texts_of(prompt)), *(text for message in prompt for text in _strings(message))]
    for token in forbidden:
        if any(token in text for text in texts):
            raise ValueError(
                f"the prompt contains the special token {token!r}: remove it "
                "(images come from `images`, before the question)"
            )


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """All texts in a conversation, whether contents are text or lists of parts."""
    texts = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str | list):
            raise ValueError(f"message {number} is {message!r:.60}, expected a role, and text or parts as content")
        for part in [content] if isinstance(content, str) else content:
            text = part.get("text") if isinstance(part, dict) else part
            if text is not None and not isinstance(text, str):
                raise ValueError(f"message {number} has the part {part!r:.60}, expected text or an image")
            texts.append(text)
    return [text for text in texts if text is not None]  # a column of parts has `text: None` for an image


def _strings(value: object) -> Iterator[str]:
    """Every text within a message, at any depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def encode_texts(
    texts: list[str], images: list[list[Image.Image]], processing_class: ProcessingClass, special: bool
) -> tuple[list[dict], dict]:
    """Tokenise `texts` with their placeholders expanded to the tokens of `images`."""
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
            # Some tokenizers append an end token to plain text, which must not precede the steps.
            closed = special and ids[-1:] == [tokenizer.eos_token_id]
            prefixes[index]["input_ids"] = ids[:-1] if closed else ids
    return prefixes, image_tensors


@contextmanager
def errors_name_row(row: dict[str, Any], index: int) -> Iterator[None]:
    """Add the name of the row to errors raised inside."""
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
