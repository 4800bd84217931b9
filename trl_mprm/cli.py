"""`trl-mprm select | train | score | evaluate | card | convert | demo`: arguments in, the library works, one table out."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate
from transformers import BitsAndBytesConfig

from .files import atomic_output


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
    commands = parser.add_subparsers(
        required=True, metavar="select | train | score | evaluate | card | convert | demo"
    )

    command = commands.add_parser("select", help="keep the rollouts that teach most", formatter_class=_Defaults)
    command.set_defaults(command=select)
    command.add_argument("input", nargs="+", help="folder, *.jsonl file(s) or Hub id of annotated rollouts")
    command.add_argument("--output", help="*.jsonl, *.parquet, or a folder (one JSONL for each input)")
    command.add_argument("--compare", action="store_true", help="print what every rule would keep, side by side")
    command.add_argument("--report", metavar="FILE", help="also draw the selection on a page, FILE.html")
    command.add_argument("--engine", default="local", choices=["local", "ray"], help="ray: on a Ray cluster")
    command.add_argument("--rule", default="bis", choices=["bis", "random", "mixed", "reliable", "low_mc"])
    command.add_argument("--fraction", type=float, default=0.1, help="share kept")
    command.add_argument("--by", default="source", choices=["source", "corpus"], help="of each source, or of all rows")
    command.add_argument("--alpha", type=float, default=0.05, help="of BIS; the paper: 0.2 for 10%%, 0.05 for 25%%")
    command.add_argument("--ties", default="first", choices=["first", "hash"], help="first in the file, or by hash")
    command.add_argument("--seed", type=int, default=0, help="of the rule `random` and of the hash")
    command.add_argument("--image-root", help="folder of the images; default: the folder of each file")
    command.add_argument("--drop-answer-step", action="store_true", help="do not score a step that states the answer")
    command.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    command.add_argument("--save-to-disk", action="store_true", help="OUTPUT is a folder for datasets.load_from_disk")
    command.add_argument("--push-to-hub", metavar="ORG/NAME", help="also publish the kept rows, with images and card")
    command.add_argument("--license", help="on that card; default: of the source, where it is on the Hub")

    train_help = "train a process reward model (train --help lists every field; --smoke checks a recipe)"
    commands.add_parser("train", help=train_help)  # shown in the help; main() hands the arguments to TrlParser

    command = commands.add_parser("score", help="score the steps of one solution", formatter_class=_Defaults)
    command.set_defaults(command=score)
    _add_model(command)
    command.add_argument("--image", action="append", default=[], help="picture, in order; repeat for several")
    command.add_argument("--question", required=True)
    command.add_argument("--step", action="append", required=True, help="a step; repeat for each, in order")

    command = commands.add_parser("evaluate", help="measure on a benchmark", formatter_class=_Defaults)
    command.set_defaults(command=evaluate)
    _add_model(command, flag=True)
    command.add_argument("data", nargs="?", default=argparse.SUPPRESS, help="the same as --data")
    command.add_argument(
        "--benchmark",
        default="visualprocessbench",
        choices=["visualprocessbench", "processbench", "prmbench", "best-of-n"],
        help="format of the data, and the dataset on the Hub unless --data names another",
    )
    command.add_argument("--data", help="file, folder or Hub id; default: the published dataset of --benchmark")
    command.add_argument("--image-root", help="folder of the images; default: the folder of the file")
    command.add_argument(
        "--threshold", type=_threshold, help="held_out, oracle, or a number; default: held_out, 0.5 for the text ones"
    )
    command.add_argument("--batch-size", type=_positive, default=8)
    command.add_argument("--output", help="folder for scores and reports; a run that was interrupted continues there")
    command.add_argument("--compare", help="scores.jsonl of another model: test whether the two differ")
    command.add_argument("--update-card", action="store_true", help="write the results into the card of a local model")

    command = commands.add_parser("card", help="write the model card again, from the record of the training run")
    command.set_defaults(command=card)
    command.add_argument("model", help="folder of a trained model, or its model_card.json with --output")
    command.add_argument("--license", help="licence of the weights, as a Hub identifier")
    command.add_argument("--repo", metavar="ORG/NAME", help="where the model will be published")
    command.add_argument("--output", help="write the card to this file; default: README.md of the folder")

    command = commands.add_parser("convert", help="internvl_chat checkpoint (VisualPRM-8B) to the native class")
    command.set_defaults(command=convert)
    command.add_argument("input", help="folder or Hub id of an internvl_chat checkpoint in safetensors")
    command.add_argument("output", help="folder to write; it must not exist")
    command.add_argument("--tokenizer", help="native tokenizer with the same ids; default: the checkpoint's own")

    command = commands.add_parser("demo", help="the 10%% result in miniature", formatter_class=_Defaults)
    command.set_defaults(command=demo)
    command.add_argument("--output", default="runs/demo")
    command.add_argument("--quick", action="store_true", help="smaller, one seed: shows that it runs, settles nothing")
    command.add_argument("--qlora", action="store_true", help="LoRA adapters on a base in 4-bit NF4")
    return parser


_Defaults = argparse.ArgumentDefaultsHelpFormatter


def _add_model(command: argparse.ArgumentParser, flag: bool = False) -> None:
    model = "Hub id or folder of a checkpoint saved by ProcessRewardTrainer"
    if flag:
        command.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the same as --model")
        command.add_argument("--model", help=model)
    else:
        command.add_argument("model", help=model)
    command.add_argument(
        "--step-format", help="layout of a published checkpoint, as math-shepherd; default: as saved, or by its Hub id"
    )
    command.add_argument("--base-model", help="base of an adapter, where it has moved since the training")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--load-in-4bit", action="store_true", help="as a QLoRA adapter was trained")


def _threshold(text: str) -> str | float:
    if text in ("held_out", "oracle"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected held_out, oracle or a number, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _print_table(rows: list[list]) -> None:
    print(tabulate(rows[1:], headers=rows[0], floatfmt=".4g"))


def select(args: argparse.Namespace) -> int:
    from .selection.files import select_files
    from .selection.report import report_table

    inputs = args.input if len(args.input) > 1 else args.input[0]
    if args.compare:
        _compare(inputs, args)
    if args.output is None:
        if args.compare and not args.report:
            return 0
        raise ValueError("expected --output, where the kept rollouts go (or --compare alone, to keep none)")
    report = select_files(
        inputs,
        args.output,
        args.rule,
        fraction=args.fraction,
        alpha=args.alpha,
        ties=args.ties,
        seed=args.seed,
        by=args.by,
        image_root=args.image_root,
        drop_answer_step=args.drop_answer_step,
        strict=args.strict,
        save_to_disk=args.save_to_disk,
        push_to_hub=args.push_to_hub,
        license=args.license,
        engine=args.engine,
        page=args.report,
    )
    _print_table(report_table(report))
    output = Path(args.output)
    folder = output.parent if output.suffix in (".jsonl", ".parquet") else output
    print(f"\nkept rollouts: {output}\nevidence: {folder / 'selection.json'}")
    for reason, count in report["total"]["refused"].items():
        print(f"refused: {count} {reason} (see {folder / 'refused.jsonl'})")
    if args.report:
        print(f"page: {args.report}")
    if args.push_to_hub:
        print(f"published: dataset {args.push_to_hub}")
    return 0


def _compare(inputs: str | list[str], args: argparse.Namespace) -> None:
    from .selection.comparison import compare_rules, comparison_table

    table = compare_rules(
        inputs,
        fraction=args.fraction,
        alpha=args.alpha,
        ties=args.ties,
        seed=args.seed,
        by=args.by,
        image_root=args.image_root,
        drop_answer_step=args.drop_answer_step,
        engine=args.engine,
    )
    header, *rows = comparison_table(table)
    print(tabulate(rows, header, disable_numparse=True, colalign=("left", *["right"] * len(table))), end="\n\n")


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


SMOKE = (
    "only check the recipe: its first steps on a tiny random model of the same architecture and made rollouts, without "
    "a download; shows that the fields fit together and that training runs, nothing of memory, speed, F1 or the launcher"
)


def train(argv: list[str]) -> int:
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from .data.hub import hub_snapshot, is_hub_id
    from .data.rollouts import load_rollouts
    from .selection.datasets import select as select_rollouts
    from .training.config import ProcessRewardConfig
    from .training.trainer import ProcessRewardTrainer

    if "--smoke" in argv:
        return _smoke([word for word in argv if word != "--smoke"])
    parser = TrlParser((DataArguments, ProcessRewardConfig, ModelConfig), prog="trl-mprm train")
    parser.add_argument("--smoke", action="store_true", help=SMOKE)
    data, args, model, _ = parser.parse_args_and_config(argv)
    if model.model_name_or_path is None:
        raise ValueError("no model to train: set model_name_or_path to a Hub id or folder")
    rollouts = load_rollouts(data.dataset_name, image_root=data.image_root)
    on_hub = is_hub_id(data.dataset_name)
    subset = hub_snapshot(data.dataset_name, "selection.json") if on_hub else Path(data.dataset_name)
    if data.rule is not None:
        selection = select_rollouts(
            rollouts, data.rule, fraction=data.fraction, alpha=data.alpha, ties=data.ties, seed=args.seed
        )
        rollouts, report = rollouts.select(selection.indices), selection.report
    else:
        report = _selection_beside(subset, len(rollouts))
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
    trainer.create_model_card(dataset_name=data.dataset_name, dataset_revision=subset.name if on_hub else None)
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        keys = ("train_loss", "train_runtime", "eval_loss", "eval_auc", "eval_macro_f1_pooled")
        rows = [[key, entry[key]] for key in keys for entry in history[-2:] if key in entry]
        _print_table(
            [["", "last"], ["rollouts", len(rollouts)], ["optimizer steps", trainer.state.global_step], *rows]
        )
        print(f"\nmodel and card: {args.output_dir}")
    return 0


def _smoke(argv: list[str]) -> int:
    from tempfile import TemporaryDirectory

    from .training.smoke import cut_down

    with TemporaryDirectory(prefix="trl-mprm-smoke-") as folder:
        argv, told = cut_down(argv, Path(folder))
        train(argv)
    _print_table([["smoke", "the recipe", "here"], *told])
    print("\nThe recipe runs; what it wrote is deleted again. That its fields fit together is all this shows:")
    print("nothing of memory, speed, F1 or the launcher.")
    return 0


def _selection_beside(path: Path, n_rows: int) -> dict | None:
    """The evidence that `trl-mprm select` wrote beside the rows, for the card; None if it tells of other rows."""
    path = (path.parent if path.is_file() else path) / "selection.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return report if report is not None and report["total"]["kept"] == n_rows else None


def _load_prm(args: argparse.Namespace, device_map: str | dict = "auto"):
    from .scoring import ProcessRewardModel

    return ProcessRewardModel.from_pretrained(
        args.model,
        base_model=args.base_model,
        step_format=args.step_format,
        quantization_config=_nf4(args.dtype) if args.load_in_4bit else None,
        dtype=args.dtype,
        device_map=device_map,
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
    from datetime import timedelta

    from accelerate import PartialState

    from .cards.model_card import add_eval_results, public_name
    from .evaluation.benchmarks import BENCHMARKS, load_benchmark
    from .evaluation.run import evaluate_model
    from .evaluation.tables import measure_rows, table_rows, write_report

    if args.model is None:
        raise ValueError("no model to evaluate: name a Hub id or folder with --model")
    for flag, value in (("--compare", args.compare), ("--update-card", args.update_card)):
        if value and not args.output:
            raise ValueError(f"{flag} needs a folder for the results: set --output")
    if args.output and Path(args.output).is_file():
        raise ValueError(f"--output {args.output} is a file, expected a folder for scores and reports")
    state = PartialState(timeout=timedelta(days=1))  # a process waits as long as another downloads or scores
    with state.main_process_first():  # one download for all processes
        benchmark = load_benchmark(args.benchmark, args.data, args.image_root)
    threshold = BENCHMARKS[args.benchmark].threshold if args.threshold is None else args.threshold
    prm = _load_prm(args, "auto" if state.num_processes == 1 else {"": state.device})
    metrics = evaluate_model(prm, benchmark, threshold, args.batch_size, args.output)
    if state.is_main_process:
        if "pass_at_n" not in metrics:
            _print_table(table_rows(metrics))
            print()
        _print_table(measure_rows(metrics))
        for reason, count in metrics["benchmark"]["refused"].items():
            print(f"refused: {count} {reason}")
        for item in metrics["benchmark"]["failed"]:
            print(f"not scored: {item['id']}: {item['error']}")
        if args.output:
            reports = write_report(args.output, benchmark, public_name(args.model), args.compare)
            print(f"\nmetrics: {Path(args.output) / 'results.json'}\nscores: {Path(args.output) / 'scores.jsonl'}")
            print("\n".join(f"report: {path}" for path in reports))
        if args.update_card:
            card = add_eval_results(args.model, benchmark.name, benchmark.title, benchmark.hub_id, metrics)
            print(f"card: {card}")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


def convert(args: argparse.Namespace) -> int:
    from .models.internvl_chat import convert_internvl_chat

    report = convert_internvl_chat(args.input, args.output, args.tokenizer)
    _print_table([["", "converted"], *map(list, report.items())])
    print(f"\nmodel and processor: {args.output}")
    return 0


def card(args: argparse.Namespace) -> int:
    from .cards.model_card import read_record, render_card, write_card

    changes = {"license": args.license, "repo": args.repo, "name": args.repo and args.repo.rsplit("/", 1)[-1]}
    record = read_record(args.model) | {key: value for key, value in changes.items() if value is not None}
    if args.output:
        with atomic_output(args.output) as part:
            part.write_text(str(render_card(record)), encoding="utf-8")
    print(f"card: {args.output or write_card(args.model, record)}")
    if not args.output:
        print(f"publish: hf upload {record['repo'] or 'ORG/NAME'} {args.model} . --exclude 'checkpoint-*'")
    return 0


def demo(args: argparse.Namespace) -> int:
    from .demo.run import run_demo

    run_demo(args.output, quick=args.quick, qlora=args.qlora)
    return 0


if __name__ == "__main__":
    sys.exit(main())
