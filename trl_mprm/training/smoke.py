"""
`trl-mprm train --config RECIPE --smoke` runs the first steps of a recipe on a laptop, before anyone pays for GPUs.

Some fields of the recipe are replaced: the model by a tiny random one of the same architecture, the rollouts by generated
ones. Selection, adapter, 4-bit weights, collator, loss and optimizer are those of the recipe.

    qwen2_5_vl_7b_bis10_qlora.yaml -> train --config qwen2_5_vl_7b_bis10_qlora.yaml --model_name_or_path tiny/ ...
"""

import argparse
import json
import random
from pathlib import Path

import torch
import yaml
from PIL import Image

from ..models.tiny import tiny_model


# Part of a model's name -> the architecture of its stand-in.
STAND_INS = {
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen2_5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "internvl2_5-8b": "internvl_llama",  # from InternLM2.5; most others have a Qwen2 decoder
    "internvl": "internvl",
    "smolvlm": "idefics3",
    "idefics3": "idefics3",
    "llava-onevision": "llava_onevision",
    "gemma-3": "gemma3",
    "llama": "llama",
    "qwen": "qwen2",
}

STEPS = 2

QUESTIONS, SOLUTIONS = 40, 4  # enough for two steps of any recipe's batch on a tenth of them


def made_rollouts(folder: Path) -> Path:
    """Write annotated rollouts about coloured pictures, from two sources, into `folder` in VisualPRM400K's raw format."""
    draw = random.Random(0)
    (folder / "annotations").mkdir(parents=True)
    for source in ("tiles", "bars"):
        lines = []
        for question in range(QUESTIONS // 2):
            picture = f"{source}-{question}.png"
            Image.new("RGB", (56, 56), tuple(draw.choices(range(256), k=3))).save(folder / picture)
            for _ in range(SOLUTIONS):
                counts = sorted((draw.choice((0, 3, 16)) for _ in range(draw.randint(1, 4))), reverse=True)
                steps = [
                    {
                        "step": f"{number} of {question}",
                        "score": count / 16,
                        "num_mc_correct": count,
                        "num_mc_total": 16,
                    }
                    for number, count in enumerate(counts)
                ]
                row = {"image": picture, "question": f"<image>\nHow many {source} are red?", "steps_with_score": steps}
                lines.append(json.dumps(row) + "\n")
        (folder / "annotations" / f"{source}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def cut_down(argv: list[str], folder: Path) -> tuple[list[str], list[list]]:
    """
    Build stand-ins for model and rollouts in `folder`.

    Args:
        argv (`list[str]`):
            Arguments of `trl-mprm train`, without `--smoke`.
        folder (`Path`):
            Scratch folder; everything is written there.

    Returns:
        `tuple`: the arguments of the smoke run, and table rows that list the replacements.

    Raises:
        `ValueError`: the model has no stand-in.

    Examples:
    ```python
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     argv, told = cut_down(["--model_name_or_path", "Qwen/Qwen2.5-0.5B"], Path(folder))
    >>> told[0]
    ['model', 'Qwen/Qwen2.5-0.5B', 'tiny random qwen2']

    ```
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("config", "model_name_or_path", "dataset_name", "max_steps", "gradient_accumulation_steps"):
        parser.add_argument(f"--{name}")
    given = {name: value for name, value in vars(parser.parse_known_args(argv)[0]).items() if value is not None}
    recipe = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8")) if "config" in given else {}
    recipe |= given
    model = str(recipe.get("model_name_or_path"))
    architecture = next((kind for word, kind in STAND_INS.items() if word in Path(model).name.lower()), None)
    if architecture is None:
        raise ValueError(f"no tiny model stands in for {model}: expected a name with one of {', '.join(STAND_INS)}")
    corpus = made_rollouts(folder / "rollouts")
    change = {
        "model_name_or_path": tiny_model(architecture, folder / "model"),
        "dataset_name": corpus / "annotations",
        "eval_dataset_name": corpus / "annotations",
        "image_root": corpus,
        "output_dir": folder / "run",
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    accumulation, steps = recipe.get("gradient_accumulation_steps", 1), recipe.get("max_steps", "a whole run")
    told = [
        ["model", model, f"tiny random {architecture}"],
        ["rollouts", recipe.get("dataset_name"), f"{QUESTIONS * SOLUTIONS}, made up"],
        ["optimizer steps", steps, STEPS],
        ["gradient accumulation", accumulation, 1],
        ["evaluation", recipe.get("eval_dataset_name"), "on the same rollouts"],
        ["device", "as launched", "CPU" if change["use_cpu"] else "GPU"],
        ["checkpoints, reports, Hub", "as set", "none"],
    ]
    return [*argv, *(word for name, value in change.items() for word in (f"--{name}", str(value)))], told
