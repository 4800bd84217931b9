"""
The record of a training run, from which [`~trl_mprm.cards.model_card`] writes the card: plain data, no paths or tokens.

    {"name": "prm", "repo": None, "base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "base_model_on_hub": True,
     "dataset": {"rows": 12000, "steps": 61000, "name": "org/rollouts", "on_hub": True, ...},
     "selection": {"rule": "bis", "fraction": 0.1, ...}, "training": {"loss_type": "hard", ...}, ...}
"""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.integrations import CodeCarbonCallback

from ..data.hub import is_hub_id, public_name
from ..data.rows import IGNORE_INDEX
from ..models.anatomy import is_vision_language
from ..models.vllm import why_not_in_vllm
from ..prompting.tokens import texts_of
from .checks import arrow_columns


LIBRARIES = ("trl-mprm", "trl", "transformers", "peft", "datasets", "torch")

SELECTION_FACTS = ("rule", "fraction", "by", "alpha", "ties", "seed", "revision")

SOURCE_FACTS = ("read", "refused", "valid", "kept", "cut_score")

SHARES = ("mixed_share", "error_step_share", "mean_mc")

# What codecarbon measured: kg of CO2 equivalent, kWh, seconds.
EMISSION_FACTS = ("emissions", "energy_consumed", "duration", "country_name", "codecarbon_version")

EVALUATION_FACTS = ("eval_loss", "eval_macro_f1_pooled", "eval_auc")


def run_record(trainer: Trainer, dataset: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """
    Collect the content of a card as plain data; every figure comes from the run.

    Args:
        trainer ([`ProcessRewardTrainer`]):
            The run.
        dataset (`dict`):
            Result of [`describe_dataset`].
        names (`dict`):
            Facts that the run cannot know: `model_name`, `dataset_name`, `dataset_revision`, `license`, `tags`, if given.
    """
    model, args, selection = trainer.model, trainer.args, trainer.selection
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    step_format, dataset_name = trainer.step_format, names.get("dataset_name")
    return {
        "name": names.get("model_name") or Path(args.hub_model_id or args.output_dir).name,
        "repo": args.hub_model_id,
        "base_model": public_name(base.name_or_path),
        "base_model_on_hub": is_hub_id(base.name_or_path),
        "dataset": dataset | {
            "name": public_name(dataset_name) if dataset_name else None,
            "on_hub": bool(dataset_name and is_hub_id(dataset_name)),
            "revision": names.get("dataset_revision"),
        },
        "license": names.get("license"),
        "tags": sorted({*trainer._tag_names, *names.get("tags", [])}),
        "images": is_vision_language(model.config),
        "architecture": type(base).__name__,
        "served_by_vllm": why_not_in_vllm(base, trainer.processing_class, step_format) is None,
        "step_format": {"marker": step_format.marker, "reward_tokens": step_format.reward_tokens,
                        "head": step_format.head},
        "selection": selection and _selection(selection),
        "training": _training(trainer),
        "evaluation": _last_evaluation(trainer),
        "benchmarks": trainer.benchmarks,
    }  # fmt: skip


def _selection(report: dict[str, Any]) -> dict[str, Any]:
    total = report.get("total", {})
    return {key: report.get(key) for key in SELECTION_FACTS} | {
        "input_revisions": report.get("input_revisions"),
        **{key: total.get(key) for key in ("all_wrong", "valid", "kept")},
        **_before_and_after(total),
        "sources": {
            source: {key: facts.get(key) for key in SOURCE_FACTS} | _before_and_after(facts)
            for source, facts in report["sources"].items()
        },
    }


def _before_and_after(facts: dict[str, Any]) -> dict[str, list[float | None]]:
    """`{"mixed_share": [of all valid rollouts, of the kept ones], ...}`; empty for a report that has no shares."""
    return {key: [facts["before"][key], facts[key]] for key in SHARES} if "before" in facts else {}


def _emissions(trainer: Trainer) -> dict[str, Any] | None:
    """What codecarbon measured of this run (`report_to="codecarbon"`); `None` where it did not, or has not ended."""
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, CodeCarbonCallback)]
    trackers = [callback.tracker for callback in callbacks if callback.tracker is not None]
    # The tracker sets this attribute when it stops.
    measured = [
        vars(tracker)["final_emissions_data"] for tracker in trackers if "final_emissions_data" in vars(tracker)
    ]
    return {key: getattr(measured[0], key) for key in EMISSION_FACTS} if measured else None


def _training(trainer: Trainer) -> dict[str, Any]:
    model, args = trainer.model, trainer.args
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    quantization = _quantization(base)
    peft_config = model.active_peft_config if isinstance(model, PeftModel) else None
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "lora": {"r": peft_config.r, "alpha": peft_config.lora_alpha} if peft_config else None,
        "quantized": quantization is not None,
        "quantization": quantization,
        "dtype": str(base.dtype).removeprefix("torch."),
        "loss_type": args.loss_type,
        "hard_threshold": args.hard_threshold,
        "optimizer_steps": trainer.state.global_step,
        "global_batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "num_train_epochs": args.num_train_epochs,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "versions": {name: version(name) for name in LIBRARIES},
        "emissions": _emissions(trainer),
    }


def _quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """Arguments of `BitsAndBytesConfig` that load the base as it was trained on; `None` if nothing is in 4 bit."""
    if not getattr(base, "is_loaded_in_4bit", False):  # other models lack this attribute
        return None
    given = base.config.quantization_config.to_diff_dict()
    return {key: value for key, value in given.items() if key == "load_in_4bit" or key.startswith("bnb_4bit_")}


def _last_evaluation(trainer: Trainer) -> dict[str, float] | None:
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {key: evaluations[-1][key] for key in EVALUATION_FACTS if key in evaluations[-1]} if evaluations else None


def describe_dataset(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    Count rows, steps and sources of the training data for the card, and take the shortest of the first hundred questions
    with its steps as an example. A stream has none of these; rows of tokens have no example.
    """
    if isinstance(dataset, IterableDataset):
        return {}
    labels = pc.list_flatten(arrow_columns(dataset, "labels")["labels"].combine_chunks()).cast(pa.float64())
    measured = labels.filter(pc.not_equal(labels, IGNORE_INDEX))
    facts = {
        "rows": len(dataset),
        "steps": len(measured),
        "mean_label": pc.mean(measured).as_py(),
        "error_step_share": 1 - pc.mean(pc.greater(measured, 0).cast(pa.float64())).as_py(),
    }
    if "source" in dataset.column_names:
        counts = pc.value_counts(arrow_columns(dataset, "source")["source"]).to_pylist()
        facts["sources"] = dict(sorted((count["values"], count["counts"]) for count in counts))
    return facts | ({} if "input_ids" in dataset.column_names else {"example": _example(dataset)})


def _example(dataset: Dataset) -> dict[str, Any]:
    rows = dataset.select(range(min(100, len(dataset)))).with_format(None)
    pairs = list(zip(rows["prompt"], rows["completions"], strict=True))
    index = min(range(len(pairs)), key=lambda number: len(str(pairs[number])))
    prompt, steps = pairs[index]
    n_images = 0
    if "images" in rows.column_names:
        n_images = pc.list_value_length(arrow_columns(rows, "images")["images"])[index].as_py() or 0
    question = prompt if isinstance(prompt, str) else "\n".join(texts_of(prompt))
    return {"images": n_images, "question": question, "steps": list(steps)}
