"""
Convert OpenGVLab's remote-code `internvl_chat` checkpoints (VisualPRM-8B, InternVL2.5-8B) to the native InternVL class.

The conversion changes names, fused projections, configuration and tokenizer; no remote code runs, no pickle is opened:

    language_model.model.layers.0.attention.wqkv.weight   [(q q k v) (q q k v) ...]   InternLM2
    -> model.language_model.layers.0.self_attn.q_proj.weight, .k_proj.weight, .v_proj.weight   Llama
    vision_model.encoder.layers.0.ls1   -> model.vision_tower.encoder.layer.0.lambda_1
    mlp1.1.weight                       -> model.multi_modal_projector.linear_1.weight

The text decoder is InternLM2 (a Llama with fused projections) or Qwen2. The chat template is the checkpoint's own
"internvl2_5" without its default system prompt, as in the `-hf` checkpoints that OpenGVLab publishes.
"""

import os
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from ..data.hub import download_model
from ..prompting.published import CHECKPOINTS, published_format
from .internvl_tokenizer import IMAGE_TOKENS, check_tokens, load_tokenizer, read_json


# Native name -> name in the checkpoint. `[q]` marks a part of a fused tensor.
VISION_NAMES = {
    "model.vision_tower.": "vision_model.",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.q_proj": "attn.qkv[q]",
    "attention.k_proj": "attn.qkv[k]",
    "attention.v_proj": "attn.qkv[v]",
    "attention.projection_layer": "attn.proj",
    "attention.": "attn.",
    "lambda_": "ls",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}

PROJECTOR_NAMES = {
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
}

QWEN2_NAMES = {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}

INTERNLM2_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head": "language_model.output",
    "embed_tokens": "tok_embeddings",
    "self_attn.q_proj": "attention.wqkv[q]",
    "self_attn.k_proj": "attention.wqkv[k]",
    "self_attn.v_proj": "attention.wqkv[v]",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}

TEXT_NAMES = {"InternLM2ForCausalLM": INTERNLM2_NAMES, "Qwen2ForCausalLM": QWEN2_NAMES}


