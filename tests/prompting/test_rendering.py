"""The one rendering, spelled out."""

import pytest
import torch
from helpers import picture
from PIL import Image

from trl_mprm.data.images import open_image
from trl_mprm.models.loading import add_marker, load_model, load_processing_class
from trl_mprm.models.tiny import tiny_tokenizer
from trl_mprm.prompting.rendering import render_batch
from trl_mprm.prompting.step_format import StepFormat
from trl_mprm.prompting.tokens import tokenizer_of


FORMAT = StepFormat()
TEXT = {
    "qwen2_5_vl": (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>How many?<|im_end|>\n"
        "<|im_start|>assistant\none<prm>\n\nso two<prm>"
    ),
    "internvl": (
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>How many?<|im_end|>\n"
        "<|im_start|>assistant\none<prm>\n\nso two<prm>"
    ),
    "qwen2": "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\none<prm>\n\nso two<prm>",
}


def processor(folder):
    model = load_model(folder)
    processing_class = load_processing_class(folder, vision=model.config.model_type != "qwen2")
    add_marker(model, processing_class, FORMAT)
    return processing_class


@pytest.mark.parametrize("architecture", TEXT)
def test_text_and_marker_positions(architecture, tiny_folders):
    processing_class = processor(tiny_folders[architecture])
    images = [] if architecture == "qwen2" else [picture("red", (56, 28))]
    row = {"images": images, "prompt": "How many?", "completions": ["one", "so two"]}
    batch, markers = render_batch([row], processing_class, FORMAT)
    tokenizer = tokenizer_of(processing_class)
    assert tokenizer.decode(batch["input_ids"][0]) == TEXT[architecture]
    assert markers[0].nonzero().flatten().tolist() == [
        index for index, token in enumerate(batch["input_ids"][0]) if token == tokenizer.convert_tokens_to_ids("<prm>")
    ]
    conversation = {**row, "prompt": [{"role": "user", "content": "How many?"}]}
    assert torch.equal(render_batch([conversation], processing_class, FORMAT)[0]["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("architecture", TEXT)
def test_a_batch_is_its_rows(architecture, tiny_folders):
    """Rows with none, one and two images together render as each alone; padding changes nothing."""
    processing_class = processor(tiny_folders[architecture])
    pictures = [[picture("red")], [], [picture("blue"), picture("red", (84, 28))]]
    rows = [
        {"images": [] if architecture == "qwen2" else images, "prompt": "q" * (index + 1), "completions": ["a"] * 3}
        for index, images in enumerate(pictures)
    ]
    batch, markers = render_batch(rows, processing_class, FORMAT)
    alone = [render_batch([row], processing_class, FORMAT) for row in rows]
    for index, (single, single_markers) in enumerate(alone):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, :length], single["input_ids"][0])
        assert batch["attention_mask"][index].sum() == length
        assert torch.equal(markers[index, :length], single_markers[0]) and not markers[index, length:].any()
    if architecture != "qwen2":
        pixels = torch.cat([single["pixel_values"] for single, _ in alone if "pixel_values" in single])
        assert torch.equal(batch["pixel_values"], pixels)


def test_a_rollout_cannot_forge_a_marker(tiny_folders):
    tokenizer = processor(tiny_folders["qwen2"])
    row = {"prompt": "q", "completions": ["good<prm>\n\nYes", "<|im_end|>"]}
    batch, markers = render_batch([row], tokenizer, FORMAT)
    assert markers.sum() == 2 == (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<prm>")).sum()
    with pytest.raises(ValueError, match="row 0 of the batch: the prompt contains the special token '<prm>'"):
        render_batch([{**row, "prompt": "q<prm>"}], tokenizer, FORMAT)


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": [{"type": "text", "text": "q<|im_"}, {"type": "text", "text": "end|>"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "q<p"}, {"type": "text", "text": "rm>"}]}],
        [{"role": "user", "content": "q<p"}, {"role": "user", "content": "rm>"}],
        [{"role": "user<|im_end|>", "content": "q"}],
        [{"role": "user", "content": "q", "name": "<prm>"}],
        [{"role": "user", "content": "q", "tool_calls": [{"function": {"arguments": {"<prm>": 1}}}]}],
    ],
)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen2_5_vl"])
def test_a_chat_cannot_smuggle_special_tokens(prompt, architecture, tiny_folders):
    processing_class = processor(tiny_folders[architecture])
    with pytest.raises(ValueError, match="row 0 of the batch: the prompt contains the special token '<"):
        render_batch([{"prompt": prompt, "completions": ["a"]}], processing_class, FORMAT)


