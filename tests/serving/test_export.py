"""What is exported for vLLM: whole, loadable, with a chat template that writes our tokens and a check that travels."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import Served, nf4
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.cli import main
from trl_mprm.models.adapters import fill_peft_config
from trl_mprm.models.loading import add_marker, load_model, load_processing_class
from trl_mprm.models.vllm import SERVED
from trl_mprm.prompting.rendering import render_rows
from trl_mprm.prompting.tokens import tokenizer_of
from trl_mprm.serving.export import example_rows, export_for_vllm
from trl_mprm.serving.messages import pooling_request
from trl_mprm.serving.server import create_app


def load(tiny_folders, architecture, quantization_config=None):
    folder = tiny_folders[architecture]
    model = load_model(folder, quantization_config)
    processing_class = load_processing_class(folder, architecture not in ("qwen2", "llama"))
    add_marker(model, processing_class, StepFormat())
    return ProcessRewardModel(model, processing_class)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen2_5_vl", "qwen3_vl"])
def test_a_whole_export(architecture, tiny_folders, tmp_path):
    prm, folder = load(tiny_folders, architecture), tmp_path / "out"
    told = export_for_vllm(prm, folder, "mine")
    assert told["architecture"] in SERVED and told["classes"] == "No Yes"
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", config)):
        assert (part["classifier_from_token"], part["method"], part["num_labels"]) == (
            ["No", "Yes"],
            "no_post_processing",
            2,
        )
    assert "tie_word_embeddings" in config.get("text_config", {"tie_word_embeddings": None})
    AutoConfig.from_pretrained(folder)
    marker = prm.step_ids.marker[0]
    page = (folder / "SERVE.md").read_text()
    assert f'"step_tag_id":{marker}' in page and f"vllm serve {folder}" in page and "base64,iVBOR" not in page
    assert not list(folder.glob("*.bin")) and not list(tmp_path.glob(".out*"))
    # again ours: the same scores
    rows = example_rows(prm.reads_images)
    loaded = ProcessRewardModel.from_pretrained(folder)
    assert sum(loaded.score_batch(rows), []) == pytest.approx(sum(prm.score_batch(rows), []), abs=1e-6)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen2_5_vl", "qwen3_vl"])
def test_the_chat_template_writes_our_tokens(architecture, tiny_folders, tmp_path):
    """As a server makes tokens of a request: one text from the template, tokenised whole."""
    prm = load(tiny_folders, architecture)
    export_for_vllm(prm, tmp_path / "out")
    loader = AutoProcessor if prm.reads_images else AutoTokenizer
    processing_class = loader.from_pretrained(tmp_path / "out")
    for row in example_rows(prm.reads_images):
        (ours,), _ = render_rows([row], prm.processing_class, prm.step_format)
        request = pooling_request(row, prm.step_format, "prm")
        for content in (
            request["messages"][-1]["content"],
            [{"type": "text", "text": request["messages"][-1]["content"]}],
        ):
            messages = [*request["messages"][:-1], {"role": "assistant", "content": content}]
            for part in messages[0]["content"] if isinstance(messages[0]["content"], list) else []:
                part["type"] = "image" if part["type"] == "image_url" else part["type"]
            text = processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
            if prm.reads_images:
                ids = processing_class(text=[text], images=row["images"], add_special_tokens=False)["input_ids"][0]
            else:
                ids = tokenizer_of(processing_class)(text, add_special_tokens=False)["input_ids"]
            assert list(ids) == ours.input_ids


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_an_adapter_is_merged(quantized, tiny_folders, tmp_path):
    prm = load(tiny_folders, "qwen2_5_vl", nf4() if quantized else None)
    peft_config = fill_peft_config(LoraConfig(r=4, init_lora_weights=False), prm.model, prm.step_ids.marker[0])
    adapted = ProcessRewardModel(get_peft_model(prm.model, peft_config), prm.processing_class)
    rows = example_rows(images=True)
    expected = adapted.score_batch(rows)
    export_for_vllm(adapted, tmp_path / "out")
    exported = ProcessRewardModel.from_pretrained(tmp_path / "out")
    assert sum(exported.score_batch(rows), []) == pytest.approx(sum(expected, []), abs=1e-4)
    stored = [case["scores"] for case in json.loads((tmp_path / "out" / "parity.json").read_text())["cases"]]
    assert sum(stored, []) == pytest.approx(sum(expected, []), abs=1e-4)


def test_the_check_travels(tiny_folders, tmp_path, capsys):
    prm = load(tiny_folders, "qwen2_5_vl")
    export_for_vllm(prm, tmp_path / "out")
    check = [sys.executable, "-S", "-I", str(tmp_path / "out" / "check.py")]  # no package but Python's own
    with Served(create_app(prm)) as server:
        done = subprocess.run([*check, server.url], capture_output=True, text=True)
        assert done.returncode == 0 and "verdict: EQUAL" in done.stdout and "steps: 11\nrows: 11" in done.stdout
        assert main(["export", "unused", str(tmp_path / "out"), "--check", server.url]) == 0
        assert "EQUAL" in capsys.readouterr().out
    with torch.no_grad():  # other weights
        prm.model.get_output_embeddings().weight[prm.step_ids.good] += 1
    with Served(create_app(prm)) as server:
        done = subprocess.run([*check, server.url], capture_output=True, text=True)
        assert done.returncode == 1 and "DIFFERENT: the scores do not agree" in done.stdout
    with Served(create_app(prm, name="other")) as server:
        done = subprocess.run([*check, server.url], capture_output=True, text=True)
        assert done.returncode == 1 and "answered 404" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*check, "http://127.0.0.1:9"], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot be reached" in done.stderr and done.stderr.count("\n") == 1


def test_refusals_write_nothing(tiny_folders, tmp_path, capsys):
    def refused(prm, message, folder="new"):
        with pytest.raises(ValueError, match=message):
            export_for_vllm(prm, tmp_path / folder)
        assert not (tmp_path / "new").exists()

    prm = load(tiny_folders, "qwen2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    refused(prm, "is not empty: name a new folder", "full")
    published = StepFormat("<prm>", messages=(("user", "{question}{steps}"),))
    refused(ProcessRewardModel(prm.model, prm.processing_class, published), "published layout")
    refused(load(tiny_folders, "internvl"), "vLLM did not give equal scores for InternVLForConditionalGeneration")
    prm.processing_class.chat_template = None
    refused(prm, "has no chat template")
    capsys.readouterr()
    assert main(["export", "no/such-model/here", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
