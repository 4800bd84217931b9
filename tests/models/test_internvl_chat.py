"""
The converter of `internvl_chat` checkpoints, on tiny random checkpoints of that layout.

The judge of the weights is `chat_forward`: the remote code's forward written again in plain torch, over the tensors as
they lie in the checkpoint. The judge of the tokenizer is sentencepiece itself.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from helpers import hub_on_this_machine, picture
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_mprm import ProcessRewardModel
from trl_mprm.cli import main
from trl_mprm.models.internvl_chat import convert_internvl_chat
from trl_mprm.prompting.published import VISUALPRM_SYSTEM, published_format
from trl_mprm.prompting.step_format import StepFormat


ADDED = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 64, 4, 2, 16, 96
VIT_HIDDEN, VIT_HEADS, GRID = 32, 2, 4  # a tile of 56 pixels is 4 x 4 patches, 2 x 2 tokens
CORPUS = """How many red tiles are there? Count the tiles in each row and add them up.
Step 1: the first row has 3 red tiles, the second row has 2 blue tiles.
Step 2: 3 + 2 - 1 = 4, so the answer is 4. Final answer: Yes. No. 数一数红色的方块。
""".split("\n")
TEXTS = [
    "How many red tiles?",
    "  two  spaces, then\ttab\nand newline\n\n",
    "数一数 红色",
    "unseen: ☃ é ▁ ẞ",
    "<|im_start|>user\nIs it 4?<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\n### Question:\nx - y",
    "[UNUSED_TOKEN_1] <s> </s><unk> blues",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> bytes:
    """A BPE model with InternLM2's settings; its last six pieces are spare ones, as InternLM2's are."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 8), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["blue"],
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for number in range(6):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{number}]", score=-1000.0 - number, type=1)
    return proto.SerializeToString()


