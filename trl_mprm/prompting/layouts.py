"""The layouts of published checkpoints, as tokens."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import ProcessorMixin

from ..data.images import open_image
from ..data.rows import check_steps
from .step_format import StepFormat
from .tokens import (
    ProcessingClass,
    Rendered,
    check_prompt,
    encode_texts,
    errors_name_row,
    first_token,
    images_of,
    joined,
    prompt_text,
    row_name,
    special_tokens,
    tokenizer_of,
)


# ---- layouts of published checkpoints


def conversation_text(
    row: dict[str, Any], processing_class: ProcessingClass, step_format: StepFormat
) -> tuple[str, list[int]]:
    """
    Lay out a row as a published checkpoint was trained on it: question and steps in one text.

    Returns:
        `tuple[str, list[int]]`: the text, with the processor's placeholder for each image, and for each step the
        length of the text up to where it is read.

    Raises:
        `ValueError`: for an empty step, a special token in question or step, or images with a text-only model.
    """
    tokenizer = tokenizer_of(processing_class)
    check_steps(row["completions"])
    forbidden = special_tokens(tokenizer)
    check_prompt(row["prompt"], forbidden)
    for number, step in enumerate(row["completions"]):
        found = [token for token in forbidden if token in step]
        if found:
            raise ValueError(f"step {number} contains the special token {found[0]!r}: remove it")
    marked = [step + step_format.marker for step in row["completions"]]
    steps = step_format.joiner.join(marked)
    images = len(images_of(row))
    if images and not isinstance(processing_class, ProcessorMixin):
        raise ValueError(f"{images} images came with a text-only model: remove the `images` column")
    if images and not step_format.reads_images:
        raise ValueError(f"{images} images came with a format that reads no images: remove the `images` column")
    placeholder = _image_placeholder(processing_class) if images else ""
    values = {
        "<image>\n": (placeholder + "\n") * images,
        "<image>": placeholder * images,
        "{question}": prompt_text(row["prompt"]),
        "{steps}": steps,
        "{step}": row["completions"][0],
    }
    fields = re.compile("|".join(map(re.escape, values)))
    messages = [
        (role, fields.sub(lambda match: values[match.group()], template)) for role, template in step_format.messages
    ]
    if step_format.answer is not None:
        return _turns_text(messages, row["completions"], processing_class, step_format.answer)
    if not messages[0][0]:
        text = "".join(content for _, content in messages)
    else:
        text = _chat_text(messages, processing_class, open_answer=False)
    start = text.rfind(steps)
    if start < 0:
        raise ValueError(
            "the chat template of this model changes the text of the steps: strip white space around them"
        )
    lengths = [len(step) + len(step_format.joiner) for step in marked]
    return text, [start + sum(lengths[: number + 1]) - len(step_format.joiner) for number in range(len(marked))]


def _turns_text(
    messages: list[tuple[str, str]], steps: Sequence[str], processing_class: ProcessingClass, answer: str
) -> tuple[str, list[int]]:
    text, ends = "", []
    for number, step in enumerate(steps):
        if number:
            messages = [*messages, ("assistant", answer), ("user", step)]
        longer = _chat_text(messages, processing_class, open_answer=True)
        if not longer.startswith(text + answer * bool(number)):
            raise ValueError("the chat template of this model rewrites earlier turns, expected one that only appends")
        text = longer
        ends.append(len(text))
    return text, ends


def _chat_text(messages: list[tuple[str, str]], processing_class: ProcessingClass, open_answer: bool) -> str:
    if processing_class.chat_template is None:
        raise ValueError("this format is a conversation, and the tokenizer has no chat template: save one with it")
    parts = isinstance(processing_class, ProcessorMixin)
    chat = [
        {"role": role, "content": [{"type": "text", "text": content}] if parts else content}
        for role, content in messages
    ]
    return processing_class.apply_chat_template(chat, tokenize=False, add_generation_prompt=open_answer)


def _image_placeholder(processor: ProcessorMixin) -> str:
    """What the chat template writes for an image, as `<|vision_start|><|image_pad|><|vision_end|>`."""
    text = {"type": "text", "text": "?"}
    without, with_image = (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ([text], [{"type": "image"}, text])
    )
    start = without.index("?")
    return with_image[start : with_image.index("?", start)].rstrip("\n")


def render_plain_prefixes(
    rows: Sequence[dict[str, Any]], processing_class: ProcessingClass, messages: tuple[tuple[str, str], ...]
) -> list[dict]:
    tokenizer = tokenizer_of(processing_class)
    prefixes = []
    for index, row in enumerate(rows):
        with errors_name_row(row, index):
            check_prompt(row["prompt"], special_tokens(tokenizer))
            if images_of(row):
                raise ValueError("images came with a format that reads no images: remove the `images` column")
        text = "".join(text for _, text in messages).replace("{question}", prompt_text(row["prompt"]))
        prefixes.append({"input_ids": first_token(tokenizer) + tokenizer.encode(text, add_special_tokens=False)})
    return prefixes


def render_texts(
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[dict[str, Any]],
    processing_class: ProcessingClass,
    step_format: StepFormat,
) -> tuple[list[Rendered], dict[str, torch.Tensor]]:
    """
    Tokenise whole texts, as these checkpoints were trained, and find the token where each step is read.

    With images, the processor sees the text up to the last image only; `prompts` are the rows whose images are read,
    all of them or the first for all.
    """
    tokenizer = tokenizer_of(processing_class)
    texts, cuts, ends = [], [], []
    for index, row in enumerate(rows):
        with errors_name_row(row, index):
            text, row_ends = conversation_text(row, processing_class, step_format)
        token = processing_class.image_token if images_of(row) else ""
        texts.append(text)
        cuts.append(text.rindex(token) + len(token) if token else 0)
        ends.append(row_ends)
    images = []
    for index, row in enumerate(prompts):
        with errors_name_row(row, index):
            images.append([open_image(image) for image in images_of(row)])
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)][: len(prompts)]
    with errors_name_row(prompts[0], 0) if len(prompts) == 1 else nullcontext():
        prefixes, image_tensors = encode_texts(heads, images, processing_class, special=False)
    plain = not step_format.messages[0][0]
    rendered = []
    for index, (row, text, cut, row_ends) in enumerate(zip(rows, texts, cuts, ends, strict=True)):
        # The last image token goes before the rest again: some tokenizers treat the beginning of a text in its own way.
        token = processing_class.image_token if cut else ""

        def tokens(end: int | None, token: str = token, text: str = text, cut: int = cut) -> list[int]:
            return tokenizer.encode(token + text[cut:end], add_special_tokens=False)[bool(token) :]

        first = first_token(tokenizer) if plain else []
        rest = first + tokens(None)
        positions = []
        for number, end in enumerate(row_ends):
            part = first + tokens(end)
            if rest[: len(part)] != part:
                raise ValueError(
                    f"{row_name(row, index)}: the marker of step {number} melts into its neighbours in this "
                    "tokenizer: is this the format of this checkpoint?"
                )
            positions.append(len(part) - 1)
        rendered.append(joined(prefixes[min(index, len(prompts) - 1)], rest, positions))
    return rendered, image_tensors
