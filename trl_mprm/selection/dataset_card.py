"""Write the card of a data set of kept rows."""

from importlib.metadata import version
from pathlib import Path
from shlex import join

from huggingface_hub import DatasetCard, DatasetCardData

from ..data.hub import is_hub_id
from ..text import code, markdown, one_line
from .report import all_wrong_warning
from .rules import rule_of_report


CARD = Path(__file__).parents[1] / "templates" / "dataset_card.md"

SHARES = (
    ("share of mixed rollouts", "mixed_share"),
    ("share of steps with score 0", "error_step_share"),
    ("mean score per step", "mean_mc"),
    ("rollouts per image and question", "mean_group_size"),
)


def dataset_card(repo_id: str, report: dict, license: str | None = None) -> DatasetCard:
    """
    Write the card of a selection: rule, parameters, counts by source and by reason, and how to rebuild it.

    Args:
        repo_id (`str`):
            Name on the Hub.
        report (`dict`):
            Content of `selection.json`.
        license (`str`, *optional*):
            Licence of the rollouts.
    """
    hub_ids = [item for item in report["inputs"] if is_hub_id(item)]
    entry = rule_of_report(report)
    words = ["trl-mprm", "select", *report["inputs"], "--rule", entry.name, "--fraction", str(report["fraction"])]
    words += ["--split", report["split"]] if "split" in report else []
    words += ["--column", report["column"]] if "column" in report else []
    words += [] if report["alpha"] is None else ["--alpha", str(report["alpha"])]
    words += ["--by", "corpus"] if report["by"] == "corpus" else []
    words += ["--ties", report["ties"], "--seed", str(report["seed"])]
    words += ["--drop-answer-step"] if report["drop_answer_step"] else []
    data = DatasetCardData(
        license=license,
        task_categories=["image-text-to-text"],
        tags=["process-reward-model", "trl-mprm"],
        source_datasets=hub_ids or None,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    return DatasetCard.from_template(
        data,
        template_path=CARD,
        name=repo_id,
        report=report,
        rows=[*((markdown(name), row) for name, row in report["sources"].items()), ("all", report["total"])],
        rule_name=code(report["rule"]),
        rule=entry.words,
        stratum="the whole corpus" if report["by"] == "corpus" else "each source",
        shares=SHARES,
        warning=all_wrong_warning(report),
        dataset_ids=[_with_revision(item, report.get("input_revisions", {}).get(item)) for item in hub_ids],
        version=version("trl-mprm"),
        command=one_line(join([*words, "--output", "kept"])),
    )


def _with_revision(repo_id: str, revision: str | None) -> str:
    return f"[{repo_id}](https://huggingface.co/datasets/{repo_id})" + (f" (commit {revision})" if revision else "")