def internlm2_tokenizer(folder: Path, model: bytes) -> int:
    """Write the tokenizer as the checkpoints have it; return the number of ids."""
    (folder / "tokenizer.model").write_bytes(model)
    spare = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() - 6
    contents = {0: "<unk>", 1: "<s>", 2: "</s>"}
    turn = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
    contents |= dict(enumerate([*turn, *ADDED], start=spare))
    settings = {
        "added_tokens_decoder": {str(index): added_token(token) for index, token in contents.items()},
        "additional_special_tokens": [*turn, *ADDED],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return max(contents) + 1


def added_tokens(folder: Path) -> dict[str, int]:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {token["content"]: int(index) for index, token in settings["added_tokens_decoder"].items()}


def slow_encode(folder: Path, text: str) -> list[int]:
    """Ids as the remote code's tokenizer gives them: <s>, then added tokens, sentencepiece on what stands between."""
    slow = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
    added, ids = added_tokens(folder), [1]
    for piece in re.split("(" + "|".join(map(re.escape, added)) + ")", text):
        ids += [added[piece]] if piece in added else slow.encode(piece)
    return ids


def qwen2_tokenizer(folder: Path) -> int:
    alphabet = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]
    vocab = {char: index for index, char in enumerate(alphabet)} | {"Ye": 256, "Yes": 257, "No": 258}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nY e\nYe s\nN o\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED]
    ids = {token: index for index, token in enumerate(special, start=len(vocab))}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    settings = {
        "added_tokens_decoder": {str(index): added_token(token) for token, index in ids.items()},
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 8192,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return max(ids.values()) + 1


def added_token(content: str) -> dict:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def chat_config(text: str, vocab_size: int, **changes) -> dict:
    llm = {
        "architectures": [f"{text}ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32,
        "rope_theta": 1000000,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_size": VIT_HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": VIT_HEADS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "layer_norm",
        "image_size": 14 * GRID,
        "patch_size": 14,
        "num_channels": 3,
        "qkv_bias": True,
        "qk_normalization": False,
    }
    if text == "InternLM2":
        llm["bias"] = False
    else:  # InternViT-6B's vision tower beside Qwen2, as in InternVL2.5-38B
        vision |= {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 14 * GRID,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "llm_config": llm,
        "vision_config": vision,
        **changes,
    }


def chat_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names and in the shapes of the layout; none is zero or one."""
    vision, llm = config["vision_config"], config["llm_config"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, VIT_HIDDEN),
        "vision_model.embeddings.position_embedding": (1, GRID * GRID + 1, VIT_HIDDEN),
        "vision_model.embeddings.patch_embedding.weight": (VIT_HIDDEN, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (VIT_HIDDEN,),
        "mlp1.0.weight": (4 * VIT_HIDDEN,),
        "mlp1.0.bias": (4 * VIT_HIDDEN,),
        "mlp1.1.weight": (HIDDEN, 4 * VIT_HIDDEN),
        "mlp1.1.bias": (HIDDEN,),
        "mlp1.3.weight": (HIDDEN, HIDDEN),
        "mlp1.3.bias": (HIDDEN,),
        "language_model.model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        block = f"vision_model.encoder.layers.{layer}."
        shapes |= {block + "attn.qkv.weight": (3 * VIT_HIDDEN, VIT_HIDDEN)}
        if vision["qkv_bias"]:
            shapes |= {block + "attn.qkv.bias": (3 * VIT_HIDDEN,)}
        if vision["qk_normalization"]:
            shapes |= {block + f"attn.{name}_norm.weight": (VIT_HIDDEN,) for name in "qk"}
        for name in ("ls1", "ls2", "norm1.weight", "norm2.weight", "attn.proj.bias", "mlp.fc2.bias"):
            shapes[block + name] = (VIT_HIDDEN,)
        if vision["norm_type"] == "layer_norm":
            shapes |= {block + "norm1.bias": (VIT_HIDDEN,), block + "norm2.bias": (VIT_HIDDEN,)}
        shapes |= {block + "attn.proj.weight": (VIT_HIDDEN, VIT_HIDDEN), block + "mlp.fc1.bias": (48,)}
        shapes |= {block + "mlp.fc1.weight": (48, VIT_HIDDEN), block + "mlp.fc2.weight": (VIT_HIDDEN, 48)}
        block = f"language_model.model.layers.{layer}."
        if llm["architectures"] == ["InternLM2ForCausalLM"]:
            shapes |= {block + f"{name}.weight": (HIDDEN,) for name in ("attention_norm", "ffn_norm")}
            shapes |= {block + "attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)}
            shapes |= {block + "attention.wo.weight": (HIDDEN, HIDDEN)}
            if llm["bias"]:
                shapes |= {block + "attention.wqkv.bias": ((HEADS + 2 * KV_HEADS) * HEAD_DIM,)}
                shapes |= {block + "attention.wo.bias": (HIDDEN,)}
            shapes |= {block + f"feed_forward.{name}.weight": (FFN, HIDDEN) for name in ("w1", "w3")}
            shapes |= {block + "feed_forward.w2.weight": (HIDDEN, FFN)}
        else:
            shapes |= {block + f"{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                shapes |= {block + f"self_attn.{name}_proj.weight": (heads * HEAD_DIM, HIDDEN)}
                shapes |= {block + f"self_attn.{name}_proj.bias": (heads * HEAD_DIM,)}
            shapes |= {block + "self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
            shapes |= {block + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
            shapes |= {block + "mlp.down_proj.weight": (HIDDEN, FFN)}
    embed, head = (
        ("language_model.model.tok_embeddings.weight", "language_model.output.weight")
        if llm["architectures"] == ["InternLM2ForCausalLM"]
        else ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    )
    shapes |= {embed: (llm["vocab_size"], HIDDEN)}
    if not llm.get("tie_word_embeddings"):
        shapes |= {head: (llm["vocab_size"], HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    scale = {1: 0.3, 2: 0.15, 3: 0.3, 4: 0.05}
    tensors = {name: torch.randn(shape, generator=generator) * scale[len(shape)] for name, shape in shapes.items()}
    return {
        name: tensor + 1 if "norm" in name and name.endswith("weight") else tensor for name, tensor in tensors.items()
    }


def write_checkpoint(folder: Path, text: str, sentencepiece_model: bytes, **changes) -> Path:
    """A tiny checkpoint in two shards."""
    folder.mkdir()
    rows = internlm2_tokenizer(folder, sentencepiece_model) if text == "InternLM2" else qwen2_tokenizer(folder)
    config = chat_config(text, rows)
    llm = config["llm_config"] | changes.pop("llm_config", {})
    config |= changes | {"llm_config": llm}
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(folder, chat_tensors(config))
    return folder


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# The remote code's forward, over the tensors as they lie in the checkpoint.


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def vision_forward(w: dict[str, torch.Tensor], config: dict, pixels: torch.Tensor) -> torch.Tensor:
    """InternViT, pixel shuffle and `mlp1`: pixels of shape (tiles, 3, 56, 56) to (tiles, 4, HIDDEN)."""
    embed = "vision_model.embeddings."
    patches = F.conv2d(
        pixels, w[embed + "patch_embedding.weight"], w[embed + "patch_embedding.bias"], stride=14
    ).flatten(2)
    x = torch.cat([w[embed + "class_embedding"].expand(len(pixels), -1, -1), patches.transpose(1, 2)], 1)
    x = x + w[embed + "position_embedding"]
    for layer in range(LAYERS):
        block = f"vision_model.encoder.layers.{layer}."

        def norm(x: torch.Tensor, name: str, block: str = block) -> torch.Tensor:
            if config["norm_type"] == "rms_norm":
                return rms_norm(x, w[block + name + ".weight"], 1e-6)
            return F.layer_norm(x, (VIT_HIDDEN,), w[block + name + ".weight"], w[block + name + ".bias"], 1e-6)

        q, k, v = F.linear(norm(x, "norm1"), w[block + "attn.qkv.weight"], w.get(block + "attn.qkv.bias")).chunk(3, -1)
        if config["qk_normalization"]:
            q, k = (rms_norm(y, w[block + f"attn.{name}_norm.weight"], 1e-6) for y, name in ((q, "q"), (k, "k")))
        q, k, v = (y.unflatten(-1, (VIT_HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), w[block + "attn.proj.weight"], w[block + "attn.proj.bias"])
        x = x + mixed * w[block + "ls1"]
        up = F.gelu(F.linear(norm(x, "norm2"), w[block + "mlp.fc1.weight"], w[block + "mlp.fc1.bias"]))
        x = x + F.linear(up, w[block + "mlp.fc2.weight"], w[block + "mlp.fc2.bias"]) * w[block + "ls2"]
    # Pixel shuffle, version 2: a token is a 2 x 2 square of patches, the patches of a square row by row.
    grid = x[:, 1:].unflatten(1, (GRID, GRID))
    squares = [grid[:, row::2, column::2] for row, column in product(range(2), range(2))]
    x = torch.cat(squares, -1).flatten(1, 2)
    x = F.layer_norm(x, (4 * VIT_HIDDEN,), w["mlp1.0.weight"], w["mlp1.0.bias"])
    return F.linear(F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"])), w["mlp1.3.weight"], w["mlp1.3.bias"])


def rotary(x: torch.Tensor, llm: dict) -> torch.Tensor:
    """Rotate (heads, tokens, HEAD_DIM); dynamic NTK stretches the base where the sequence is over-long."""
    tokens, base = x.shape[1], float(llm["rope_theta"])
    scaling = llm["rope_scaling"] or {}
    if scaling.get("type") == "dynamic" and tokens > llm["max_position_embeddings"]:
        stretch = scaling["factor"] * tokens / llm["max_position_embeddings"] - (scaling["factor"] - 1)
        base *= stretch ** (HEAD_DIM / (HEAD_DIM - 2))
    positions = torch.arange(tokens) / (scaling["factor"] if scaling.get("rope_type") == "linear" else 1)
    angles = torch.outer(positions, base ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = angles.cos(), angles.sin()
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def project(
    w: dict[str, torch.Tensor], x: torch.Tensor, block: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one layer, one head each after the other: (heads, tokens, HEAD_DIM)."""
    if block + "attention.wqkv.weight" in w:
        fused = F.linear(x, w[block + "attention.wqkv.weight"], w.get(block + "attention.wqkv.bias")).unflatten(
            -1, (KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM)
        )
        heads = [fused[:, group, head] for group in range(KV_HEADS) for head in range(HEADS // KV_HEADS)]
        keys, values = ([fused[:, group, which] for group in range(KV_HEADS)] for which in (-2, -1))
        return torch.stack(heads), torch.stack(keys), torch.stack(values)
    split = (
        F.linear(x, w[block + f"self_attn.{name}_proj.weight"], w[block + f"self_attn.{name}_proj.bias"])
        for name in "qkv"
    )
    return tuple(y.unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for y in split)


def chat_forward(
    w: dict[str, torch.Tensor], config: dict, ids: torch.Tensor, pixels: torch.Tensor, image_id: int
) -> torch.Tensor:
    """Logits of one sequence, shape (tokens, rows)."""
    llm = config["llm_config"]
    internlm2 = llm["architectures"] == ["InternLM2ForCausalLM"]
    embeddings = w[
        "language_model.model.tok_embeddings.weight" if internlm2 else "language_model.model.embed_tokens.weight"
    ]
    names = (
        ("attention_norm", "ffn_norm", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        if internlm2
        else (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    )
    x = embeddings[ids].clone()
    x[ids == image_id] = vision_forward(w, config["vision_config"], pixels).flatten(0, 1)
    for layer in range(LAYERS):
        block = f"language_model.model.layers.{layer}."
        norm1, norm2, out, gate, up, down = (w[f"{block}{name}.weight"] for name in names)
        q, k, v = project(w, rms_norm(x, norm1, 1e-5), block)
        q, k = rotary(q, llm), rotary(k, llm)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 0) for y in (k, v))
        future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        weights = ((q @ k.mT) / math.sqrt(HEAD_DIM)).masked_fill(future, -math.inf).softmax(-1)
        out_bias = w.get(f"{block}{names[2]}.bias")
        x = x + F.linear((weights @ v).transpose(0, 1).flatten(1), out, out_bias)
        y = rms_norm(x, norm2, 1e-5)
        x = x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)
    head = w.get("language_model.output.weight" if internlm2 else "language_model.lm_head.weight", embeddings)
    return F.linear(rms_norm(x, w["language_model.model.norm.weight"], 1e-5), head)


def messages(question: str, n_images: int = 1) -> list[dict]:
    return [
        {"role": "system", "content": "Grade each step."},
        {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}]},
    ]


@pytest.mark.parametrize(
    ("text", "llm"),
    [
        ("InternLM2", {}),
        ("InternLM2", {"rope_scaling": None}),
        ("InternLM2", {"rope_scaling": {"factor": 3.0, "rope_type": "linear"}, "bias": True}),
        ("Qwen2", {}),
        ("Qwen2", {"tie_word_embeddings": True, "rope_scaling": None}),
    ],
    ids=["internlm2-dynamic", "internlm2-plain", "internlm2-linear-bias", "qwen2-dynamic", "qwen2-tied"],
)
def test_converted_model_has_the_logits_of_the_remote_code(tmp_path, sentencepiece_model, text, llm):
    source = write_checkpoint(tmp_path / "chat", text, sentencepiece_model, llm_config=llm)
    report = convert_internvl_chat(source, tmp_path / "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat", "native"]  # nothing temporary is left
    tensors = load_shards(source)
    end = json.loads((tmp_path / "native" / "generation_config.json").read_text())["eos_token_id"]
    assert AutoProcessor.from_pretrained(tmp_path / "native").tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    prompt = processor.apply_chat_template(messages("How many red tiles? +"), add_generation_prompt=True)
    inputs = processor(text=prompt, images=[picture("red", (112, 56))], add_special_tokens=False, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3  # two tiles and the thumbnail
    ids = inputs["input_ids"][0]
    image_id = processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (ids == image_id).sum() == 3 * 4
    assert len(ids) > 32  # over max_position_embeddings, where dynamic NTK sets in
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        short = model(input_ids=ids[None, -16:]).logits[0]
    config = json.loads((source / "config.json").read_text())
    expected = chat_forward(tensors, config, ids, inputs["pixel_values"], image_id)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    no_pixels = torch.zeros(0, 3, 14 * GRID, 14 * GRID)
    torch.testing.assert_close(short, chat_forward(tensors, config, ids[-16:], no_pixels, image_id), atol=1e-4, rtol=0)


def test_tensors_keep_their_precision(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    tensors = {name: tensor.bfloat16() for name, tensor in load_shards(source).items()}
    save_shards(source, tensors)
    convert_internvl_chat(source, tmp_path / "native")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "native")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, tensors["language_model.output.weight"])


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_internlm2_tokenizer_gives_the_ids_of_sentencepiece(tmp_path, sentencepiece_model, dummy_prefix):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_model)
    if dummy_prefix:
        proto.normalizer_spec.add_dummy_prefix = True
        next(piece for piece in proto.pieces if piece.type == 4).type = 1
    source = write_checkpoint(tmp_path / "chat", "InternLM2", proto.SerializeToString())
    convert_internvl_chat(source, tmp_path / "native")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    extra = {"<video>"} if dummy_prefix else {"<video>", "blue"}
    assert tokenizer.get_added_vocab().keys() - added_tokens(source).keys() == extra
    words = re.findall(r"\S+|\s+", " ".join([*CORPUS, *TEXTS]))
    generator = torch.Generator().manual_seed(0)
    shuffled = ["".join(words[i] for i in torch.randint(len(words), (12,), generator=generator)) for _ in range(200)]
    for text in TEXTS + shuffled:
        assert tokenizer(text)["input_ids"] == slow_encode(source, text), text
    assert tokenizer.decode(tokenizer("3 + 2 =\n5 ☃", add_special_tokens=False)["input_ids"]) == "3 + 2 =\n5 ☃"


