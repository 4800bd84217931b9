"""Every recipe is parsed by the real command and trains its first step on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_rows

from trl_mprm.cli import main
from trl_mprm.step_format import StepFormat


RECIPES = Path(__file__).parents[1] / "recipes"
YAMLS = sorted(RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """A folder of annotated rollouts in the raw schema: two sources, pictures beside them."""
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "images").mkdir()
    for source in "ab":
        lines = []
        for index, row in enumerate(make_rows(images=True, n=12)):
            paths = []
            for number, image in enumerate(row["images"]):
                paths.append(f"VisualPRM400K-v1.1-Raw/{source}-{index}-{number}.png")
                image.save(folder / "images" / Path(paths[-1]).name)
            steps = zip(row["completions"], row["labels"], strict=True)
            raw = {
                "image": paths,
                "question": "<image>\nSolve. " + row["prompt"],
                "question_orig": row["prompt"],
                "answer": "1",
                "response": "\n\n".join(row["completions"]),
                "steps_with_score": [
                    {"step": step, "score": score, "num_mc_correct": int(16 * score), "num_mc_total": 16}
                    for step, score in steps
                ],
                "num_mc_sequences": 16,
            }
            lines.append(json.dumps(raw))
        (folder / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_there_are_recipes():
    assert len(YAMLS) >= 2


@pytest.mark.parametrize("recipe", YAMLS, ids=lambda path: path.stem)
def test_recipe_trains_its_first_step(recipe, rollouts, tiny_folders, tmp_path, capsys):
    settings = yaml.safe_load(recipe.read_text())
    architecture = "internvl" if "internvl" in recipe.stem else "qwen2_5_vl"
    output = tmp_path / "run"
    change = {
        "model_name_or_path": tiny_folders[architecture],
        "dataset_name": rollouts,
        "eval_dataset_name": rollouts,
        "image_root": rollouts,
        "output_dir": output,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
    }
    argv = [word for name, value in change.items() for word in (f"--{name}", str(value))]
    assert main(["train", "--config", str(recipe), *argv]) == 0
    assert (output / "adapter_model.safetensors").is_file() == settings["use_peft"]
    assert StepFormat.load(output) == StepFormat()
    card = (output / "README.md").read_text()
    fraction, rule = settings["fraction"], settings["rule"]
    assert f"rule `{rule}`, fraction {fraction}, alpha {settings['alpha']}" in card
    assert "| a | 12 | 0 | 12 | 1 |" in card and "4-bit NF4" in card
    printed = capsys.readouterr().out
    assert "eval_auc" in printed and str(output) in printed


def test_python_recipe_reads_like_trl_and_runs(rollouts, tiny_folders, tmp_path):
    script = RECIPES / "train_mprm.py"
    assert len(script.read_text().splitlines()) < 60
    arguments = {
        "dataset_name": rollouts,
        "model_name_or_path": tiny_folders["qwen2_5_vl"],
        "output_dir": tmp_path,
        "fraction": 0.5,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, script, *argv, "--use_cpu", "--use_peft"], check=True, capture_output=True)
    assert "| a | 12 | 0 | 12 | 6 |" in (tmp_path / "README.md").read_text()


def test_config_with_an_unknown_key_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rat: 0.1\ndataset_name: x\noutput_dir: y\n")
    assert main(["train", "--config", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "learning_rat" in error[0]
    assert main(["train", "--dataset_name", "nowhere", "--output_dir", str(tmp_path / "y")]) == 2
    assert "set model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
