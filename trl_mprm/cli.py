"""`trl-mprm select | train | score | evaluate | demo`: arguments in, the library does the work, one table out."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate


if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def main(argv: list[str] | None = None) -> int:
    """
    Run one command; return its exit code: 0, or 2 after one line that says what was wrong.

    Examples:
    ```python
    >>> from trl_mprm.cli import main
    >>> main(["score", "no/such-folder/anywhere", "--question", "2+2?", "--step", "4"])
    2

    ```
    """
    argv = sys.argv[1:] if argv is None else argv
    # Tells on import that a kernel is missing which we would switch off anyway, see modeling.keep_4bit_gradients_on_cpu.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if argv[:1] == ["train"]:  # TrlParser has its own flags, taken from the dataclasses
            return train(argv[1:])
        args = _parser().parse_args(argv)
        return args.command(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "trl-mprm", description="Multimodal process reward models on the Hugging Face stack"
    )
    commands = parser.add_subparsers(required=True, metavar="select | train | score | evaluate | demo")

    command = commands.add_parser("select", help="keep the rollouts that teach most", formatter_class=_Defaults)
    command.set_defaults(command=select)
    command.add_argument("input", nargs="+", help="folder, *.jsonl file(s) or Hub id of annotated rollouts")
    command.add_argument("--output", required=True, help="*.jsonl, *.parquet, or a folder (one JSONL for each input)")
    command.add_argument("--rule", default="bis", choices=["bis", "random", "mixed", "reliable", "low_mc"])
    command.add_argument("--fraction", type=float, default=0.1, help="share kept of each source")
    command.add_argument("--alpha", type=float, default=0.05, help="of BIS; the paper: 0.2 for 10%%, 0.05 for 25%%")
    command.add_argument("--ties", default="first", choices=["first", "hash"], help="first in the file, or by hash")
    command.add_argument("--seed", type=int, default=0, help="of the rule `random` and of the hash")
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")

    train_help = "train a process reward model (train --help lists every field)"
    commands.add_parser("train", help=train_help)  # shown in the help; main() hands the arguments to TrlParser

    command = commands.add_parser("score", help="score the steps of one solution", formatter_class=_Defaults)
    command.set_defaults(command=score)
    _add_model(command)
    command.add_argument("--image", action="append", default=[], help="picture, in order; repeat for several")
    command.add_argument("--question", required=True)
    command.add_argument("--step", action="append", required=True, help="a step; repeat for each, in order")

    command = commands.add_parser("evaluate", help="measure on a benchmark", formatter_class=_Defaults)
    command.set_defaults(command=evaluate)
    _add_model(command)
    command.add_argument("benchmark", help="file in VisualProcessBench's format, or a folder with test.jsonl")
    command.add_argument("--image-root", help="folder of the images; default: the folder of the file")
    command.add_argument("--threshold", type=_threshold, default="held_out", help="held_out, oracle, or a number")
    command.add_argument("--batch-size", type=int, default=8)
    command.add_argument("--output", help="folder for results.json and scores.jsonl")

    command = commands.add_parser("demo", help="the 10%% result in miniature", formatter_class=_Defaults)
    command.set_defaults(command=demo)
    command.add_argument("--output", default="runs/demo")
    command.add_argument("--quick", action="store_true", help="smaller, one seed: shows that it runs, settles nothing")
    command.add_argument("--qlora", action="store_true", help="LoRA adapters on a base in 4-bit NF4")
    return parser


_Defaults = argparse.ArgumentDefaultsHelpFormatter


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="Hub id or folder of a checkpoint saved by ProcessRewardTrainer")
    command.add_argument("--base-model", help="base of an adapter, where it has moved since the training")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--load-in-4bit", action="store_true", help="as a QLoRA adapter was trained")


def _threshold(text: str) -> str | float:
    return text if text in ("held_out", "oracle") else float(text)


def _print_table(rows: list[list]) -> None:
    print(tabulate(rows[1:], headers=rows[0], floatfmt=".4g"))


def select(args: argparse.Namespace) -> int:
    from .selection import report_table, select_files

    inputs = args.input if len(args.input) > 1 else args.input[0]
    report = select_files(
        inputs,
        args.output,
        args.rule,
        fraction=args.fraction,
        alpha=args.alpha,
        ties=args.ties,
        seed=args.seed,
        image_root=args.image_root,
    )
    _print_table(report_table(report))
    output = Path(args.output)
    folder = output.parent if output.suffix in (".jsonl", ".parquet") else output
    print(f"\nkept rollouts: {output}\nevidence: {folder / 'selection.json'}")
    for reason, count in report["total"]["refused"].items():
        print(f"refused: {count} {reason} (see {folder / 'refused.jsonl'})")
    return 0


@dataclass
class DataArguments:
    """
    Rollouts to train on.

    Parameters:
        dataset_name (`str`):
            Folder, JSONL file or Hub id, as [`load_rollouts`] takes it.
        image_root (`str`, *optional*):
            Folder of the images.
        rule (`str`, *optional*):
            Train on what this rule keeps: `bis`, `random`, `mixed`, `reliable` or `low_mc`. Defaults to all rollouts.
        fraction (`float`, *optional*, defaults to `0.1`):
            Share kept of each source.
        alpha (`float`, *optional*, defaults to `0.05`):
            Alpha of BIS.
        ties (`str`, *optional*, defaults to `"first"`):
            `first` in the file, or by `hash`.
        eval_dataset_name (`str`, *optional*):
            Rollouts to evaluate on during training.
    """

    dataset_name: str = field(metadata={"help": "Folder, JSONL file or Hub id of annotated rollouts."})
    image_root: str | None = field(default=None, metadata={"help": "Folder of the images."})
    rule: str | None = field(default=None, metadata={"help": "Train on what this rule keeps; default: everything."})
    fraction: float = field(default=0.1, metadata={"help": "Share kept of each source."})
    alpha: float = field(default=0.05, metadata={"help": "Alpha of BIS; the paper: 0.2 for 10%%, 0.05 for 25%%."})
    ties: str = field(default="first", metadata={"help": "`first` in the file, or by `hash`."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Rollouts to evaluate on in training."})


def train(argv: list[str]) -> int:
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from .config import ProcessRewardConfig
    from .rollouts import load_rollouts
    from .selection import select as select_rollouts
    from .trainer import ProcessRewardTrainer

    parser = TrlParser((DataArguments, ProcessRewardConfig, ModelConfig), prog="trl-mprm train")
    data, args, model = parser.parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ValueError("no model to train: set model_name_or_path to a Hub id or folder")
    rollouts = load_rollouts(data.dataset_name, image_root=data.image_root)
    if data.rule is not None:
        selection = select_rollouts(
            rollouts, data.rule, fraction=data.fraction, alpha=data.alpha, ties=data.ties, seed=args.seed
        )
        rollouts, report = rollouts.select(selection.indices), selection.report
    else:
        report = _selection_beside(data.dataset_name, len(rollouts))
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
        eval_dataset=load_rollouts(data.eval_dataset_name, data.image_root) if data.eval_dataset_name else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        selection=report,
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name=data.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        keys = ("train_loss", "train_runtime", "eval_loss", "eval_auc", "eval_macro_f1_pooled")
        rows = [[key, entry[key]] for key in keys for entry in history[-2:] if key in entry]
        _print_table(
            [["", "last"], ["rollouts", len(rollouts)], ["optimizer steps", trainer.state.global_step], *rows]
        )
        print(f"\nmodel and card: {args.output_dir}")
    return 0


def _selection_beside(dataset: str, n_rows: int) -> dict | None:
    """The evidence that `trl-mprm select` wrote beside the rows, for the card; None if it tells of other rows."""
    path = Path(dataset)
    path = (path.parent if path.is_file() else path) / "selection.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return report if report is not None and report["total"]["kept"] == n_rows else None


def _load_prm(args: argparse.Namespace):
    from .scoring import ProcessRewardModel

    return ProcessRewardModel.from_pretrained(
        args.model,
        base_model=args.base_model,
        quantization_config=_nf4(args.dtype) if args.load_in_4bit else None,
        dtype=args.dtype,
        device_map="auto",
    )


def _nf4(dtype: str) -> "BitsAndBytesConfig":
    from trl import ModelConfig, get_quantization_config

    return get_quantization_config(ModelConfig(load_in_4bit=True, dtype=dtype))


def score(args: argparse.Namespace) -> int:
    prm = _load_prm(args)
    scores = prm.score(args.image, args.question, args.step)
    rows = zip(range(1, len(scores) + 1), args.step, scores, strict=True)
    _print_table([["step", "text", "P(good)"], *map(list, rows)])
    print(f"\nmean (best-of-N score): {sum(scores) / len(scores):.4f}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from .evaluation import evaluate_model, read_benchmark, table_rows

    benchmark = read_benchmark(args.benchmark, image_root=args.image_root)
    metrics = evaluate_model(_load_prm(args), benchmark, args.threshold, args.batch_size, args.output)
    _print_table(table_rows(metrics))
    for reason, count in metrics["benchmark"]["refused"].items():
        print(f"refused: {count} {reason}")
    if args.output:
        print(f"\nmetrics: {Path(args.output) / 'results.json'}\nscores: {Path(args.output) / 'scores.jsonl'}")
    return 0


def demo(args: argparse.Namespace) -> int:
    from .demo.run import run_demo

    run_demo(args.output, quick=args.quick, qlora=args.qlora)
    return 0


if __name__ == "__main__":
    sys.exit(main())
