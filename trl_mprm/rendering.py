"""
The one rendering of a question and its steps, used by training, scoring, evaluation and docs.

The user turn holds the images, then the question, in the model's own chat template. The assistant turn holds
`{step}<prm>` joined by a blank line. Image and question are therefore a prefix that all candidates share:

    <|im_start|>user\\n<|vision_start|>[image]<|vision_end|>How many tiles are red?<|im_end|>\\n<|im_start|>assistant\\n
    The red tiles are A and C.<prm>\\n\\nSo the answer is 2.<prm>

Every piece is tokenised alone and the marker is inserted as a token id: joining text first and tokenising after
lets the separator melt into its neighbours (QwenLM/ProcessBench pull request 12).

Published checkpoints were trained on other layouts; each is a [`StepFormat`] too, see [`published`].
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages

from .step_format import StepFormat, StepIds


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


def render_prefix_text(row: dict[str, Any], processing_class: ProcessingClass) -> str:
    """
    Render images (as placeholders) and question of `row` up to where the assistant begins.

    A text-only tokenizer without chat template gets the question as plain text and a blank line.
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
    _check_unicode("the prompt", text)
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


def open_image(image: Image.Image | str | os.PathLike | dict[str, Any]) -> Image.Image:
    """
    Take an image in RGB as it is, or open a path or what an undecoded column holds (`{"bytes", "path"}`).

    Raises `ValueError` where there is none, or the file is not a whole image.
    """
    source, name = image, image
    if isinstance(image, dict):
        data, name = image.get("bytes"), image.get("path") or "in memory"
        source = image.get("path") if data is None else data
        source = io.BytesIO(source) if isinstance(source, bytes) else source
    if not isinstance(source, Image.Image | str | os.PathLike | io.BytesIO):
        raise ValueError(f"image is {image!r:.80}, expected a PIL image, a path, or a dict of its `bytes` or `path`")
    try:
        return (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")
    except Exception as error:  # Pillow: whatever a decoder meets in a broken file, SyntaxError in a broken PNG
        raise ValueError(f"cannot read image {name}: {error}") from error


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
        with naming(row, index):
            check_prompt(row["prompt"], forbidden)
            texts.append(render_prefix_text(row, processing_class))
            images.append([open_image(image) for image in images_of(row)])
    # A chat template writes the tokenizer's own first token; plain text needs it added.
    with naming(rows[0], 0) if len(rows) == 1 else nullcontext():  # a picture that the processor refuses
        return _encode(texts, images, processing_class, special=processing_class.chat_template is None)


def _encode(
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


def render_steps(
    completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, ids: StepIds
) -> tuple[list[int], list[int]]:
    """
    Tokenise the steps of one rollout, a marker after each.

    Text that looks like a special token (`<prm>`, `<|im_end|>`) stays text: a rollout cannot forge a marker.

    Returns:
        `tuple[list[int], list[int]]`: token ids of the assistant turn, and the position of each step's marker in them.
    """
    _check_steps(completions)
    encoded = tokenizer(list(completions), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    tokens: list[int] = []
    positions: list[int] = []
    for number, step_ids in enumerate(encoded):
        if ids.marker[-1] in step_ids and ids.marker[-1] in tokenizer.added_tokens_decoder:
            raise ValueError(f"step {number} contains the marker: remove it from the text, it is inserted as a token")
        tokens += (ids.joiner if number else []) + step_ids + ids.marker
        positions.append(len(tokens) - 1)
    return tokens, positions


def _check_steps(completions: Sequence[str]) -> None:
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise ValueError(f"`completions` is {completions!r:.60}, expected a list of steps: split the text first")
    for number, step in enumerate(completions):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"step {number} is {step!r}, expected text: remove the empty step and its label")
        _check_unicode(f"step {number}", step)
    if not completions:
        raise ValueError("`completions` is empty, expected at least one step: remove the row")


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate ({text[error.start]!r}), which no tokenizer reads: give it in UTF-8"
        ) from error


def render_rows(
    rows: Sequence[dict[str, Any]],
    processing_class: ProcessingClass,
    step_format: StepFormat,
    same_prompt: bool = False,
) -> tuple[list[Rendered], dict[str, torch.Tensor]]:
    """
    Render rows into tokens, and their images into tensors.

    With `same_prompt` all rows have the images and the question of the first, which are then rendered once: the image
    tensors are those of one row.
    """
    tokenizer = tokenizer_of(processing_class)
    ids = step_format.ids(tokenizer)
    prompts = rows[:1] if same_prompt else rows
    messages = step_format.messages
    if messages is not None and any("{step" in text for _, text in messages):
        return _render_texts(rows, prompts, processing_class, step_format)
    if messages is None:
        prefixes, image_tensors = render_prefixes(prompts, processing_class)
    else:
        prefixes, image_tensors = _render_plain_prefixes(prompts, processing_class, messages), {}
    rendered = []
    for index, row in enumerate(rows):
        prefix = prefixes[0 if same_prompt else index]
        with naming(row, index):
            tokens, positions = render_steps(row["completions"], tokenizer, ids)
        rendered.append(_joined(prefix, tokens, positions))
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
    Render rows into what a model's `forward` takes, padded on the right, and the mask of the markers.

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
        `ValueError`: with the name of the row, for an empty step, an image with a text-only model, or a special token
        in the prompt.
    """
    rendered, image_tensors = render_rows(rows, processing_class, step_format)
    batch, markers = pad_batch(rendered, tokenizer_of(processing_class))
    return image_tensors | batch, markers


@contextmanager
def naming(row: dict[str, Any], index: int) -> Iterator[None]:
    """Name the row in the errors raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row_name(row, index)}: {error}") from error


