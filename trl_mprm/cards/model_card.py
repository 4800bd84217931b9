"""
Render model cards from the record of a run. No absolute path, user name or token reaches a card.

The trainer writes the record beside every model as `model_card.json`:

    {"name": "prm", "base_model": "Qwen/Qwen2.5-VL-7B-Instruct", "license": "mit", "selection": {"rule": "bis", ...}, ...}

Rendered by `templates/model_card.md` it becomes the `README.md` of the model. `trl-mprm card` renders it again.
"""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..files import atomic_output, write_json
from ..text import code, markdown, one_line
from .measures import MEASURES


TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"

RECORD = "model_card.json"

# The published benchmarks; a card says of each that has no result that the model was not tested on it.
PUBLISHED_BENCHMARKS = {
    "OpenGVLab/VisualProcessBench": "VisualProcessBench",
    "Qwen/ProcessBench": "ProcessBench",
    "hitsmy/PRMBench_Preview": "PRMBench",
}

# What a selection changes: words, and the key of the share of all valid rollouts and of the kept ones.
SELECTION_ROWS = (
    ("mixed rollouts (good and bad steps)", "mixed_share"),
    ("steps in error (Monte Carlo score 0)", "error_step_share"),
    ("mean Monte Carlo score per step", "mean_mc"),
)

# Further entries of a card about a benchmark.
BENCHMARK_FACTS = ("n_solutions", "n_correct", "n_incorrect", "n_questions", "threshold", "threshold_protocol")


def benchmark_facts(metrics: dict[str, Any], dataset_id: str | None = None) -> dict[str, Any]:
    """The entries of a card for `metrics` ([`~metrics.step_metrics`] or [`~metrics.best_of_n_metrics`])."""
    headlines = _headlines(metrics)
    facts = {key: metrics[key] for key in (*BENCHMARK_FACTS, *headlines) if metrics.get(key) is not None}
    intervals = {key: metrics["intervals"][key] for key in headlines if key in metrics.get("intervals", {})}
    return {"dataset_id": dataset_id, **facts, "intervals": intervals}


def render_card(record: dict[str, Any]) -> ModelCard:
    """Render the card of a record; the same record always gives the same bytes."""
    results = [entry for title, facts in record["benchmarks"].items()
               for entry in eval_results(facts["dataset_id"], facts, title)]  # fmt: skip
    revisions = _dataset_revisions(record)
    on_hub, lora, emissions = record["base_model_on_hub"], record["training"]["lora"], _emissions(record)
    data = ModelCardData(
        base_model=record["base_model"] if on_hub else None,
        base_model_relation=("adapter" if lora else "finetune") if on_hub else None,
        datasets=[*revisions] if len(revisions) > 1 else next(iter(revisions), None),
        dataset_revisions={name: revision for name, revision in revisions.items() if revision} or None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="image-text-to-text" if record["images"] else "text-classification",
        co2_eq_emissions=emissions,
        tags=record["tags"],
        license=record["license"],
        model_name=record["name"] if results else None,
        eval_results=results or None,
    )
    words = {"text": markdown, "code": code, "python": _python, "shell": _shell}
    tested = {facts["dataset_id"] for facts in record["benchmarks"].values()}
    untested = [title for name, title in PUBLISHED_BENCHMARKS.items() if name not in tested]
    shown = {"measures": MEASURES, "selection_rows": SELECTION_ROWS, "untested": untested}
    return ModelCard.from_template(data, template_path=TEMPLATE, **shown, **words, **record)


def _dataset_revisions(record: dict[str, Any]) -> dict[str, str | None]:
    """The data sets on the Hub that the model was trained on or its rows were selected from, each with its commit."""
    dataset, selection = record["dataset"], record["selection"] or {}
    own = {dataset["name"]: dataset["revision"]} if dataset["on_hub"] else {}
    return own | (selection.get("input_revisions") or {})