def test_internlm2_prompt_is_the_remote_codes(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    convert_internvl_chat(source, tmp_path / "native")
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    turns = [*messages("How many?"), {"role": "assistant", "content": "+"}]
    assert processor.apply_chat_template(turns) == (
        "<s><|im_start|>system\nGrade each step.<|im_end|>\n"
        "<|im_start|>user\n<IMG_CONTEXT>\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n+<|im_end|>\n"
    )
    assert processor.image_seq_length == 4
    assert (processor.image_processor.min_patches, processor.image_processor.max_patches) == (1, 4)
    encoded = processor.apply_chat_template(turns[:1], tokenize=True, return_dict=True)
    assert encoded["input_ids"][0].count(1) == 1  # one <s>, not two


def test_converted_folder_scores_as_visualprm(tmp_path, sentencepiece_model):
    """The remote code's own way: P(+) after the first tokens of each assistant turn, "+" standing in every turn."""
    llm = {"max_position_embeddings": 4096}  # as in the real ones, dynamic NTK is for longer prompts
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model, llm_config=llm)
    convert_internvl_chat(source, tmp_path / "native")
    prm = ProcessRewardModel.from_pretrained(tmp_path / "native", step_format="visualprm")
    image, steps = picture("red", (112, 56)), ["3 in the row.", "So 4."]
    scores = prm.score([image], "How many?", steps)

    turn, tiles = "<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n", 3
    prompt = (
        f"<|im_start|>system\n{VISUALPRM_SYSTEM}<|im_end|>\n<|im_start|>user\n### Question:\n"
        f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>\nHow many?\n\n### Solution Process:\n{steps[0]}{turn}"
        f"<|im_start|>user\n{steps[1]}{turn}"
    )
    ids = torch.tensor(slow_encode(source, prompt))
    pixels = prm.processing_class.image_processor([image], return_tensors="pt")["pixel_values"]
    added = added_tokens(source)
    config = json.loads((source / "config.json").read_text())
    logits = chat_forward(load_shards(source), config, ids, pixels, added["<IMG_CONTEXT>"])
    plus, minus = (slow_encode(source, sign)[1] for sign in "+-")
    ends = [place for place in range(len(ids) - 1) if ids[place : place + 2].tolist() == [plus, added["<|im_end|>"]]]
    expected = [logits[place - 1, [plus, minus]].softmax(-1)[0].item() for place in ends]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


