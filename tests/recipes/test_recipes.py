"""Every recipe is a lab record, is parsed by the real command and runs its first steps with --smoke."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from trl_mprm import ProcessRewardTrainer
from trl_mprm.cli import main
from trl_mprm.demo.corpus import write_corpus
from trl_mprm.demo.settings import DEMO
from trl_mprm.evaluation.published_results import TABLES
from trl_mprm.models.anatomy import decoder_linears
from trl_mprm.plotting import save_light_and_dark


RECIPES = Path(__file__).parents[2] / "recipes"
YAMLS = sorted(RECIPES.glob("*.yaml"))


# Rollouts of the paper's Table 1, and the optimizer steps of its Table 2 for them.
ROLLOUTS, GLOBAL_BATCH = 565_096, 512
STEPS = {"full": 1100, "bis25": 275, "bis10": 110, "random10": 110}


def test_every_backbone_has_every_recipe():
    expected = {
        *(f"{subset}_qlora" for subset in STEPS), "bis10_zero3", "full_zero3"
    }  # fmt: skip
    for model in ("qwen2_5_vl_7b", "internvl2_5_8b"):
        names = {path.stem.removeprefix(f"{model}_") for path in YAMLS if path.stem.startswith(model)}
        assert names == expected


@pytest.mark.parametrize("recipe", YAMLS, ids=lambda path: path.stem)
def test_recipe_is_a_lab_record(recipe):
    text, settings = recipe.read_text(), yaml.safe_load(recipe.read_text())
    header = text[: text.index("model_name_or_path")]
    fields = dict(re.findall(r"^# (paper|command|expected|hardware|data|check) +(.*)$", header, re.MULTILINE))
    assert list(fields) == ["paper", "command", "expected", "hardware", "data", "check"]
    assert "not run" in header and recipe.name in header
    # The paper's figure is that of its table.
    model, setting = re.search(r'row "(.*)" of (\S+?)(?:;|$)', fields["paper"]).groups()[::-1]
    printed = {row[0]: row[1] for row in TABLES["visualprocessbench"][0].rows}
    assert fields["expected"].startswith(f"{printed[f'{model} {setting}']:.2f} macro-F1")
    # The global batch and the number of updates are the paper's.
    processes = int((re.search(r"--num_processes (\d+)", header) or [0, 1])[1])
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    assert batch == GLOBAL_BATCH
    subset = recipe.stem.rsplit("_", 2)[1]
    fraction = settings.get("fraction", 1.0)
    assert settings.get("rule") == {"full": None, "random10": "random"}.get(subset, "bis")
    numbers = re.search(r"# (\S+) rollouts / 512 = (\S+) steps, (\S+) in the paper", text).groups()
    rollouts, steps, in_paper = (int(number.replace(",", "")) for number in numbers)
    assert rollouts == pytest.approx(ROLLOUTS * fraction, rel=1e-3)
    assert steps == math.ceil(rollouts / batch) == pytest.approx(in_paper, rel=0.01) and in_paper == STEPS[subset]
    assert settings.get("alpha") == {"bis10": 0.2, "bis25": 0.05}.get(subset)
    assert settings["learning_rate"] == (1e-4 if settings.get("use_peft") else 1e-5)


@pytest.mark.parametrize("kind", ["qwen2_5_vl_7b_*_qlora", "qwen2_5_vl_7b_*_zero3", "internvl2_5_8b_*_qlora",
                                  "internvl2_5_8b_*_zero3"])  # fmt: skip
def test_twins_differ_in_their_selection_alone(kind):
    selection = {"rule", "fraction", "alpha", "ties", "seed", "save_steps", "output_dir"}
    twins = [yaml.safe_load(path.read_text()) for path in RECIPES.glob(f"{kind}.yaml")]
    recipes = [{name: value for name, value in twin.items() if name not in selection} for twin in twins]
    assert len(recipes) > 1 and all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", YAMLS, ids=lambda path: path.stem)
def test_recipe_runs_its_first_steps(recipe, tmp_path, monkeypatch, capsys):
    settings, cards = yaml.safe_load(recipe.read_text()), []
    save = ProcessRewardTrainer.create_model_card

    def look(trainer, **names):
        save(trainer, **names)
        cards.append(
            (Path(trainer.args.output_dir, "README.md").read_text(), sorted(os.listdir(trainer.args.output_dir)))
        )

    monkeypatch.setattr(ProcessRewardTrainer, "create_model_card", look)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", str(recipe), "--smoke"]) == 0
    (card, files), printed = cards[0], capsys.readouterr().out
    stand_in = "qwen2_5_vl" if recipe.stem.startswith("qwen") else "internvl_llama"
    assert f"tiny random {stand_in}\n" in printed
    assert ("adapter_model.safetensors" in files) == settings.get("use_peft", False)
    assert ("4-bit NF4" in card) == settings.get("load_in_4bit", False)
    if "rule" in settings:
        assert f"rule `{settings['rule']}`, fraction {settings['fraction']}" in card
    assert "| optimizer steps | 2 |" in card and "eval_auc" in printed and "The recipe runs" in printed
    assert not list(tmp_path.iterdir())


def test_smoke_needs_a_stand_in(capsys):
    assert main(["train", "--smoke", "--model_name_or_path", "org/other", "--output_dir", "x"]) == 2
    assert "no tiny model stands in for org/other" in capsys.readouterr().err


def test_python_recipe_reads_like_trl_and_runs(tiny_folders, tmp_path):
    script = RECIPES / "train_mprm.py"
    assert len(script.read_text().splitlines()) < 60
    write_corpus(tmp_path / "rollouts", 12, DEMO.policy, np.random.default_rng(0), options=((0, 1.0),))
    arguments = {
        "dataset_name": tmp_path / "rollouts" / "annotations",
        "image_root": tmp_path / "rollouts",
        "model_name_or_path": tiny_folders["qwen2_5_vl"],
        "output_dir": tmp_path / "run",
        "fraction": 0.5,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, script, *argv, "--use_cpu", "--use_peft"], check=True, capture_output=True)
    card = (tmp_path / "run" / "README.md").read_text()
    sources = [file.stem for file in (tmp_path / "rollouts" / "annotations").iterdir()]
    assert all(f"| {source} | " in card for source in sources) and "24 rollouts with" in card


def test_config_with_an_unknown_key_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rat: 0.1\ndataset_name: x\noutput_dir: y\n")
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "learning_rat" in error[0]
    assert main(["train", "--dataset_name", "nowhere", "--output_dir", str(tmp_path / "y")]) == 2
    assert "set model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_the_picture_of_the_concepts_shows_what_the_page_works_out(tmp_path):
    concepts = runpy.run_path(str(RECIPES / "concepts.py"))
    page = (RECIPES / "concepts.md").read_text()
    for name, (words, scores) in concepts["EXAMPLES"].items():
        assert f'"{name}: {words}": {scores},' in page
    rollouts = concepts["corpus"](200)
    assert len(rollouts) == 200 and all(0 <= score <= 1 for scores in rollouts for score in scores)
    paths = save_light_and_dark(lambda figure: concepts["draw"](figure, rollouts), tmp_path / "concepts.png")
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_memory_of_the_recipe_in_the_readme_is_counted():
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    adapted = re.compile(decoder_linears(model))
    decoder = [module for name, module in model.named_modules() if adapted.fullmatch(name)]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.29e9, rel=1e-3)  # what the checkpoint has
    in_4_bit = sum(layer.weight.numel() for layer in decoder)
    others = sum(p.numel() for p in model.parameters()) - in_4_bit
    # NF4: half a byte, a scale of 8 bits per 64 weights, and of these a float32 per 256. The rest is bfloat16.
    weights = in_4_bit * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + others * 2
    adapter = 16 * sum(layer.in_features + layer.out_features for layer in decoder) + text["hidden_size"]
    trained = adapter * 4 * 4  # float32: weight, gradient, two states of AdamW
    readme = (RECIPES.parent / "README.md").read_text()
    words = "Calculated memory: {:.1f} GB (weights {:.1f}, what is trained {:.1f})"
    assert words.format((weights + trained) / 1e9, weights / 1e9, trained / 1e9) in readme
