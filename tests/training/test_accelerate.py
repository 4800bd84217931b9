"""
The launcher's config files, each read by accelerate itself; DDP and FSDP2 on two real processes without a GPU.

`recipes/accelerate/fsdp2.yaml` in, the environment that `accelerate launch` gives its processes out:

    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2_5_VLDecoderLayer", ...}
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from datasets import load_from_disk
from helpers import FACTS, as_dataset, config, make_rows, run_processes
from peft import LoraConfig
from safetensors.torch import load_file

from trl_mprm import ProcessRewardTrainer
from trl_mprm.cli import main
from trl_mprm.models.loading import load_model
from trl_mprm.models.tiny import IMAGE_TOKENS


FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
EXPECTED = {
    "single_gpu": (DistributedType.NO, 1, 1),
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "zero3": (DistributedType.DEEPSPEED, 1, 8),
    "multi_node": (DistributedType.MULTI_GPU, 2, 16),
}


def launch_environment(*argv: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of its processes."""
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*argv, "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # as launch_command does
        return prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """accelerate writes into `os.environ` of who asks."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def test_every_config_is_named_and_has_its_line():
    readme = (FOLDER / "README.md").read_text()
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)
    for name in EXPECTED:
        line = f"accelerate launch --config_file recipes/accelerate/{name}.yaml"
        assert line in readme and line in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_config(name):
    path = str(FOLDER / f"{name}.yaml")
    loaded = load_config_from_file(path)
    assert (loaded.distributed_type, loaded.num_machines, loaded.num_processes) == EXPECTED[name]
    environment = launch_environment("--config_file", path, "--main_process_ip", "127.0.0.1")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "fsdp2":
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    if name == "zero3":
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


@pytest.mark.parametrize("architecture", IMAGE_TOKENS)
def test_wrap_class_is_the_decoder_layer(architecture, tiny_folders, monkeypatch):
    """The class in the README's table is in the model, and all that the plugin wraps are decoder layers."""
    model = load_model(tiny_folders[architecture])
    wrap = FACTS[architecture].wrap
    assert re.search(rf"\| `{wrap}` \|", (FOLDER / "README.md").read_text())
    for name, value in launch_environment("--config_file", str(FOLDER / "fsdp2.yaml")).items():
        if name.startswith("FSDP"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", wrap)
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    (wrapped,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    layers = [module for module in model.modules() if isinstance(module, wrapped)]
    assert layers == list(model.get_decoder().layers)


@pytest.mark.parametrize("architecture", ["llava_onevision", "gemma3"])
def test_why_the_class_is_named(architecture, tiny_folders, monkeypatch):
    """Left to itself, accelerate looks for classes that are not in these models."""
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(ValueError, match="Could not find the transformer layer class"):
        plugin.set_auto_wrap_policy(load_model(tiny_folders[architecture]))


def train(
    model: str, rows: str, output: str, environment: dict[str, str], lora: bool, options: dict, resume: bool = False
) -> None:
    """Two steps of eight rows, on one process or several; `environment` is what the launcher sets."""
    os.environ.update(environment)
    defaults = {
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1)),
        "train_sampling_strategy": "sequential",
    }
    args = config(output, **(defaults | options))
    sharded = environment.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        # accelerate shards on accelerators only; torch does so on a CPU as well. This is the one thing set by hand.
        assert args.distributed_state.distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = ProcessRewardTrainer(
        model=model,
        args=args,
        train_dataset=load_from_disk(rows),
        eval_dataset=load_from_disk(rows).select(range(7)),
        peft_config=LoraConfig(r=4) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        units = [type(module).__name__ for module in trainer.model_wrapped.modules()]
        Path(output, "units.json").write_text(json.dumps(units))


def assert_same(one: Path, two: Path) -> None:
    """The same weights, and the same loss in the last evaluation."""
    weights = [saved(folder) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=0, atol=1e-6), name
    losses = [re.search(r"loss (\d\.\d{4})", (folder / "README.md").read_text())[1] for folder in (one, two)]
    assert losses[0] == losses[1]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def fsdp_environment() -> dict[str, str]:
    environment = launch_environment("--config_file", str(FOLDER / "fsdp2.yaml"), "--mixed_precision", "no")
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.mark.parametrize(
    ("architecture", "lora", "order"),
    [
        ("qwen2_5_vl", False, range(8)),
        # One process has pictures, the other has none.
        ("qwen2_5_vl", True, (0, 1, 3, 4, 2, 5, 2, 5)),
    ],
    ids=["full", "lora-mixed"],
)
def test_fsdp2_on_two_processes_is_one_process(architecture, lora, order, tiny_folders, tmp_path):
    rows = make_rows(images=True)
    as_dataset([rows[index] for index in order]).save_to_disk(tmp_path / "rows")
    fsdp = fsdp_environment()
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in fsdp  # the trainer names it
    for n in (1, 2):
        log, output = tmp_path / f"log{n}", tmp_path / f"out{n}"
        argv = (tiny_folders[architecture], str(tmp_path / "rows"), str(output), fsdp if n == 2 else {}, lora, {})
        assert run_processes(train, *argv, n=n, log=log) == [0] * n, log.read_text()
    units = json.loads((tmp_path / "out2" / "units.json").read_text())
    assert units.count(f"FSDP{FACTS[architecture].wrap}") == 2
    assert_same(tmp_path / "out1", tmp_path / "out2")


def test_fsdp2_resumes_from_its_checkpoint(tiny_folders, tmp_path):
    """Saved after the first step by two processes, resumed by two: the second step is the same to the last bit."""
    as_dataset(make_rows(images=True)).save_to_disk(tmp_path / "rows")
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    for output, resume in (("whole", False), ("resumed", True)):
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "resumed" / "checkpoint-1")
        argv = (tiny_folders["qwen2_5_vl"], str(tmp_path / "rows"), str(tmp_path / output), fsdp_environment())
        log = tmp_path / f"{output}.log"
        assert run_processes(train, *argv, True, options, resume, n=2, log=log) == [0, 0], log.read_text()
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"share_prefix": True}],
    ids=["plain", "gradient_checkpointing", "share_prefix"],
)
def test_one_update_however_the_batch_is_split(options, tiny_folders, tmp_path):
    """
    Eight rows at once, one after the other, and four on each of two processes; in full.

    The process without pictures has no gradient for the projector, and need not.
    """
    rows = make_rows(images=True)
    # Three rollouts of one question with its pictures, one with others; then four without.
    shown = [{**rows[index], "prompt": "How many?", "images": rows[3]["images"]} for index in (0, 1, 4)]
    rows = [*shown, rows[3], *({**rows[index], "prompt": "How many?"} for index in (2, 5, 2)), rows[5]]
    as_dataset(rows).save_to_disk(tmp_path / "rows")
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    for output, n, change in (("at_once", 1, {}), ("one_by_one", 1, one_by_one), ("two_processes", 2, {})):
        argv = (tiny_folders["internvl"], str(tmp_path / "rows"), str(tmp_path / output), {}, False, options | change)
        log = tmp_path / f"{output}.log"
        assert run_processes(train, *argv, n=n, log=log) == [0] * n, log.read_text()
    assert_same(tmp_path / "at_once", tmp_path / "one_by_one")
    assert_same(tmp_path / "at_once", tmp_path / "two_processes")