class Hub(BaseHTTPRequestHandler):
    """Serves the files of `folder` as the repository org/chat, and remembers which were asked for."""

    folder: Path
    asked: set[str]

    def do_GET(self):
        self.do_HEAD()

    def do_HEAD(self):
        if "/revision/" in self.path:
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            content = json.dumps({"id": "org/chat", "sha": "0" * 40, "siblings": files}).encode()
        elif "/tree/" in self.path:
            sizes = [(path.name, path.stat().st_size) for path in self.folder.iterdir()]
            files = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
            content = json.dumps(files).encode()
        else:
            name = self.path.rpartition("/")[2]
            self.asked.add(name)
            content = (self.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def test_command_from_the_hub_in_a_fresh_process_without_remote_code(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    for name in ("modeling_internvl_chat.py", "configuration_internvl_chat.py", "tokenization_internlm2.py"):
        (source / name).write_text("raise SystemExit('remote code ran')")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    code = (
        "import sys; from trl_mprm.cli import main; from transformers import AutoModelForImageTextToText as Model;"
        "from transformers import AutoProcessor as Processor; assert main(['convert', 'org/chat', sys.argv[1]]) == 0;"
        "print(*(type(auto.from_pretrained(sys.argv[1])).__name__ for auto in (Model, Processor)))"
    )
    handler = type("OneHub", (Hub,), {"folder": source, "asked": set()})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "native"], env=env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    table, _, loaded = done.stdout.partition("model and processor: ")
    assert re.search(r"text +Llama\n", table) and re.search(r"image_tokens +4\n", table)
    assert loaded.split() == [str(tmp_path / "native"), "InternVLForConditionalGeneration", "InternVLProcessor"]
    weights = {"model.safetensors.index.json", *(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))}
    assert handler.asked == {"config.json", "tokenizer.model", "tokenizer_config.json"} | weights
    assert not [path for path in (tmp_path / "native").iterdir() if path.suffix in (".py", ".bin")]


