"""
Render a question and its steps; training, scoring, evaluation and docs all use this module.

The user turn holds the images, then the question, in the model's own chat template. The assistant turn holds the steps
as `{step}<prm>`, joined by blank lines. Image and question are thus a prefix that all candidates share:

    <|im_start|>user\\n<|vision_start|>[image]<|vision_end|>How many tiles are red?<|im_end|>\\n<|im_start|>assistant\\n
    The red tiles are A and C.<prm>\\n\\nSo the answer is 2.<prm>

Every piece is tokenised alone and the marker is inserted as a token id, because tokenising the joined text may merge the
separator into its neighbours (QwenLM/ProcessBench pull request 12).

Published checkpoints were trained on other layouts; each is a [`StepFormat`] too, see [`published`].
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from ..data.images import open_image
from ..data.rows import check_steps
from .layouts import render_plain_prefixes, render_texts
from .step_format import StepFormat, StepIds
from .tokens import (
    TOKEN_TYPES,
    ProcessingClass,
    Rendered,
    check_prompt,
    encode_texts,
    errors_name_row,
    images_of,
    joined,
    row_name,
    special_tokens,
    texts_of,
    tokenizer_of,
)


def render_prefix_text(row: dict[str, Any], processing_class: ProcessingClass) -> str:
    """
    Render images (as placeholders) and question of `row` up to where the assistant begins.

    For a text-only tokenizer without a chat template the question is plain text followed by a blank line.
    """
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(processing_class, ProcessorMixin):
        try:
            messages = prepare_multimodal_messages(messages, images_of(row))
        except ValueError as error:  # TRL counts the images
            raise ValueError(
                f"{str(error).rstrip('.')}: give `images` one picture for each image in `prompt`, "
                "or write `prompt` as text"
            ) from error
    elif images_of(row):
        raise ValueError(
            f"{len(row['images'])} images came with a text-only model: use a vision-language model, "
            "or remove the `images` column"
        )
    if processing_class.chat_template is None:
        return "\n".join(texts_of(messages)) + "\n\n"
    return processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def render_prefixes(rows: Sequence[dict[str, Any]], processing_class: ProcessingClass) -> tuple[list[dict], dict]:
    """
    Tokenise the shared prefix (images and question) of every row.

    Returns:
        `tuple[list[dict], dict]`: one dict per row with `input_ids` (`list[int]`, image placeholders expanded) and, if
        the processor has them, its `TOKEN_TYPES`; and the image tensors of the whole batch, in row order.
    """
    forbidden = special_tokens(tokenizer_of(processing_class))
    texts, images = [], []
    for index, row in enumerate(rows):
        with errors_name_row(row, index):
            check_prompt(row["prompt"], forbidden)
            texts.append(render_prefix_text(row, processing_class))
            images.append([open_image(image) for image in images_of(row)])
    # A chat template writes the tokenizer's own first token; plain text needs it added.
    with errors_name_row(rows[0], 0) if len(rows) == 1 else nullcontext():  # a picture that the processor refuses
        return encode_texts(texts, images, processing_class, special=processing_class.chat_template is None)


def render_steps(
    completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: StepIds
) -> tuple[list[int], list[int]]:
    """
    Tokenise the steps of one rollout, with a marker after each.

    Text that looks like a special token (`<prm>`, `<|im_end|>`) stays text: a rollout cannot forge a marker.

    Returns:
        `tuple[list[int], list[int]]`: token ids of the assistant turn, and the position of each step's marker in them.
    """
    check_steps(completions)
    encoded = tokenizer(list(completions), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens: list[int] = []
    positions: list[int] = []
    for number, step_ids in enumerate(encoded):
        if ids.marker[-1] in step_ids and ids.marker[-1] in tokenizer.added_tokens_decoder:
            raise ValueError(f"step {number} contains the marker: remove it from the text, it is inserted as a token")
        tokens += (ids.joiner if number else []) + step_ids + ids.marker
        positions.append(len(tokens) - 1)
    return tokens, positions


def render_rows(
    rows: Sequence[dict[str, Any]],
    processing_class: ProcessingClass,
    step_format: StepFormat,
    same_prompt: bool = False,
) -> tuple[list[Rendered], dict[str, torch.Tensor]]:
    """
    Render rows into tokens, and their images into tensors.

    With `same_prompt` all rows share the images and question of the first, which are rendered only once; the image
    tensors are those of one row.
    """
    tokenizer = tokenizer_of(processing_class)
    ids = step_format.ids(tokenizer)
    prompts = rows[:1] if same_prompt else rows
    messages = step_format.messages
    if messages is not None and any("{step" in text for _, text in messages):
        rendered, image_tensors = render_texts(rows, prompts, processing_class, step_format)
    else:
        if messages is None:
            prefixes, image_tensors = render_prefixes(prompts, processing_class)
        else:
            prefixes, image_tensors = render_plain_prefixes(prompts, processing_class, step_format), {}
        rendered = []
        for index, row in enumerate(rows):
            prefix = prefixes[0 if same_prompt else index]
            with errors_name_row(row, index):
                tokens, positions = render_steps(row["completions"], tokenizer, ids)
            rendered.append(joined(prefix, tokens, positions))
    if len(ids.marker) == 1 and ids.marker[0] in tokenizer.added_tokens_decoder:
        for index, (row, tokens) in enumerate(zip(rows, rendered, strict=True)):
            if (found := tokens.input_ids.count(ids.marker[0])) != len(tokens.positions):
                raise ValueError(
                    f"{row_name(row, index)}: {found} markers came out for {len(tokens.positions)} steps: the question "
                    f"or the chat template writes {step_format.marker!r}, remove it there"
                )
    return rendered, image_tensors


def pad_batch(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stack rows of tokens, padded on the right, and the mask of the positions that are read."""
    length = max(len(row.input_ids) for row in rendered)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    batch = {
        "input_ids": torch.tensor([row.input_ids + [pad] * (length - len(row.input_ids)) for row in rendered]),
        "attention_mask": torch.tensor(
            [[1] * len(row.input_ids) + [0] * (length - len(row.input_ids)) for row in rendered]
        ),
    }
    for name in TOKEN_TYPES:
        if any(name in row.token_types for row in rendered):
            types = [row.token_types.get(name, []) for row in rendered]
            batch[name] = torch.tensor([values + [0] * (length - len(values)) for values in types])
    markers = torch.zeros(len(rendered), length, dtype=torch.bool)
    for row_markers, row in zip(markers, rendered, strict=True):
        row_markers[row.positions] = True
    return batch, markers


def render_batch(
    rows: Sequence[dict[str, Any]], processing_class: ProcessingClass, step_format: StepFormat
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Render rows into right-padded inputs for a model's `forward`, and the mask of the markers.

    Args:
        rows (`Sequence[dict]`):
            Rows with `prompt`, `completions` and, for a vision-language model, `images`.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`):
            The model's processor or tokenizer.
        step_format (`StepFormat`):
            Layout, marker, reward tokens and joiner.

    Returns:
        `tuple[dict[str, torch.Tensor], torch.Tensor]`: model inputs (`input_ids` and `attention_mask` of shape
        `(rows, tokens)`, image tensors), and a bool mask `(rows, tokens)`, True at each marker. Its True entries, read
        row by row, are the steps in order.

    Raises:
        `ValueError`: an empty step, an image with a text-only model, or a special token in the prompt; the message names
        the row.
    """
    rendered, image_tensors = render_rows(rows, processing_class, step_format)
    batch, markers = pad_batch(rendered, tokenizer_of(processing_class))
    return image_tensors | batch, markers
