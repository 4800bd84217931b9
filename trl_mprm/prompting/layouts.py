"""Render rows into tokens in the layouts of published checkpoints."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.images import open_image
from ..data.rows import check_steps
from .step_format import StepFormat, forbidden_tokens
from .tokens import (
    ProcessingClass,
    Rendered,
    check_prompt,
    conceal,
    encode_text,
    encode_texts,
    errors_name_row,
    first_token,
    images_of,
    joined,
    prompt_text,
    special_tokens,
    tokenizer_of,
)


# ---- layouts of published checkpoints


def conversation_text(
    row: dict[str, Any], processing_class: ProcessingClass, step_format: StepFormat
) -> tuple[str, list[int], dict[str, str]]:
    """
    Lay out question and steps of a row as one text, in the form on which a published checkpoint was trained.

    Returns:
        `tuple[str, list[int], dict[str, str]]`: the text, with the processor's placeholder for each image; for each
        step the length of the text up to where it is read; and the private characters that stand in it for what looks
        like a special token within a step, see [`~tokens.conceal`].

    Raises:
        `ValueError`: for an empty step, a special token in the question, or images with a text-only model.
    """
    tokenizer = tokenizer_of(processing_class)
    check_steps(row["completions"])
    forbidden = special_tokens(tokenizer)
    check_prompt(row["prompt"], forbidden)
    completions, hidden = conceal(row["completions"], forbidden)
    if step_format.marker.startswith(" "):
        # Blanks before this marker would merge with its own into a token that was not trained and its authors do not find.
        completions = [step.rstrip(" ") for step in completions]
    marked = [step + step_format.marker for step in completions]
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
        "{step}": completions[0],
    }
    fields = re.compile("|".join(map(re.escape, values)))
    messages = [
        (role, fields.sub(lambda match: values[match.group()], template)) for role, template in step_format.messages
    ]
    if step_format.answer is not None:
        return *_turns_text(messages, completions, processing_class, step_format.answer), hidden
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
    ends = [start + sum(lengths[: number + 1]) - len(step_format.joiner) for number in range(len(marked))]
    return text, ends, hidden


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
    """The text that the chat template writes for an image, e.g. `<|vision_start|><|image_pad|><|vision_end|>`."""
    text = {"type": "text", "text": "?"}
    without, with_image = (
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ([text], [{"type": "image"}, text])
    )
    start = without.index("?")
    return with_image[start : with_image.index("?", start)].rstrip("\n")


def render_plain_prefixes(
    rows: Sequence[dict[str, Any]], processing_class: ProcessingClass, step_format: StepFormat
) -> list[dict]:
    tokenizer = tokenizer_of(processing_class)
    prefixes = []
    for index, row in enumerate(rows):
        with errors_name_row(row, index):
            check_prompt(row["prompt"], forbidden_tokens(tokenizer, step_format))
            if images_of(row):
                raise ValueError("images came with a format that reads no images: remove the `images` column")
        text = "".join(text for _, text in step_format.messages).replace("{question}", prompt_text(row["prompt"]))
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

    With images, the processor sees the text up to the last image only; `prompts` are the rows whose images are read:
    all rows, or the first one if all share its images.
    """
    tokenizer = tokenizer_of(processing_class)
    texts, cuts, ends, concealed = [], [], [], []
    for index, row in enumerate(rows):
        with errors_name_row(row, index):
            text, row_ends, hidden = conversation_text(row, processing_class, step_format)
        token = processing_class.image_token if images_of(row) else ""
        texts.append(text)
        cuts.append(text.rindex(token) + len(token) if token else 0)
        ends.append(row_ends)
        concealed.append(hidden)
    images = []
    for index, row in enumerate(prompts):
        with errors_name_row(row, index):
            images.append([open_image(image) for image in images_of(row)])
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)][: len(prompts)]
    with errors_name_row(prompts[0], 0) if len(prompts) == 1 else nullcontext():
        prefixes, image_tensors = encode_texts(heads, images, processing_class, special=False)
    first = [] if step_format.messages[0][0] else first_token(tokenizer)  # a chat template writes its own
    rendered = []
    for index, (row, text, cut, row_ends, hidden) in enumerate(zip(rows, texts, cuts, ends, concealed, strict=True)):
        # The last image token is repeated before the rest, because some tokenizers treat the beginning of a text specially.
        token = processing_class.image_token if cut else ""
        with errors_name_row(row, index):
            rest, positions = _tokens_and_positions(
                tokenizer, token + text[cut:], [len(token) + end - cut for end in row_ends], hidden, step_format.marker
            )
        rest, positions = rest[bool(token) :], [position - bool(token) for position in positions]
        positions = [len(first) + position for position in positions]
        rendered.append(joined(prefixes[min(index, len(prompts) - 1)], first + rest, positions))
    return rendered, image_tensors


def _tokens_and_positions(
    tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int], hidden: dict[str, str], marker: str
) -> tuple[list[int], list[int]]:
    """Token ids of `text`, and the index of the last token before each of `ends`, where a step is read."""
    ids = encode_text(tokenizer, text, hidden)
    trained = tokenizer.encode("." + marker, add_special_tokens=False)[-1] if marker else None
    positions = []
    for number, end in enumerate(ends):
        part = encode_text(tokenizer, text[:end], hidden)
        if ids[: len(part)] != part:
            raise ValueError(
                f"the marker of step {number} melts into its neighbours in this tokenizer: is this the format of this "
                "checkpoint?"
            )
        if marker and part[-1] != trained:
            ending = text[: end - len(marker)][-2:]
            raise ValueError(
                f"step {number} ends in {ending!r}, which this tokenizer joins with the marker {marker!r} into a token "
                "that was not trained: remove what the step ends in"
            )
        positions.append(len(part) - 1)
    return ids, positions