def test_qwen2_tokenizer_keeps_its_ids(tmp_path, sentencepiece_model, capsys):
    source = write_checkpoint(tmp_path / "chat", "Qwen2", sentencepiece_model)
    assert main(["convert", str(source), str(tmp_path / "native")]) == 0
    assert re.search(r"text +Qwen2\n", capsys.readouterr().out)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "native").tokenizer
    added = json.loads((source / "added_tokens.json").read_text())
    assert tokenizer.get_added_vocab() == added | {"<video>": len(tokenizer) - 1}
    assert tokenizer("Yes<|im_end|>No")["input_ids"] == [257, added["<|im_end|>"], 258]
    assert tokenizer.chat_template.startswith("{% for message")  # no first token


def test_native_tokenizer_in_place_of_the_checkpoints(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    convert_internvl_chat(source, tmp_path / "first")
    (source / "tokenizer.model").unlink()
    assert_one_line(source, tmp_path, "no tokenizer.model: download it, or pass a native tokenizer")
    convert_internvl_chat(source, tmp_path / "second", tokenizer=tmp_path / "first")
    first, second = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.tokenizer(TEXTS)["input_ids"] == second.tokenizer(TEXTS)["input_ids"]
    assert first.chat_template == second.chat_template


def assert_one_line(source: Path, tmp_path: Path, expected: str, error: type = Exception) -> None:
    """The conversion fails with one line that holds `expected`, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as caught:
        convert_internvl_chat(source, tmp_path / "native")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_bad_tensors_are_named(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    tensors = load_shards(source)
    wqkv = "language_model.model.layers.1.attention.wqkv.weight"
    for changed, expected in (
        ({wqkv: None}, f"lacks tensors: {wqkv};"),
        (
            {"vision_model.encoder.layers.0.ls1": None, "mlp1.3.bias": None},
            "lacks tensors: mlp1.3.bias, vision_model",
        ),
        ({"language_model.lora.A": torch.zeros(1)}, "has unexpected tensors: language_model.lora.A;"),
        ({wqkv: tensors[wqkv][:-HEAD_DIM]}, f"{wqkv} has shape"),
        ({wqkv: tensors[wqkv][:-1]}, f"{wqkv} has shape"),
        ({"vision_model.encoder.layers.0.attn.qkv.bias": torch.zeros(95)}, "attn.qkv.bias has shape [95]"),
        ({"mlp1.0.bias": torch.zeros(5)}, "mlp1.0.bias has shape [5], config.json asks for [128]"),
    ):
        merged = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_shards(source, merged)
        assert_one_line(source, tmp_path, expected, ValueError)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llava"}, "model_type 'llava', expected internvl_chat"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "text decoder Phi3ForCausalLM"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"select_layer": -4}, "select_layer -4"),
        ({"template": "internlm2-chat"}, "template 'internlm2-chat'"),
        ({"use_thumbnail": False}, "use_thumbnail False"),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 4.0}}}, "rope_scaling 'yarn'"),
        ({"llm_config": {"rope_pos_id_version": "v2pe"}}, "rope_pos_id_version 'v2pe'"),
    ],
)
def test_other_layouts_are_refused(tmp_path, sentencepiece_model, changes, expected):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model, **changes)
    assert_one_line(source, tmp_path, expected, ValueError)


def test_incomplete_folders_are_refused(tmp_path, sentencepiece_model):
    whole = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    (source := broken("no-config")).joinpath("config.json").unlink()
    assert_one_line(source, tmp_path, "has no config.json", FileNotFoundError)
    (source := broken("bad-config")).joinpath("config.json").write_text("{")
    assert_one_line(source, tmp_path, "config.json is not JSON", ValueError)
    config = json.loads((whole / "config.json").read_text())
    del config["vision_config"]["norm_type"]
    (source := broken("short-config")).joinpath("config.json").write_text(json.dumps(config))
    assert_one_line(source, tmp_path, "config.json lacks 'norm_type'", ValueError)
    (source := broken("no-shard")).joinpath("model-00002-of-00002.safetensors").unlink()
    assert_one_line(source, tmp_path, "model-00002-of-00002.safetensors", ValueError)
    (source := broken("short-shard")).joinpath("model-00001-of-00002.safetensors").write_bytes(b"12345678")
    assert_one_line(source, tmp_path, "model-00001-of-00002.safetensors", ValueError)
    source = broken("pickle")
    for file in source.glob("model*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    assert_one_line(source, tmp_path, "the pickle pytorch_model.bin, which is never opened", FileNotFoundError)
    (source := broken("bad-tokenizer")).joinpath("tokenizer.model").write_bytes(b"\xff" * 9)
    assert_one_line(source, tmp_path, "tokenizer.model is no sentencepiece model", ValueError)
    (source := broken("bare-tokenizer")).joinpath("tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert_one_line(source, tmp_path, "lacks added_tokens_decoder, eos_token, pad_token, unk_token", ValueError)
    config = json.loads((whole / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 100
    (source := broken("other-tokenizer")).joinpath("config.json").write_text(json.dumps(config))
    assert_one_line(source, tmp_path, "<IMG_CONTEXT> no id below 100", ValueError)
    (tmp_path / "native").mkdir()
    assert_one_line(whole, tmp_path, "native exists already", FileExistsError)


def test_sentencepiece_models_that_cannot_be_converted_for_sure_are_refused(tmp_path, sentencepiece_model):
    source = write_checkpoint(tmp_path / "chat", "InternLM2", sentencepiece_model)
    for part, field, value, expected in (
        ("trainer_spec", "model_type", 1, "model type 1"),
        ("normalizer_spec", "remove_extra_whitespaces", True, "remove_extra_whitespaces"),
        ("normalizer_spec", "precompiled_charsmap", b"1", "a character map"),
        ("normalizer_spec", "add_dummy_prefix", True, "user-defined pieces beside a dummy prefix"),
    ):
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(sentencepiece_model)
        setattr(getattr(proto, part), field, value)
        (source / "tokenizer.model").write_bytes(proto.SerializeToString())
        assert_one_line(source, tmp_path, expected, ValueError)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(sentencepiece_model)
    next(piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) == 2).type = 5
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert_one_line(source, tmp_path, "merges into unused pieces", ValueError)
    source = write_checkpoint(tmp_path / "moved", "InternLM2", sentencepiece_model)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    last = max(map(int, settings["added_tokens_decoder"]))
    settings["added_tokens_decoder"][str(last + 5)] = settings["added_tokens_decoder"].pop(str(last))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_one_line(source, tmp_path, f"gives '</box>' the id {last + 5}", ValueError)


def test_a_known_checkpoint_takes_its_format_along(tmp_path, sentencepiece_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("OpenGVLab").mkdir()
    write_checkpoint(Path("OpenGVLab/VisualPRM-8B"), "InternLM2", sentencepiece_model)
    convert_internvl_chat("OpenGVLab/VisualPRM-8B", "native")
    assert StepFormat.load("native") == published_format("visualprm")
    # The system message that its config.json sets is the one that its remote code writes.
    write_checkpoint(Path("OpenGVLab/VisualPRM-8B-v1_1"), "InternLM2", sentencepiece_model, system_message="Judge.")
    convert_internvl_chat("OpenGVLab/VisualPRM-8B-v1_1", "judge")
    (system, *others), (_, *expected) = StepFormat.load("judge").messages, published_format("visualprm").messages
    assert system == ("system", "Judge.") and others == expected


@pytest.mark.parametrize("name", ["nobody/nothing", "red.png"])
def test_a_checkpoint_that_is_nowhere(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    picture("red").save("red.png")
    assert main(["convert", name, "native"]) == 2
    assert capsys.readouterr().err == f"error: {name}: no such folder here, and the Hub cannot be reached\n"
