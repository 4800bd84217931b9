"""`trl-mprm train`: the flags of TRL, from the command line or a YAML file."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .arguments import print_table, say
from .preflight import check_train
from .train_help import SMOKE, SUMMARY, train_help


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """
    Rollouts to train on.

    Parameters:
        dataset_name (`str`):
            Folder, JSONL file or Hub id, as in [`load_rollouts`].
        dataset_config (`str`, *optional*):
            Configuration of the data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on if `eval_strategy` is set and `eval_dataset_name` is not.
        image_root (`str`, *optional*):
            Folder of the images.
        rule (`str`, *optional*):
            Train on the rollouts that this rule keeps: `bis`, `random`, `mixed`, `reliable` or `low_mc`. Defaults to all
            rollouts, or to `bis` if `fraction` is given.
        fraction (`float`, *optional*):
            Share kept of each source. Defaults to 0.1 if `rule` is given.
        alpha (`float`, *optional*, defaults to `0.2`):
            Alpha of BIS.
        ties (`str`, *optional*, defaults to `"first"`):
            `first` in the file, or by `hash`.
        eval_dataset_name (`str`, *optional*):
            Rollouts to evaluate on during training.
    """

    dataset_name: str = field(
        metadata={"help": "Annotated rollouts: a folder, a file (*.jsonl, *.parquet) or a dataset on the Hub."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on, if eval_strategy is set and eval_dataset_name is not."},
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder of the images; default: the folder of each file."}
    )
    rule: str | None = field(
        default=None,
        metadata={
            "help": "Train only on the rollouts that this rule keeps (bis, random, mixed, reliable or low_mc, see "
            "trl-mprm select --help); default: all rollouts, or bis if fraction is set."
        },
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Share to keep of each source, 0.1 is a tenth; default: 0.1 if rule is set."}
    )
    alpha: float = field(
        default=0.2, metadata={"help": "Alpha of BIS; the paper takes 0.2 to keep 10%% and 0.05 to keep 25%%."}
    )
    ties: str = field(
        default="first",
        metadata={"help": "Which of several equal scores to keep: the `first` in the file, or by `hash`."},
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Rollouts to evaluate on during training."})


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the help only; TrlParser reads its arguments, see `train`."""
    commands.add_parser("train", help=SUMMARY)


def train(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        say(train_help())
        return 0
    check_train(argv)
    if "--smoke" in argv:
        return _smoke([word for word in argv if word != "--smoke"])
    return _train(argv)


def _train(argv: list[str], smoke: bool = False) -> int:
    from accelerate import PartialState
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from ..data.hub import hub_snapshot, is_hub_id
    from ..data.rollouts import load_rollouts
    from ..selection.datasets import select as select_rollouts
    from ..selection.report import find_report
    from ..training.config import ProcessRewardConfig
    from ..training.trainer import ProcessRewardTrainer

    parser = TrlParser((DataArguments, ProcessRewardConfig, ModelConfig), prog="trl-mprm train")
    parser.add_argument("--smoke", action="store_true", help=SMOKE)
    data, args, model, _ = parser.parse_args_and_config(argv)
    load = partial(load_rollouts, image_root=data.image_root)
    rollouts = load(data.dataset_name, split=data.dataset_train_split, name=data.dataset_config)
    on_hub = is_hub_id(data.dataset_name)
    subset = hub_snapshot(data.dataset_name, "selection.json") if on_hub else Path(data.dataset_name)
    if data.rule is not None or data.fraction is not None:
        rule, fraction = data.rule or "bis", 0.1 if data.fraction is None else data.fraction
        selection = select_rollouts(
            rollouts, rule, fraction=fraction, alpha=data.alpha, ties=data.ties, seed=args.seed
        )
        rollouts = rollouts.select(selection.indices)
        report: dict | None = selection.report
    else:
        report, why = find_report(data.dataset_name, len(rollouts))
        if report is None:
            logger.info("the card mentions no selection: %s", why)
    if PartialState().is_main_process:
        say(_what_was_kept(report, len(rollouts)))
    args.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    trainer = ProcessRewardTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=rollouts,
        eval_dataset=_evaluation_rows(data, args.eval_strategy != "no", load),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        selection=report,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name=data.dataset_name, dataset_revision=subset.name if on_hub else None)
    pushed = trainer.push_to_hub() if args.push_to_hub else None
    if trainer.is_world_process_zero():
        _print_result(trainer, len(rollouts), smoke, pushed is not None)
    return 0


def _print_result(trainer: Any, n_rollouts: int, smoke: bool, pushed: bool) -> None:
    history = trainer.state.log_history
    keys = ("train_loss", "train_runtime", "eval_loss", "eval_auc", "eval_macro_f1_pooled")
    rows = [[key, entry[key]] for key in keys for entry in history[-2:] if key in entry]
    print_table([["", "last"], ["rollouts", n_rollouts], ["optimizer steps", trainer.state.global_step], *rows])
    if not smoke:
        say(f"\nmodel and card: {trainer.args.output_dir}")
    if trainer.args.push_to_hub and not pushed:
        upload = f"hf upload {trainer.hub_model_id} {trainer.args.output_dir} . --exclude 'checkpoint-*'"
        say(f"not published, the Hub cannot be reached; when it can: {upload}")


def _evaluation_rows(data: DataArguments, asked: bool, load: Callable[..., Any]) -> Any:
    if data.eval_dataset_name:
        return load(data.eval_dataset_name)
    return load(data.dataset_name, split=data.dataset_test_split, name=data.dataset_config) if asked else None


def _what_was_kept(report: dict | None, n_rows: int) -> str:
    if report is None:
        return f"rollouts: all {n_rows:,}, no selection"
    total, n = report["total"], len(report["sources"])
    sources = f"{n} source{'s' * (n != 1)}"
    return f"rollouts: {report['rule']} kept {total['kept']:,} of {total['read']:,} rows of {sources}"


def _smoke(argv: list[str]) -> int:
    from tempfile import TemporaryDirectory

    from ..training.smoke import cut_down

    with TemporaryDirectory(prefix="trl-mprm-smoke-") as folder:
        argv, told = cut_down(argv, Path(folder))
        _train(argv, smoke=True)
    print_table([["smoke", "the recipe", "here"], *told])
    say("\nThe recipe runs; what it wrote is deleted again. That its fields fit together is all this shows:")
    say("nothing of memory, speed, F1 or the launcher.")
    return 0
