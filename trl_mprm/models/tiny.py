"""
Build tiny random models with their real processor classes in a fraction of a second, without the Hub.

    tiny_model("internvl", folder)      0.2M random weights and an InternVLProcessor, saved in `folder`

They serve `trl-mprm train --smoke` and the tests.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


IMAGE_TOKENS = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "internvl_llama": "<IMG_CONTEXT>",
    "idefics3": "<image>",
    "llava_onevision": "<image>",
    "gemma3": "<start_of_image>",
    "qwen2": "",
    "llama": "",
}

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def chat_template(image: str) -> str:
    """A Qwen-style chat template that accepts contents as strings and as lists of parts."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tiny_tokenizer(architecture: str, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with "Yes" and "No" as one token each."""
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
    """
    Save a random model and its processor or tokenizer into `folder`; return the folder as a model id.

    Examples:
    ```python
    >>> from tempfile import TemporaryDirectory
    >>> from transformers import AutoConfig
    >>> with TemporaryDirectory() as folder:
    ...     AutoConfig.from_pretrained(tiny_model("internvl", Path(folder))).text_config.hidden_size
    64

    ```
    """
    torch.manual_seed(seed)
    if architecture in ("qwen2", "llama"):
        processor = tiny_tokenizer(architecture)
        config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[architecture](vocab_size=len(processor), **TEXT)
        model = AutoModelForCausalLM.from_config(config)
    else:
        config, processor = BUILDERS[architecture]()
        model = AutoModelForImageTextToText.from_config(config)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen2_5_vl():
    tokenizer = tiny_tokenizer("qwen2_5_vl")
    sizes = {"patch_size": 14, "merge_size": 2}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes, min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizer,
        Qwen2VLVideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
    ends = {"bos_token_id": None, "eos_token_id": None}  # the default ids lie beyond this vocabulary
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **ends, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 64, "window_size": 56, **_patches(14)},
        **_qwen_ids(tokenizer),
    )
    return config, processor


def _qwen3_vl():
    tokenizer = tiny_tokenizer("qwen3_vl")
    sizes = {"patch_size": 16, "merge_size": 2}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, min_pixels=32 * 32, max_pixels=96 * 96),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 64, "num_position_embeddings": 64, **_patches(16)},
        **_qwen_ids(tokenizer),
    )
    return config, processor


def _internvl(architecture: str, text_model: str):
    tokenizer = tiny_tokenizer(
        architecture,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2),
        tokenizer,
        InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=1,
        chat_template=tokenizer.chat_template,
    )
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config={"model_type": text_model, **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return config, processor


def _idefics3():
    tokenizer = tiny_tokenizer("idefics3")
    extra = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    extra += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in extra])
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=1,
        chat_template=tokenizer.chat_template,
    )
    config = Idefics3Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 16},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def _llava_onevision():
    tokenizer = tiny_tokenizer("llava_onevision")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<image>", "<video>")])
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return config, processor


def _gemma3():
    tokenizer = tiny_tokenizer(
        "gemma3", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    # A window shorter than the prefix, so that sliding-window layers do slide.
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 16}
    config = Gemma3Config(
        text_config={**TEXT, **layers, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )
    return config, processor


BUILDERS = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": lambda: _internvl("internvl", "qwen2"),
    "internvl_llama": lambda: _internvl("internvl_llama", "llama"),
    "idefics3": _idefics3,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
}


def _patches(size: int) -> dict[str, int]:
    return {"patch_size": size, "spatial_patch_size": size, "spatial_merge_size": 2, "temporal_patch_size": 2}