def test_a_marker_that_the_template_writes_is_counted(tiny_folders):
    tokenizer = processor(tiny_folders["qwen2"])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n{{ '<p' + 'rm>' }}")
    with pytest.raises(ValueError, match="row 0 of the batch: 2 markers came out for 1 steps: the question or the"):
        render_batch([{"prompt": "q", "completions": ["a"]}], tokenizer, FORMAT)


@pytest.mark.parametrize("message", ["q", {"role": "user"}, {"role": "user", "content": None}, {"content": [3]}])
def test_messages_that_are_none(message, tiny_folders):
    with pytest.raises(ValueError, match="row 0 of the batch: message 0 "):
        render_batch([{"prompt": [message], "completions": ["a"]}], processor(tiny_folders["qwen2"]), FORMAT)


def test_without_chat_template_the_prompt_is_plain_text():
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<prm>"], special_tokens=True)
    batch, _ = render_batch([{"prompt": "How many?", "completions": ["one", "two"]}], tokenizer, FORMAT)
    assert tokenizer.decode(batch["input_ids"][0]) == "How many?\n\none<prm>\n\ntwo<prm>"


def test_bad_rows_are_named(tiny_folders, tmp_path):
    tokenizer = processor(tiny_folders["qwen2"])
    good = {"prompt": "q", "completions": ["a"], "rollout_id": "x:0"}
    for change, message in [
        ({"completions": []}, "row x:1: `completions` is empty"),
        ({"completions": ["a", "  "]}, "row x:1: step 1 is '  ', expected text"),
        ({"images": [picture("red")]}, "row x:1: 1 images came with a text-only model"),
    ]:
        with pytest.raises(ValueError, match=message):
            render_batch([good, {**good, "rollout_id": "x:1", **change}], tokenizer, FORMAT)
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match="row x:0: cannot read image .*half.png"):
        render_batch([{**good, "images": [tmp_path / "half.png"]}], processor(tiny_folders["internvl"]), FORMAT)


def test_pictures_that_cannot_be_opened(tmp_path):
    picture("red").save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    for image in (
        tmp_path / "whole.png",
        {"bytes": data, "path": None},
        {"bytes": None, "path": tmp_path / "whole.png"},
    ):
        assert open_image(image).tobytes() == picture("red").tobytes()
    for image, message in (
        (tmp_path / "none.png", "cannot read image .*none.png: .*No such file"),
        (tmp_path / "half.png", "cannot read image .*half.png: "),
        (Image.open(tmp_path / "half.png"), "cannot read image .*: "),
        ("\0", "cannot read image .*: embedded null"),
        ({"bytes": None, "path": str(tmp_path / "none.png")}, "cannot read image .*none.png: .*No such file"),
        ({"bytes": data[:99], "path": None}, "cannot read image in memory: "),
        ({"bytes": b"", "path": "a.png"}, "cannot read image a.png: "),
        ({"bytes": None, "path": None}, "image is {'bytes': None, 'path': None}, expected a PIL image, a path, or"),
        ({}, "image is {}, expected"),
        (None, "image is None, expected a PIL image, a path, or a dict of its `bytes` or `path`"),
        (3, "image is 3, expected"),
        (data, "image is b.*, expected"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_image(image)
        assert len(str(error.value)) < 300


def test_format_is_saved_beside_the_weights(tmp_path):
    other = StepFormat("<step>", ("+", "-"), "\n")
    other.save(tmp_path)
    assert StepFormat.load(tmp_path) == other
    with pytest.raises(FileNotFoundError, match="expected a checkpoint saved by ProcessRewardTrainer"):
        StepFormat.load(tmp_path / "elsewhere")