def _emissions(record: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of the Hub for what codecarbon measured, in grams of CO2 equivalent."""
    measured = record["training"].get("emissions")
    if measured is None:
        return None
    return {
        "emissions": round(1000 * measured["emissions"], 3),
        "source": f"codecarbon {measured['codecarbon_version']}",
        "training_type": "fine-tuning",
        "geographical_location": measured["country_name"],
        "hardware_used": record["training"]["device"],
    }


def write_card(folder: str | os.PathLike, record: dict[str, Any]) -> Path:
    """Write the record and its card into the folder of a model. Returns the path of the card."""
    path = Path(folder) / "README.md"
    write_json(record, Path(folder) / RECORD)
    with atomic_output(path) as part:
        part.write_text(str(render_card(record)), encoding="utf-8")
    return path


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """Read a record from a model's folder or from a file."""
    path = Path(path) / RECORD if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the record that ProcessRewardTrainer writes")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or "training" not in record:
        raise ValueError(f"{path}: not the record of a model card; expected the {RECORD} of ProcessRewardTrainer")
    return record


def eval_results(dataset_id: str | None, metrics: dict[str, Any], name: str) -> list[EvalResult]:
    """
    Entries of a card's `model-index` for the results of a benchmark.

    Args:
        dataset_id (`str` or `None`):
            Id of the benchmark on the Hub; `None` for other data, which then goes by its name.
        metrics (`dict`):
            Result of [`step_metrics`] or [`best_of_n_metrics`].
        name (`str`):
            Name of the benchmark.
    """
    return [
        EvalResult(
            task_type="process-reward-modeling",
            task_name=MEASURES[key].task,
            dataset_type=dataset_id or name,  # entries of one type are taken for one dataset
            dataset_name=name,
            metric_type=key,
            metric_name=f"{MEASURES[key].label}{_protocol(metrics)}",
            metric_value=round(metrics[key], 4),
        )
        for key in _headlines(metrics)
    ]


def eval_results_yaml(dataset_id: str, metrics: dict[str, Any]) -> str:
    """
    Content of a file in `.eval_results/` of a model's repository, which makes its page on the Hub show the results.

    Examples:
    ```python
    >>> from trl_mprm.evaluation.metrics import step_metrics
    >>> from trl_mprm.cards.model_card import eval_results_yaml
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
            notes=f"{MEASURES[key].label}{_protocol(metrics)}",
        )
        for key in _headlines(metrics)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=1000)


def add_eval_results(
    folder: str | os.PathLike, benchmark: str, title: str, dataset_id: str | None, metrics: dict[str, Any]
) -> Path:
    """
    Put results into the card of a model, replacing earlier ones of the same benchmark and, for a dataset on the Hub, into
    `.eval_results/{benchmark}.yaml`. A card that was edited by hand keeps its text and gets only the `model-index`
    entries. Returns the path of the card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the card that ProcessRewardTrainer writes")
    if dataset_id:
        with atomic_output(Path(folder) / ".eval_results" / f"{benchmark}.yaml") as part:
            part.write_text(eval_results_yaml(dataset_id, metrics), encoding="utf-8")
    card = ModelCard.load(path)
    if (Path(folder) / RECORD).is_file():
        record = read_record(folder)
        untouched = str(card) == str(render_card(record))
        record["benchmarks"][title] = benchmark_facts(metrics, dataset_id)
        if untouched:
            return write_card(folder, record)
        write_json(record, Path(folder) / RECORD)
    entries = eval_results(dataset_id, metrics, title)
    earlier = card.data.eval_results or []
    kept = [result for result in earlier if not any(result.is_equal_except_value(entry) for entry in entries)]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.data.eval_results = [*kept, *entries]
    with atomic_output(path) as part:
        part.write_text(str(card), encoding="utf-8")
    return path


def _python(value: Any) -> str:
    """Write a value as a Python literal, so that text of a record cannot end the string that it is part of."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _shell(name: str) -> str:
    """Write a name as one word of a shell command on one line."""
    return shlex.quote(one_line(name))


def _protocol(metrics: dict[str, Any]) -> str:
    return f"; threshold: {metrics['threshold_protocol']}" if "threshold_protocol" in metrics else ""


def _headlines(metrics: dict[str, Any]) -> list[str]:
    return [key for key, measure in MEASURES.items() if measure.on_card and metrics.get(key) is not None]
