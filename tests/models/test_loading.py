"""Folders of models that are not what they should be: refused in one line, and no code of theirs is run."""

import json
import shutil
import time

import pytest
import torch
from datasets import Dataset
from helpers import rollouts
from peft import LoraConfig

from trl_mprm import ProcessRewardConfig, ProcessRewardModel, ProcessRewardTrainer
from trl_mprm.models.loading import check_template, load_model, load_processing_class


@pytest.fixture(scope="module")
def adapter(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    args = ProcessRewardConfig(str(folder), report_to=[], use_cpu=True)
    rows = Dataset.from_list(rollouts("qwen2"))
    ProcessRewardTrainer(tiny_folders["qwen2"], args, train_dataset=rows, peft_config=LoraConfig(r=2)).save_model()
    return folder


def changed(folder, name, **values):
    """A copy of a folder, one of whose JSON files says something else."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_code_of_a_model_is_not_run_and_not_asked_for(adapter, tiny_folders, tmp_path, monkeypatch):
    """Without a word on remote code transformers asks on the terminal, and runs it after a `y`."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    model = shutil.copytree(tiny_folders["qwen2"], tmp_path / "model")
    changed(
        model, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    )
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    onto = shutil.copytree(adapter, tmp_path / "adapter")
    changed(onto, "adapter_config.json", base_model_name_or_path=str(model))
    changed(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    for load in (
        lambda: load_model(str(model)),
        lambda: ProcessRewardModel.from_pretrained(onto),
        lambda: load_processing_class(str(model), vision=False),
    ):
        with pytest.raises(
            ValueError, match=r"model comes with code of its own, which is not run: .*`trl-mprm convert`"
        ):
            load()
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_cut_or_not_there(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["qwen2"], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is cut short or damaged \(.*download or save it again"):
        load_model(str(folder))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(
        ValueError, match="model.safetensors is a Git LFS pointer, not the weights: run `git lfs pull`"
    ):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("process_reward_config.json", {"reward_tokens": "YesNo"}, "reward_tokens is 'YesNo', expected a list of two"),
        ("process_reward_config.json", {"marker": 7}, "marker is 7, expected text"),
        ("process_reward_config.json", {"messages": "x"}, "messages is 'x', expected a list of pairs"),
        ("adapter_config.json", {"peft_type": "OWN"}, "peft_type is 'OWN', which this PEFT does not know"),
        ("adapter_config.json", {"base_model_name_or_path": None}, "does not say of which model: name the base"),
        ("adapter_config.json", {"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected the id or"),
        (
            "adapter_config.json",
            {"base_model_name_or_path": "/gone/base"},
            r"adapter of /gone/base, .*\(base_model; --base",
        ),
    ],
)
def test_settings_of_an_adapter_that_cannot_be(name, values, message, adapter, tmp_path):
    folder = changed(shutil.copytree(adapter, tmp_path / "adapter"), name, **values)
    with pytest.raises(ValueError, match=message):
        ProcessRewardModel.from_pretrained(folder)


def test_pickled_weights_of_an_adapter_are_refused(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(
        ValueError, match="no adapter_model.safetensors, only adapter_model.bin, a pickle, which is never"
    ):
        ProcessRewardModel.from_pretrained(folder)


def test_an_expression_that_backtracks_is_not_run(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    row = {"prompt": "How many?", "completions": ["one", "two"]}
    expected = ProcessRewardModel.from_pretrained(folder).score_batch([row])
    changed(folder, "adapter_config.json", target_modules="(([a-z0-9._]+)+)+!")
    start = time.process_time()
    assert ProcessRewardModel.from_pretrained(folder).score_batch([row]) == expected
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", r"cannot be rendered \(no\): take the model's own chat_template"),
        ("{% for message in messages %}{{ message.nothing.at_all }}{% endfor %}", "cannot be rendered"),
        (
            "{% for message in messages %}{{ message.role }}{% endfor %}",
            "leaves the question out: it renders 'How many",
        ),
    ],
)
def test_a_template_that_cannot_be(template, message, tiny_folders):
    tokenizer = load_processing_class(tiny_folders["qwen2"], vision=False)
    check_template(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        check_template(tokenizer)