def _joined(prefix: dict[str, list[int]], tokens: list[int], positions: list[int]) -> Rendered:
    start = len(prefix["input_ids"])
    types = {name: prefix[name] + [0] * len(tokens) for name in TOKEN_TYPES if name in prefix}
    return Rendered(prefix["input_ids"] + tokens, [start + position for position in positions], types)


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
    _check_steps(row["completions"])
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


def _render_plain_prefixes(
    rows: Sequence[dict[str, Any]], processing_class: ProcessingClass, messages: tuple[tuple[str, str], ...]
) -> list[dict]:
    tokenizer = tokenizer_of(processing_class)
    prefixes = []
    for index, row in enumerate(rows):
        with naming(row, index):
            check_prompt(row["prompt"], special_tokens(tokenizer))
            if images_of(row):
                raise ValueError("images came with a format that reads no images: remove the `images` column")
        text = "".join(text for _, text in messages).replace("{question}", prompt_text(row["prompt"]))
        prefixes.append({"input_ids": _first_token(tokenizer) + tokenizer.encode(text, add_special_tokens=False)})
    return prefixes


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _render_texts(
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
        with naming(row, index):
            text, row_ends = conversation_text(row, processing_class, step_format)
        token = processing_class.image_token if images_of(row) else ""
        texts.append(text)
        cuts.append(text.rindex(token) + len(token) if token else 0)
        ends.append(row_ends)
    images = []
    for index, row in enumerate(prompts):
        with naming(row, index):
            images.append([open_image(image) for image in images_of(row)])
    heads = [text[:cut] for text, cut in zip(texts, cuts, strict=True)][: len(prompts)]
    with naming(prompts[0], 0) if len(prompts) == 1 else nullcontext():
        prefixes, image_tensors = _encode(heads, images, processing_class, special=False)
    plain = not step_format.messages[0][0]
    rendered = []
    for index, (row, text, cut, row_ends) in enumerate(zip(rows, texts, cuts, ends, strict=True)):
        # The last image token goes before the rest again: some tokenizers treat the beginning of a text in its own way.
        token = processing_class.image_token if cut else ""

        def tokens(end: int | None, token: str = token, text: str = text, cut: int = cut) -> list[int]:
            return tokenizer.encode(token + text[cut:end], add_special_tokens=False)[bool(token) :]

        first = _first_token(tokenizer) if plain else []
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
        rendered.append(_joined(prefixes[min(index, len(prompts) - 1)], rest, positions))
    return rendered, image_tensors