def convert_internvl_chat(
    checkpoint: str | os.PathLike, output: str | os.PathLike, tokenizer: str | os.PathLike | None = None
) -> dict[str, Any]:
    """
    Write the checkpoint into `output` as `InternVLForConditionalGeneration` with its processor.

    The folder appears only when it is complete. It loads with `AutoModelForImageTextToText` and `AutoProcessor`, offline
    and without remote code, and with [`ProcessRewardModel`] if the format is known for the Hub id. Tensors keep their
    precision; the conversion holds them all in memory (16 GB for 8B in bfloat16).

    Args:
        checkpoint (`str`):
            Folder or Hub id of a checkpoint of type `internvl_chat`, in safetensors.
        output (`str`):
            Folder to write; it must not exist.
        tokenizer (`str`, *optional*):
            Folder or Hub id of a native tokenizer with the same ids. Defaults to the checkpoint's own: a Qwen2 tokenizer
            unchanged, the sentencepiece model of InternLM2 converted.

    Returns:
        `dict[str, Any]`: the text decoder's class (`text`), the `tensors` and `parameters` written, `image_tokens`
        (for one tile), `max_tiles`, and the class of the `tokenizer`.

    Examples:
    ```python
    >>> from trl_mprm.models.internvl_chat import convert_internvl_chat
    >>> convert_internvl_chat("no/such-folder/anywhere", "visualprm-8b-hf")
    Traceback (most recent call last):
    FileNotFoundError: no/such-folder/anywhere: no such folder, and no Hub id (org/name)

    ```
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already: remove it, or name another folder")
    folder = _local(checkpoint)
    chat = read_json(folder / "config.json")
    text = _check_layout(chat, folder)
    tokenizer = load_tokenizer(folder, text, tokenizer)
    check_tokens(tokenizer, chat["llm_config"].get("vocab_size", 0))
    try:
        config, processor = _native_config(chat, text, tokenizer), _native_processor(chat, tokenizer)
    except KeyError as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks {error}, which every internvl_chat checkpoint has"
        ) from error
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = _tied(chat, tensors)
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
        state = _state_dict(model, tensors, text, folder)
        model.load_state_dict(state, strict=False, assign=True)  # complete, but for a tied LM head
        model.tie_weights()
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=output.parent) as part:
            whole = Path(part) / output.name
            model.save_pretrained(whole, max_shard_size="5GB")
            processor.save_pretrained(whole)
            if str(checkpoint) in CHECKPOINTS:
                step_format = published_format(str(checkpoint))
                if chat.get("system_message") and step_format.answer is not None:  # VisualPRM; MM-PRM reads its own
                    system = ("system", chat["system_message"])
                    step_format = replace(step_format, messages=(system, *step_format.messages[1:]))
                step_format.save(whole)
            whole.replace(output)
    return {
        "text": type(config.text_config).__name__.removesuffix("Config"),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "image_tokens": config.image_seq_length,
        "max_tiles": processor.image_processor.max_patches,
        "tokenizer": type(tokenizer).__name__,
    }


def _local(checkpoint: str | os.PathLike) -> Path:
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt"]  # neither code nor pickles
    return download_model(str(checkpoint), allow_patterns=patterns)


def _check_layout(chat: dict[str, Any], folder: Path) -> str:
    """Return the class of the text decoder. Raises `ValueError` if the native class would compute something else."""
    if chat.get("model_type") != "internvl_chat":
        raise ValueError(f"{folder} has model_type {chat.get('model_type')!r}, expected internvl_chat")
    llm = chat.get("llm_config") or {}
    text = (llm.get("architectures") or [None])[0]
    if text not in TEXT_NAMES:
        raise ValueError(f"{folder} has the text decoder {text}, expected one of {', '.join(TEXT_NAMES)}")
    rope = _rope_type(llm)
    tiles = chat.get("max_dynamic_patch") if chat.get("dynamic_image_size") else 1
    vision = chat.get("vision_config") or {}
    for name, came, expected in (
        ("select_layer", chat.get("select_layer"), (-1,)),
        ("ps_version", chat.get("ps_version"), ("v2",)),
        ("template", chat.get("template"), ("internvl2_5",)),
        ("use_thumbnail", bool(chat.get("use_thumbnail")) or tiles == 1, (True,)),
        ("use_sliding_window", llm.get("use_sliding_window", False), (False,)),
        ("rope_pos_id_version", llm.get("rope_pos_id_version", "default"), ("default",)),
        ("rope_scaling", rope, ("default", "linear", "dynamic")),
        # The native class fixes the epsilon of the normed queries and keys.
        ("layer_norm_eps", vision.get("layer_norm_eps") if vision.get("qk_normalization") else 1e-6, (1e-6,)),
    ):
        if came not in expected:
            raise ValueError(
                f"{folder / 'config.json'} has {name} {came!r}, which the native InternVL class does not compute "
                f"(expected {' or '.join(map(repr, expected))}): keep to the checkpoint's own code"
            )
    return text


def _native_config(chat: dict[str, Any], text: str, tokenizer: PreTrainedTokenizerBase) -> InternVLConfig:
    vision, llm = chat["vision_config"], chat["llm_config"]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    vision_config = InternVLVisionConfig(
        **{name: vision[name] for name in (*sizes, "layer_norm_eps", "norm_type", "image_size", "patch_size")},
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
    )
    scaling = llm.get("rope_scaling") or {}
    rope = {"rope_type": _rope_type(llm), "rope_theta": float(llm["rope_theta"])}
    text_config = (LlamaConfig if text == "InternLM2ForCausalLM" else Qwen2Config)(
        **{name: llm[name] for name in (*sizes, "vocab_size", "num_key_value_heads", "max_position_embeddings")},
        rms_norm_eps=llm["rms_norm_eps"],
        rope_parameters=rope | ({"factor": float(scaling["factor"])} if scaling else {}),
        bos_token_id=llm.get("bos_token_id"),
        eos_token_id=llm.get("eos_token_id"),
        **({"attention_bias": llm["bias"]} if text == "InternLM2ForCausalLM" else {}),
    )
    return InternVLConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS["context_image_token"]),
        image_seq_length=_image_seq_length(chat),
        downsample_ratio=chat["downsample_ratio"],
    )


def _rope_type(llm: dict[str, Any]) -> str:
    scaling = llm.get("rope_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type", "default")


def _image_size(chat: dict[str, Any]) -> int:
    return chat.get("force_image_size") or chat["vision_config"]["image_size"]


def _image_seq_length(chat: dict[str, Any]) -> int:
    return int((_image_size(chat) // chat["vision_config"]["patch_size"]) ** 2 * chat["downsample_ratio"] ** 2)


def _native_processor(chat: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> InternVLProcessor:
    size = {"height": _image_size(chat), "width": _image_size(chat)}
    pixels = {"size": size, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of ImageNet
    tiles = (chat["min_dynamic_patch"], chat["max_dynamic_patch"]) if chat["dynamic_image_size"] else (1, 1)
    return InternVLProcessor(
        GotOcr2ImageProcessor(crop_to_patches=True, min_patches=tiles[0], max_patches=tiles[1], **pixels),
        tokenizer,
        InternVLVideoProcessor(**pixels),
        image_seq_length=_image_seq_length(chat),
        chat_template=tokenizer.chat_template,
    )


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Map the name of every tensor to the open file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        came = f"found the pickle {pickles[0]}, which is never opened" if pickles else "found none"
        raise FileNotFoundError(f"{folder}: expected safetensors, {came}")
    tensors = {}
    for name in files:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {folder / name} ({error}): download the checkpoint again") from error
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _tied(chat: dict[str, Any], tensors: dict[str, safe_open]) -> bool:
    heads = {"language_model.output.weight", "language_model.lm_head.weight"}
    return bool(chat["llm_config"].get("tie_word_embeddings")) and not heads & tensors.keys()


def _source(name: str, text: str) -> tuple[str, str | None]:
    """
    The name of a native parameter in the checkpoint, and which part of a fused tensor it is.

    Examples:
    ```python
    >>> from trl_mprm.models.internvl_chat import _source
    >>> _source("model.language_model.layers.3.self_attn.k_proj.weight", "InternLM2ForCausalLM")
    ('language_model.model.layers.3.attention.wqkv.weight', 'k')
    >>> _source("model.language_model.layers.3.self_attn.k_proj.weight", "Qwen2ForCausalLM")
    ('language_model.model.layers.3.self_attn.k_proj.weight', None)

    ```
    """
    if name.startswith("model.vision_tower."):
        names = VISION_NAMES
    else:
        names = PROJECTOR_NAMES if name.startswith("model.multi_modal_projector.") else TEXT_NAMES[text]
    for native, chat in names.items():
        name = name.replace(native, chat)
    part = re.search(r"\[([qkv])\]", name)
    return (name.replace(part[0], ""), part[1]) if part else (name, None)


def _split(fused: torch.Tensor, part: str, groups: int, head_dim: int) -> torch.Tensor:
    """
    Take one part of a fused projection, which holds for each of `groups` key-value heads its query heads, key and value.

    Examples:
    ```python
    >>> import torch
    >>> from trl_mprm.models.internvl_chat import _split
    >>> fused = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])  # q q k v | q q k v, heads of size one
    >>> [_split(fused, part, groups=2, head_dim=1).tolist() for part in "qkv"]
    [[1, 2, 5, 6], [3, 7], [4, 8]]

    ```
    """
    heads = fused.unflatten(0, (groups, -1, head_dim))
    picked = {"q": heads[:, :-2], "k": heads[:, -2:-1], "v": heads[:, -1:]}[part]
    return picked.flatten(0, 2).clone()


def _state_dict(
    model: InternVLForConditionalGeneration, tensors: dict[str, safe_open], text: str, folder: Path
) -> dict[str, torch.Tensor]:
    """Read the native parameters from the checkpoint. Raises `ValueError` naming missing, extra or misshapen tensors."""
    expected = model.state_dict()
    if model.config.text_config.tie_word_embeddings:
        del expected["lm_head.weight"]
    sources = {name: _source(name, text) for name in expected}
    needed = {source for source, _ in sources.values()}
    for what, names in (("lacks", needed - tensors.keys()), ("has unexpected", tensors.keys() - needed)):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{folder} {what} tensors: {listed}; it is incomplete, or of another layout")
    llm, state = model.config.text_config, {}
    head_dim = llm.hidden_size // llm.num_attention_heads
    for name, (source, part) in tqdm(sources.items(), desc="Convert", unit="tensor", delay=2):
        tensor, shape = tensors[source].get_tensor(source), list(expected[name].shape)
        in_vision = name.startswith("model.vision_tower.")
        if part:
            heads = llm.num_attention_heads + 2 * llm.num_key_value_heads
            shape[0] = 3 * shape[0] if in_vision else heads * head_dim
        if list(tensor.shape) != shape:
            raise ValueError(f"{folder}: {source} has shape {list(tensor.shape)}, config.json asks for {shape}")
        if part and in_vision:
            tensor = tensor.chunk(3)["qkv".index(part)].clone()
        elif part:
            tensor = _split(tensor, part, llm.num_key_value_heads, head_dim)
        state[name] = tensor
    return state
