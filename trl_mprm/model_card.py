"""Model cards filled from the run. No absolute path, user name or token reaches a card."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from peft import PeftConfig

from .config import ProcessRewardConfig
from .files import atomic_output
from .rendering import StepFormat


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
LIBRARIES = ("trl-mprm", "trl", "transformers", "peft", "datasets", "torch")
# Headlines of a benchmark: (key of `step_metrics` or `best_of_n_metrics`, name on the card).
CONVENTIONS = (
    ("macro_f1_step_weighted", "macro-F1, step-weighted mean over sources (the paper's micro-F1)"),
    ("macro_f1_pooled", "macro-F1, pooled (VisualPRM's convention)"),
    ("macro_f1_source_mean", "macro-F1, plain mean over sources"),
    ("auc", "AUC"),
    ("average_precision_incorrect", "average precision, incorrect steps to find"),
    ("brier", "Brier score (lower is better)"),
    ("calibration_error", "calibration error, 15 bins (lower is better)"),
    ("first_error_accuracy", "first-error accuracy"),
    ("processbench_f1_source_mean", "ProcessBench F1, mean over sources"),
    ("accuracy_mean", "best-of-N accuracy, mean of step scores"),
    ("accuracy_min", "best-of-N accuracy, lowest step score"),
    ("accuracy_product", "best-of-N accuracy, product of step scores"),
    ("accuracy_last", "best-of-N accuracy, last step score"),
    ("pass_at_1", "accuracy of blind choice (pass@1)"),
    ("pass_at_n", "accuracy of perfect choice (pass@N)"),
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
        eval_results=eval_results(*benchmark) if benchmark else None,
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


def eval_results(dataset_id: str | None, metrics: dict[str, Any], name: str | None = None) -> list[EvalResult]:
    """
    Entries of a card's `model-index` for the results of a benchmark.

    Args:
        dataset_id (`str` or `None`):
            Id of the benchmark on the Hub; `None` for other data.
        metrics (`dict`):
            What [`step_metrics`] or [`best_of_n_metrics`] returned.
        name (`str`, *optional*):
            Name of the benchmark. Defaults to its id.
    """
    return [
        EvalResult(
            task_type="process-reward-modeling",
            task_name="Best of N" if "pass_at_n" in metrics else "Step correctness",
            dataset_type=dataset_id or "other",
            dataset_name=name or dataset_id,
            metric_type=key,
            metric_name=f"{headline}{_protocol(metrics)}",
            metric_value=round(metrics[key], 4),
        )
        for key, headline in CONVENTIONS
        if metrics.get(key) is not None
    ]


def eval_results_yaml(dataset_id: str, metrics: dict[str, Any]) -> str:
    """
    Content of a file in `.eval_results/` of a model's repository, from which its page on the Hub shows the results.

    Examples:
    ```python
    >>> from trl_mprm.metrics import step_metrics
    >>> from trl_mprm.model_card import eval_results_yaml
    >>> text = eval_results_yaml("OpenGVLab/VisualProcessBench", step_metrics([[1, -1]], [[0.9, 0.2]], threshold=0.5))
    >>> print("".join(text.splitlines(keepends=True)[:4]), end="")
    - dataset:
        id: OpenGVLab/VisualProcessBench
        task_id: macro_f1_step_weighted
      value: 1.0

    ```
    """
    entries = [
        EvalResultEntry(
            dataset_id=dataset_id,
            task_id=key,
            value=round(metrics[key], 4),
            notes=f"{headline}{_protocol(metrics)}",
        )
        for key, headline in CONVENTIONS
        if metrics.get(key) is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=1000)


def add_eval_results(
    folder: str | os.PathLike, benchmark: str, title: str, dataset_id: str | None, metrics: dict[str, Any]
) -> Path:
    """
    Put results into the folder of a model: `model-index` entries of its card, in place of earlier ones of the same
    measure, and for a dataset on the Hub `.eval_results/{benchmark}.yaml`. Returns the path of the card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the card that ProcessRewardTrainer writes")
    card = ModelCard.load(path)
    entries = eval_results(dataset_id, metrics, title)
    earlier = card.data.eval_results or []
    kept = [result for result in earlier if not any(result.is_equal_except_value(entry) for entry in entries)]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.data.eval_results = [*kept, *entries]
    texts = {path: str(card)}
    if dataset_id:
        texts[Path(folder) / ".eval_results" / f"{benchmark}.yaml"] = eval_results_yaml(dataset_id, metrics)
    for file, text in texts.items():
        with atomic_output(file) as part:
            part.write_text(text, encoding="utf-8")
    return path


def _protocol(metrics: dict[str, Any]) -> str:
    return f"; threshold: {metrics['threshold_protocol']}" if "threshold_protocol" in metrics else ""
