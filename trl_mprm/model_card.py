"""Model cards filled from the run. No absolute path, user name or token reaches a card."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig

from .config import ProcessRewardConfig
from .rendering import StepFormat


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
LIBRARIES = ("trl-mprm", "trl", "transformers", "peft", "datasets", "torch")
# Headline of a benchmark: (key of `step_metrics`, name on the card).
CONVENTIONS = (
    ("macro_f1_step_weighted", "macro-F1, step-weighted mean over sources (the paper's micro-F1)"),
    ("macro_f1_pooled", "macro-F1, pooled (VisualPRM's convention)"),
    ("macro_f1_source_mean", "macro-F1, plain mean over sources"),
    ("auc", "AUC"),
    ("first_error_accuracy", "first-error accuracy"),
)


def is_hub_id(name: str) -> bool:
    return "/" in name and not Path(name).is_absolute() and not Path(name).exists()


def public_name(model_id: str) -> str:
    """A Hub id as it is; of a local folder only its name."""
    return model_id if is_hub_id(model_id) else Path(model_id).name


def model_card(
    *,
    model_name: str,
    base_model: str,
    tags: list[str],
    license: str | None,
    dataset_name: str | None,
    step_format: StepFormat,
    hub_model_id: str | None,
    images: bool,
    dataset: dict[str, Any],
    selection: dict[str, Any] | None,
    peft_config: PeftConfig | None,
    quantized: bool,
    args: ProcessRewardConfig,
    steps: int,
    trainable_parameters: int,
    evaluation: dict[str, float] | None,
    benchmark: tuple[str, dict[str, Any]] | None,
) -> ModelCard:
    """Fill `templates/model_card.md`; every figure comes from the run."""
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=dataset_name if dataset_name and is_hub_id(dataset_name) else None,
        library_name="peft" if peft_config else "transformers",
        tags=tags,
        license=license,
        model_name=model_name if benchmark else None,
        eval_results=_eval_results(*benchmark) if benchmark else None,
    )
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        model_name=model_name,
        base_model=public_name(base_model),
        step_format=step_format,
        repo=hub_model_id or model_name,
        images=images,
        dataset=dataset,
        selection=selection,
        peft_config=peft_config,
        quantized=quantized,
        args=args,
        global_batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        steps=steps,
        trainable_parameters=trainable_parameters,
        evaluation=evaluation,
        benchmark=benchmark,
        conventions=CONVENTIONS,
        versions={name: version(name) for name in LIBRARIES},
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
    )


def _eval_results(benchmark: str, metrics: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="process-reward-modeling",
            task_name="Step correctness",
            dataset_type=benchmark,
            dataset_name=benchmark,
            metric_type=key,
            metric_name=f"{name}; threshold: {metrics['threshold_protocol']}",
            metric_value=round(metrics[key], 4),
        )
        for key, name in CONVENTIONS
        if metrics.get(key) is not None
    ]
