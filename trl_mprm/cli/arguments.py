"""What several commands have in common: arguments, tables, a loaded model."""

import argparse

from tabulate import tabulate


ShowDefaults = argparse.ArgumentDefaultsHelpFormatter


def add_model_arguments(command: argparse.ArgumentParser, flag: bool = False) -> None:
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


def add_url_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--url", help="address of a server (trl-mprm serve, vLLM) that has the model; MODEL is its name there"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def print_table(rows: list[list]) -> None:
    print(tabulate(rows[1:], headers=rows[0], floatfmt=".4g"))


def load_scorer(args: argparse.Namespace, device_map: str | dict = "auto"):
    """The model that the arguments name: behind the server of `--url`, or in this process."""
    if args.url is None:
        return load_prm(args, device_map)
    from ..serving.client import RemoteProcessRewardModel

    return RemoteProcessRewardModel(args.url, args.model)


def load_prm(args: argparse.Namespace, device_map: str | dict = "auto"):
    from ..scoring import ProcessRewardModel

    return ProcessRewardModel.from_pretrained(
        args.model,
        base_model=args.base_model,
        step_format=args.step_format,
        quantization_config=_nf4(args.dtype) if args.load_in_4bit else None,
        dtype=args.dtype,
        device_map=device_map,
    )


def _nf4(dtype: str):
    from trl import ModelConfig, get_quantization_config

    return get_quantization_config(ModelConfig(load_in_4bit=True, dtype=dtype))
