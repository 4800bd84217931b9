"""
The one rendering of a question and its steps, used by training, scoring, evaluation and docs.

The user turn holds the images, then the question, in the model's own chat template. The assistant turn holds
`{step}<prm>` joined by a blank line. Image and question are therefore a prefix that all candidates share:

    <|im_start|>user\\n<|vision_start|>[image]<|vision_end|>How many tiles are red?<|im_end|>\\n<|im_start|>assistant\\n
    The red tiles are A and C.<prm>\\n\\nSo the answer is 2.<prm>

Every piece is tokenised alone and the marker is inserted as a token id: joining text first and tokenising after
lets the separator melt into its neighbours (QwenLM/ProcessBench pull request 12).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from .files import write_json


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
# What a processor returns with one value a token; every step token is plain text, type 0.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")


class StepIds(NamedTuple):
    """Token ids of a [`StepFormat`] in one tokenizer."""

    marker: int
    good: int
    bad: int
    joiner: list[int]


@dataclass(frozen=True)
class StepFormat:
    """
    What stands after and between steps, and which two tokens tell good from bad; saved beside the weights.

    Args:
        marker (`str`, *optional*, defaults to `"<prm>"`):
            Token after every step. The reward of a step is read at this position.
        reward_tokens (`tuple[str, str]`, *optional*, defaults to `("Yes", "No")`):
            Tokens for a good and a bad step. P(step good) is the softmax over their two logits.
        joiner (`str`, *optional*, defaults to a blank line):
            Text between one marker and the next step.
    """

    marker: str = "<prm>"
    reward_tokens: tuple[str, str] = ("Yes", "No")
    joiner: str = "\n\n"

    FILE_NAME = "process_reward_config.json"

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> StepIds:
        """Look the tokens up. Raises `ValueError` where the tokenizer lacks the marker or splits a reward token."""
        marker = tokenizer.convert_tokens_to_ids(self.marker)
        if marker is None or marker == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no marker token {self.marker!r}: train with ProcessRewardTrainer first, "
                "or name a marker that the tokenizer has"
            )
        reward = [tokenizer.encode(token, add_special_tokens=False) for token in self.reward_tokens]
        for token, ids in zip(self.reward_tokens, reward, strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"reward token {token!r} is {len(ids)} tokens of this tokenizer ({ids}), expected one it knows: "
                    "set reward_tokens to two words that are one token each"
                )
        if reward[0] == reward[1]:
            raise ValueError(f"reward_tokens is {self.reward_tokens}, expected two different tokens")
        joiner = tokenizer.encode(self.joiner, add_special_tokens=False)
        return StepIds(marker, reward[0][0], reward[1][0], joiner)

    def save(self, folder: str | os.PathLike) -> None:
        write_json(asdict(self), Path(folder) / self.FILE_NAME)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "StepFormat":
        """Read the format of a trained checkpoint. Raises `FileNotFoundError` where it is none of ours."""
        path = Path(folder) / cls.FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {cls.FILE_NAME}: expected a checkpoint saved by ProcessRewardTrainer"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(values["marker"], tuple(values["reward_tokens"]), values["joiner"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected marker, reward_tokens and joiner ({error!r}): save it again"
            ) from error


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def row_name(row: dict[str, Any], index: int) -> str:
    """Name a row in an error: its `rollout_id`, else its place in the batch."""
    return f"row {row['rollout_id']}" if row.get("rollout_id") else f"row {index} of the batch"


def render_prefix_text(row: dict[str, Any], processing_class: ProcessingClass) -> str:
    """
    Render images (as placeholders) and question of `row` up to where the assistant begins.

    A text-only tokenizer without chat template gets the question as plain text and a blank line.
    """
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(processing_class, ProcessorMixin):
        images = row.get("images") or []
        if not isinstance(images, Sequence) or isinstance(images, str):
            raise ValueError(f"`images` is one {type(images).__name__}, expected a list: write images=[image]")
        messages = prepare_multimodal_messages(messages, images)
    elif row.get("images"):
        raise ValueError(
            f"{len(row['images'])} images came with a text-only model: use a vision-language model, "
            "or remove the `images` column"
        )
    if processing_class.chat_template is None:
        return "\n".join(_texts(messages)) + "\n\n"
    return processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that no question may contain: one could forge an image, a turn or a marker."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def check_prompt(prompt: str | list[dict[str, Any]], forbidden: Sequence[str]) -> None:
    """Raise `ValueError` where a question contains one of the tokens `forbidden`."""
    text = prompt if isinstance(prompt, str) else "\n".join(_texts(prompt))
    for token in forbidden:
        if token in text:
            raise ValueError(
                f"the prompt contains the special token {token!r}: remove it "
                "(images come from `images`, before the question)"
            )


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    contents = [message["content"] for message in messages]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    return [
        part if isinstance(part, str) else part["text"] for part in parts if isinstance(part, str) or "text" in part
    ]


def open_image(image: Image.Image | str | os.PathLike) -> Image.Image:
    """Open a path, or take an image as it is, in RGB. Raises `ValueError` where the file is not a whole image."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return Image.open(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {image}: {error}") from error


