"""Tiny random models with their real processor classes, built in code: no hub, no download, a fraction of a second."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)


IMAGE_TOKENS = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "qwen2": "",
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def chat_template(image: str) -> str:
    """A Qwen-style template for string contents and for lists of parts."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tiny_tokenizer(architecture: str, **special: str) -> PreTrainedTokenizerFast:
    """Byte-level, with "Yes" and "No" as one token each."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", extra_special_tokens=special
    )
    tokens = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    fast.add_tokens([AddedToken(token, special=True) for token in tokens])
    fast.add_tokens(["Yes", "No"])
    fast.chat_template = chat_template(IMAGE_TOKENS[architecture])
    return fast


def tiny_model(architecture: str, folder: Path, seed: int = 0) -> str:
    """Save a random model and its processor or tokenizer into `folder`; return the folder as a model id."""
    torch.manual_seed(seed)
    if architecture == "qwen2":
        processor = tiny_tokenizer(architecture)
        model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=len(processor), **TEXT))
    elif architecture == "qwen2_5_vl":
        tokenizer = tiny_tokenizer(architecture)
        sizes = {"patch_size": 14, "merge_size": 2}
        processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**sizes, min_pixels=28 * 28, max_pixels=84 * 84),
            tokenizer,
            Qwen2VLVideoProcessor(**sizes),
            chat_template=tokenizer.chat_template,
        )
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(
            text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
            vision_config={**vision, "out_hidden_size": 64, "window_size": 56, **_patches(14)},
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        )
        model = AutoModelForImageTextToText.from_config(config)
    elif architecture == "internvl":
        tokenizer = tiny_tokenizer(
            architecture,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        )
        processor = InternVLProcessor(
            GotOcr2ImageProcessor(
                size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2
            ),
            tokenizer,
            InternVLVideoProcessor(size={"height": 28, "width": 28}),
            image_seq_length=1,
            chat_template=tokenizer.chat_template,
        )
        config = InternVLConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [28, 28],
                "patch_size": [14, 14],
            },
            text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=1,
            downsample_ratio=0.5,
        )
        model = AutoModelForImageTextToText.from_config(config)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _patches(size: int) -> dict[str, int]:
    return {"patch_size": size, "spatial_patch_size": size, "spatial_merge_size": 2, "temporal_patch_size": 2}
