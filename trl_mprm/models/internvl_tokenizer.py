"""The tokenizer of an internvl_chat checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf
from transformers.utils import is_protobuf_available


IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",  # the native processor requires one; the checkpoints have none, so its id lies beyond their rows
}

HINT = "pass a native tokenizer with the same ids (--tokenizer)"

PROMPT_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% elif part.type == 'video' %}<video>\n{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_tokenizer(folder: Path, text: str, replacement: str | os.PathLike | None) -> PreTrainedTokenizerBase:
    if replacement is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            replacement, extra_special_tokens=IMAGE_TOKENS, trust_remote_code=False
        )
    elif text == "Qwen2ForCausalLM":
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, extra_special_tokens=IMAGE_TOKENS)
    else:
        tokenizer = _internlm2_tokenizer(folder)
    # InternLM2 begins every sequence with <s>, Qwen2 with nothing.
    tokenizer.chat_template = (tokenizer.bos_token if text == "InternLM2ForCausalLM" else "") + CHAT_TEMPLATE
    return tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise `ValueError` if a token that every prompt needs has no row in the checkpoint."""
    known = tokenizer.get_vocab()
    wrong = [token for token in PROMPT_TOKENS if known.get(token, rows) >= rows]
    if wrong:
        raise ValueError(
            f"the tokenizer gives {', '.join(wrong)} no id below {rows}, the checkpoint's vocab_size: it is the tokenizer "
            "of another model, name the right one (--tokenizer)"
        )


def _internlm2_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """
    The sentencepiece BPE model `tokenizer.model` and the tokens added to it, as a fast tokenizer with the same ids.

    Tokens that were added in place of a piece (`<|im_start|>` is `[UNUSED_TOKEN_146]` in `tokenizer.model`) take that
    piece's id. Raises `ValueError` if the model has a feature that a fast tokenizer would handle differently.
    """
    path = folder / "tokenizer.model"
    proto = _sentencepiece_model(path)
    kinds = {kind: {piece.piece for piece in proto.pieces if piece.type == kind} for kind in range(1, 7)}
    unknown, control, user_defined, unused, byte = (kinds[kind] for kind in (2, 3, 4, 5, 6))
    spec = proto.normalizer_spec
    settings = read_json(folder / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    if missing := {"added_tokens_decoder", *names} - settings.keys():
        raise ValueError(f"{folder / 'tokenizer_config.json'} lacks {', '.join(sorted(missing))}: {HINT}")
    added = {int(index): AddedToken(**token) for index, token in settings["added_tokens_decoder"].items()}
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    merges = generate_merges(vocab, scores, skip_tokens=unknown | control | user_defined | byte)
    for trait, wrong in (
        (f"model type {proto.trainer_spec.model_type} (BPE is 2)", proto.trainer_spec.model_type != 2),
        ("a character map", bool(spec.precompiled_charsmap)),
        ("remove_extra_whitespaces", spec.remove_extra_whitespaces),
        ("no escape_whitespaces", not spec.escape_whitespaces),
        ("whitespace as suffix", proto.trainer_spec.treat_whitespace_as_suffix),
        ("spaces in user-defined pieces", any("▁" in piece for piece in user_defined)),
        ("user-defined pieces beside a dummy prefix", spec.add_dummy_prefix and bool(user_defined)),
        ("merges into unused pieces", any(left + right in unused for left, right in merges)),
    ):
        if wrong:
            raise ValueError(f"{path} has {trait}, which a fast tokenizer does differently: {HINT}")
    pieces = [piece.piece for piece in proto.pieces]
    for index, token in added.items():
        if index < len(pieces):
            pieces[index] = token.content
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token=pieces[proto.trainer_spec.unk_id],
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    tokenizer = Tokenizer(model)
    _write_spaces_as_underscores(tokenizer, spec.add_dummy_prefix)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in sorted(user_defined, key=vocab.get)])
    tokenizer.add_tokens([added[index] for index in sorted(added)])
    for index, token in added.items():
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} gives {token.content!r} the id {index}, after {path.name} it would "
                f"be {tokenizer.token_to_id(token.content)}: {HINT}"
            )
    special = {name: settings[name] for name in names}
    bos = special["bos_token"]
    if settings.get("add_bos_token", True):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=IMAGE_TOKENS,
        **special,
    )


def _sentencepiece_model(path: Path) -> Any:
    """The protobuf message in `tokenizer.model`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no tokenizer.model: download it, or {HINT}")
    if not is_protobuf_available():
        raise ImportError(f"{path} can be read with protobuf only: pip install protobuf, or {HINT}")
    from google.protobuf.message import DecodeError

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is no sentencepiece model ({error}): download it again") from error
    return proto


def _write_spaces_as_underscores(tokenizer: Tokenizer, dummy_prefix: bool) -> None:
    """Replace spaces as sentencepiece does, with one before the text if it adds a dummy prefix."""
    prefix = [normalizers.Prepend("▁")] if dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])])


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: expected an internvl_chat checkpoint")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download the checkpoint again") from error