def render_prefixes(rows: Sequence[dict[str, Any]], processing_class: ProcessingClass) -> tuple[list[dict], dict]:
    """
    Tokenise the shared prefix (images and question) of every row.

    Returns:
        `tuple[list[dict], dict]`: one dict a row with `input_ids` (`list[int]`, image placeholders expanded) and, where
        the processor has them, its `TOKEN_TYPES`; and the image tensors of the whole batch, in row order.
    """
    forbidden = special_tokens(tokenizer_of(processing_class))
    texts, images = [], []
    for index, row in enumerate(rows):
        try:
            check_prompt(row["prompt"], forbidden)
            texts.append(render_prefix_text(row, processing_class))
            images.append([open_image(image) for image in row.get("images") or []])
        except ValueError as error:
            raise ValueError(f"{row_name(row, index)}: {error}") from error
    prefixes: list[dict] = [{} for _ in rows]
    image_tensors: dict[str, torch.Tensor] = {}
    with_images = [index for index, row_images in enumerate(images) if row_images]
    text_only = [index for index, row_images in enumerate(images) if not row_images]
    # A chat template writes the tokenizer's own first token; plain text needs it added.
    special = processing_class.chat_template is None
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


def render_steps(
    completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: StepIds
) -> tuple[list[int], list[int]]:
    """
    Tokenise the steps of one rollout, a marker after each.

    Text that looks like a special token (`<prm>`, `<|im_end|>`) stays text: a rollout cannot forge a marker.

    Returns:
        `tuple[list[int], list[int]]`: token ids of the assistant turn, and the position of each step's marker in them.
    """
    for number, step in enumerate(completions):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"step {number} is {step!r}, expected text: remove the empty step and its label")
    if not completions:
        raise ValueError("`completions` is empty, expected at least one step: remove the row")
    encoded = tokenizer(list(completions), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens: list[int] = []
    positions: list[int] = []
    for number, step_ids in enumerate(encoded):
        if ids.marker in step_ids:
            raise ValueError(f"step {number} contains the marker: remove it from the text, it is inserted as a token")
        tokens += (ids.joiner if number else []) + step_ids + [ids.marker]
        positions.append(len(tokens) - 1)
    return tokens, positions


def render_batch(
    rows: Sequence[dict[str, Any]], processing_class: ProcessingClass, step_format: StepFormat
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Render rows into what a model's `forward` takes, padded on the right, and the mask of the markers.

    Args:
        rows (`Sequence[dict]`):
            Rows with `prompt`, `completions` and, for a vision-language model, `images`.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            The model's processor or tokenizer.
        step_format (`StepFormat`):
            Marker, reward tokens and joiner.

    Returns:
        `tuple[dict[str, torch.Tensor], torch.Tensor]`: model inputs (`input_ids` and `attention_mask` of shape
        `(rows, tokens)`, image tensors), and a bool mask `(rows, tokens)`, True at each marker. Its True entries, read
        row by row, are the steps in order.

    Raises:
        `ValueError`: with the name of the row, for an empty step, an image with a text-only model, or a special token
        in the prompt.
    """
    tokenizer = tokenizer_of(processing_class)
    ids = step_format.ids(tokenizer)
    prefixes, batch = render_prefixes(rows, processing_class)
    sequences, positions = [], []
    for index, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        try:
            step_tokens, step_positions = render_steps(row["completions"], tokenizer, ids)
        except ValueError as error:
            raise ValueError(f"{row_name(row, index)}: {error}") from error
        positions.append([len(prefix["input_ids"]) + position for position in step_positions])
        sequences.append(prefix["input_ids"] + step_tokens)
    length = max(map(len, sequences))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch["input_ids"] = torch.tensor([sequence + [pad] * (length - len(sequence)) for sequence in sequences])
    batch["attention_mask"] = torch.tensor(
        [[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in sequences]
    )
    for name in TOKEN_TYPES:
        if any(name in prefix for prefix in prefixes):
            types = [prefix.get(name, []) for prefix in prefixes]
            batch[name] = torch.tensor([values + [0] * (length - len(values)) for values in types])
    markers = torch.zeros(len(rows), length, dtype=torch.bool)
    for row_markers, row_positions in zip(markers, positions, strict=True):
        row_markers[row_positions] = True
    return batch, markers