@pytest.mark.parametrize("launcher", ["fsdp2", "zero3"])
def test_a_shared_prefix_and_sharded_weights_are_refused(launcher, tiny_folders, tmp_path, monkeypatch):
    """A process with fewer questions makes fewer calls of the model: the others would wait for its part forever."""
    if launcher == "fsdp2":
        for name, value in fsdp_environment().items():
            monkeypatch.setenv(name, value)
    else:  # DeepSpeed is not among our dependencies
        monkeypatch.setattr("trl_mprm.training.host.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="share_prefix under FSDP or DeepSpeed ZeRO-3.*train with DDP, or without it"):
        ProcessRewardTrainer(
            model=tiny_folders["qwen2"],
            args=config(tmp_path, share_prefix=True),
            train_dataset=as_dataset(make_rows(images=False)),
        )


@pytest.mark.slow
def test_ddp_config_launches_the_command_on_two_processes(tiny_folders, tmp_path):
    """The README's line, on ddp.yaml with two CPU processes in place of eight GPUs: the same weights as one process."""
    settings = yaml.safe_load((FOLDER / "ddp.yaml").read_text())
    # Not `use_cpu`: accelerate would start one process, and leave more to MPI. The training config says it.
    settings |= {"num_processes": 2, "mixed_precision": "no"}
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump(settings))
    as_dataset(make_rows(images=True)).save_to_disk(tmp_path / "rows")
    training = {
        "model_name_or_path": tiny_folders["internvl"],
        "dataset_name": str(tmp_path / "rows"),
        "eval_dataset_name": str(tmp_path / "rows"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "max_steps": 2,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    train = ["train", "--config", str(tmp_path / "train.yaml")]
    one = [*train, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "out1")]
    assert run_processes(main, one, log=tmp_path / "log") == [0], (tmp_path / "log").read_text()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "ddp.yaml")]
    two = [*train, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "out2")]
    done = subprocess.run([*launch, "-m", "trl_mprm.cli", *two], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^optimizer steps +2$", done.stdout, re.M)) == 1, done.stdout
    assert_same(tmp_path / "out1", tmp_path / "out2")
