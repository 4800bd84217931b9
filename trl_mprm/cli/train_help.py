"""The text of `trl-mprm train --help`: our fields first, then those of TRL and transformers."""

import argparse
import re

from .arguments import Help, filled, told_examples
from .fields import Field, train_fields


SUMMARY = "train a process reward model"

SMOKE = (
    "only check the recipe: run its first steps on a tiny random model of the same architecture and generated rollouts, "
    "without a download; shows that the fields fit together and that training runs, but nothing about memory, speed, F1 "
    "or the launcher"
)

EXAMPLES = [
    ("Train with the fields of a YAML file", "trl-mprm train --config recipe.yaml"),
    (
        "Check such a file in a minute, on a tiny model and without a download",
        "trl-mprm train --config recipe.yaml --smoke",
    ),
    (
        "Train a LoRA adapter on 4-bit weights, on the best tenth of the rollouts",
        "trl-mprm train --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 --bf16 \\\n"
        "  --load_in_4bit --use_peft --learning_rate 1e-4 --dataset_name rollouts --fraction 0.1 \\\n"
        "  --output_dir runs/my-prm",
    ),
    (
        "Continue an interrupted training from its last checkpoint",
        "trl-mprm train --config recipe.yaml --resume_from_checkpoint true",
    ),
]

# Title of a group, and the classes of its fields.
GROUPS = (
    ("rollouts to train on, and which of them", ("DataArguments",)),
    ("process reward model", ("ProcessRewardConfig",)),
    ("training, with defaults of our own", ("ProcessRewardConfig", "TrainingArguments")),
    ("base model, LoRA and quantisation (fields of trl.ModelConfig)", ("ModelConfig",)),
    ("training (fields of transformers.TrainingArguments)", ("TrainingArguments",)),
)

LISTED = 12  # more choices than these are told in the text, and not in the flag

METAVARS = {"int": "N", "float": "X", "dict": "JSON", "str": "TEXT"}


def train_help() -> str:
    """
    Describe every field of `trl-mprm train`, without importing the libraries that they belong to.

    Examples:
    ```python
    >>> from trl_mprm.cli.train_help import train_help
    >>> text = train_help()
    >>> text.index("--fraction") < text.index("--loss_type") < text.index("--lora_r") < text.index("--deepspeed")
    True

    ```
    """
    parser = argparse.ArgumentParser(
        "trl-mprm train",
        usage="trl-mprm train [--config FILE] [--smoke] --model_name_or_path MODEL --dataset_name DATA\n"
        "                      --output_dir FOLDER [--FIELD VALUE ...]",
        description=filled(
            "Train a process reward model on annotated rollouts. Every field below is a flag and may also stand in the YAML "
            "file that --config names; where both are given, the flag counts."
        ),
        epilog=told_examples(EXAMPLES),
        formatter_class=Help,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields")
    parser.add_argument("--smoke", action="store_true", help=SMOKE)
    for title, owners in GROUPS:
        group = parser.add_argument_group(title)
        for field in train_fields().values():
            if field.owners == owners:
                _add(group, field)
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, field: Field) -> None:
    flags = [f"--{field.name}"] + [f"--no_{field.name}"] * (field.type == "bool" and field.default is True)
    text = field.help.replace("%%", "%").replace("%", "%%")
    if field.type.startswith("bool"):
        group.add_argument(*flags, action="store_true", default=field.default, help=text)
        return
    if len(field.choices) > LISTED:
        text += f" One of: {', '.join(field.choices)}."
    kind = re.findall(r"\b(?:int|float|dict|str)\b", field.type)
    metavar = "{" + ",".join(field.choices) + "}" if 0 < len(field.choices) <= LISTED else None
    group.add_argument(
        *flags,
        default=None if isinstance(field.default, list) else field.default,
        nargs="+" if field.type.startswith("list") else None,
        metavar=metavar or METAVARS[kind[0] if kind else "str"],
        help=text,
    )
