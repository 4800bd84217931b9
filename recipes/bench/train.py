"""
What does a training step cost? A plain step against ours, ours with shared prefixes, and QLoRA.

    python recipes/bench/train.py                               # CPU: a small decoder, the real vocabulary
    python recipes/bench/train.py --size 7b --json train.json   # one GPU: Qwen2.5-VL-7B's shapes in bfloat16

Eight rows, each with one picture of `--image-tokens` tokens and a solution of `--answer-tokens` tokens in nine steps:

    plain          logits of the whole vocabulary at every position, in float32, then cross entropy at the markers
    ours           `ProcessRewardTrainer.compute_loss`: the LM head runs at the markers only
    shared, G = 4  the same with `share_prefix`; the eight rows are two questions of four rollouts each
    qlora          ours, with the decoder's linear layers in NF4 (double quantisation)

All train LoRA (r = 16) and the marker's embedding row. Weights are random, shapes are real; 2b has the decoder of
Qwen2-VL-2B behind the vision encoder of Qwen2.5-VL. The contestants run interleaved, forwards and backwards in turn
(ABBA), in one process; ratios of times are ratios of medians.

Counted: forward, backward and optimizer step on a batch that lies on the device. Not counted: reading and rendering
rows, and moving them there (`collate s`, for the whole batch). All rows are equally long: padding plays no part. `plain`
and `ours` run on eight questions and stand for every G: plain code encodes a picture once per row, even if rows share it.

`step GB` is what torch has allocated at the peak of a step beyond what lay in memory before: activations, logits,
gradients; on a CPU as torch's profiler counts it, which is the same in every run (what libraries take for themselves is
not in it). `weights GB` is the model, `peak GB` their sum; the optimizer's states are in neither. FLOPs are counted by
torch for one question, without gradient checkpointing, times the questions (those of `qlora` are those of `ours`); `of
matmul` is their rate over that of a large square product in the same process, both from the fastest run. Needs
`pip install "trl-mprm[qlora]"`; with several GPUs, name one in CUDA_VISIBLE_DEVICES.
"""

import os
import sys


# select.py in this folder would hide the standard library's: the folder goes to the end of the path.
sys.path.sort(key=os.path.dirname(os.path.abspath(__file__)).__eq__)
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler tells of a GPU that is not there

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

import trl_mprm.demo
from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer
from trl_mprm.data.rows import IGNORE_INDEX
from trl_mprm.files import write_json


disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)  # of names that transformers is about to change

PROCESSOR = Path(trl_mprm.demo.__file__).parent / "qwen2.5-vl-miniature"
# Decoder (width, feed-forward width, layers, heads, key-value heads, vocabulary, tied) and vision encoder (depth, width,
# feed-forward width, heads). 2b and 7b: config.json of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct.
SIZES = {
    "tiny": ((256, 1024, 6, 4, 2, 152064, False), (4, 64, 256, 4)),
    "2b": ((1536, 8960, 28, 12, 2, 151936, True), (32, 1280, 3420, 16)),
    "7b": ((3584, 18944, 28, 28, 4, 152064, False), (32, 1280, 3420, 16)),
}
STEPS = 9
WORDS = "red orange yellow green blue purple pink brown grey total left 0 1 2 3 4 5 6 7 8 9".split()


class Contestant(NamedTuple):
    name: str
    group: int = 1  # rollouts per question
    plain: bool = False
    shared: bool = False
    quantized: bool = False


def save_random_model(size: str, image_tokens: int, folder: str) -> None:
    """A random Qwen2.5-VL behind the real processor, with the word-level tokenizer of the demo: a word is a token."""
    (width, feed_forward, layers, heads, kv_heads, vocabulary, tied), vision = SIZES[size]
    depth = vision[0]
    section = width // heads // 8
    config = AutoConfig.from_pretrained(PROCESSOR).to_dict()
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    config["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 128000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [section, section * 3 // 2, section * 3 // 2],
        },
    }
    config["vision_config"] |= {
        **dict(zip(("depth", "hidden_size", "intermediate_size", "num_heads"), vision, strict=True)),
        "out_hidden_size": width,
        "fullatt_block_indexes": list(range(depth // 4 - 1, depth, depth // 4)),
    }
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16 if cuda else torch.float32
        )
    model.save_pretrained(folder)
    pixels = image_tokens * 28 * 28
    AutoProcessor.from_pretrained(PROCESSOR, size={"shortest_edge": pixels, "longest_edge": pixels}).save_pretrained(
        folder
    )


def make_rows(n: int, group: int, image_tokens: int, answer_tokens: int) -> list[dict]:
    """`n` solutions of equal length, `group` to a picture; they differ from the first word on."""
    torch.manual_seed(1)
    side = 28 * round(image_tokens**0.5)
    pictures = [Image.effect_noise((side, side), 64).convert("RGB") for _ in range(n // group)]
    words = answer_tokens - STEPS  # a step ends with its marker
    lengths = [words // STEPS + (step < words % STEPS) for step in range(STEPS)]
    rows = []
    for index in range(n):
        steps = [
            " ".join(WORDS[(index + step * 3 + place * (1 + index)) % len(WORDS)] for place in range(length))
            for step, length in enumerate(lengths)
        ]
        labels = [(index * 5 + step * 3) % 8 / 7 for step in range(STEPS)]
        picture = pictures[index // group]
        rows.append({"images": [picture], "prompt": "look at the picture ?", "completions": steps, "labels": labels})
    return rows


def load_trainer(folder: str, quantized: bool, gradient_checkpointing: bool) -> ProcessRewardTrainer:
    cuda = torch.cuda.is_available()
    row = make_rows(1, 1, image_tokens=4, answer_tokens=64)[0]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
    )
    config = ProcessRewardConfig(
        folder,
        model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=gradient_checkpointing,
        share_prefix=True,  # batches of either kind are read
        report_to="none",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer says what it trains
        trainer = ProcessRewardTrainer(
            folder,
            config,
            train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completions", "labels")}]),
            peft_config=LoraConfig(r=16, lora_alpha=32),
            quantization_config=nf4 if quantized else None,
        )
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


def make_batch(trainer: ProcessRewardTrainer, contestant: Contestant, rows: list[dict]) -> dict:
    collate = replace(trainer.data_collator, share_prefix=contestant.shared)
    return send_to_device(collate(rows), trainer.args.device)


def loss_of(trainer: ProcessRewardTrainer, batch: dict, plain: bool) -> torch.Tensor:
    with trainer.compute_loss_context_manager():
        if not plain:
            return trainer.compute_loss(trainer.model, batch)
        markers = batch["labels"] != IGNORE_INDEX
        features = {name: value for name, value in batch.items() if name != "labels"}
        logits = trainer.model(**features, use_cache=False).logits.float()
        good = (batch["labels"][markers] > trainer.args.hard_threshold).float()
        candidates = logits[markers][:, [trainer.step_ids.good, trainer.step_ids.bad]]
        return F.cross_entropy(candidates, torch.stack([good, 1 - good], dim=1))


def train_step(trainer: ProcessRewardTrainer, batch: dict, plain: bool) -> None:
    loss_of(trainer, batch, plain).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    synchronize()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable, *args) -> float:
    synchronize()
    start = time.perf_counter()
    function(*args)
    synchronize()
    return time.perf_counter() - start


def step_memory(trainer: ProcessRewardTrainer, contestant: Contestant, rows: list[dict]) -> int:
    """Bytes allocated at the peak of a step in addition to those in memory before it."""
    batch = make_batch(trainer, contestant, rows)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(trainer, batch, contestant.plain)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(trainer, batch, contestant.plain)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.load(open(trace.name))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def optimizer_excess(trainer: ProcessRewardTrainer, rows: list[dict], repeats: int = 5) -> float:
    """Time of AdamW's step over that of moving what it must move, at the rate of a copy of 256 MB in this process."""
    loss_of(trainer, make_batch(trainer, Contestant("ours"), rows[:1]), plain=False).backward()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    # Read weights, gradients and two states; write weights and states.
    moved = 7 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    source = torch.ones(2**26, device=trainer.args.device)
    target = torch.empty_like(source)
    target.copy_(source)
    step, copy = (
        statistics.median(seconds(function) for _ in range(repeats))
        for function in (trainer.optimizer.step, lambda: target.copy_(source))
    )
    trainer.optimizer.zero_grad()
    return step * (2 * source.nbytes / copy) / moved


def count(trainer: ProcessRewardTrainer, contestant: Contestant, rows: list[dict], plain_loss: float) -> dict:
    """Measure what is not timed: the loss, equal for all before the first step, FLOPs, bytes of the weights."""
    with torch.no_grad():
        loss = float(loss_of(trainer, make_batch(trainer, contestant, rows), contestant.plain))
    question = make_batch(trainer, contestant, rows[: contestant.group])
    with FlopCounterMode(display=False) as counter:
        loss_of(trainer, question, contestant.plain).backward()
    trainer.optimizer.zero_grad()
    return {
        "loss": loss,
        "loss_difference": abs(loss - plain_loss),
        "weights_gb": sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / 1e9,
        "tflops": counter.get_total_flops() / 1e12 * len(rows) / contestant.group,
        "collate_s": seconds(make_batch, trainer, contestant, rows),
    }


def measure_times(tasks: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each task, run interleaved: all forwards, then all backwards, `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for name in tqdm([*tasks, *reversed(tasks)] * repeats, desc="Steps", delay=2):
        times[name].append(seconds(tasks[name]))
    return times


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b" if cuda else "tiny")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, a multiple of every G")
    parser.add_argument("--g", type=int, nargs="+", default=[1, 2, 4, 8], help="rollouts per question")
    parser.add_argument("--image-tokens", type=int, default=1600 if cuda else 256, help="a square number")
    parser.add_argument("--answer-tokens", type=int, default=220 if cuda else 100)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--repeats", type=int, default=5 if cuda else 2, help="ABBA rounds, each runs all twice")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if any(args.rows % group for group in args.g):
        parser.error(f"--rows is {args.rows}, expected a multiple of every --g, got {args.g}")

    contestants = [Contestant("plain", plain=True), Contestant("ours")]
    contestants += [Contestant(f"shared, G = {group}", group, shared=True) for group in args.g]
    contestants += [Contestant("qlora", quantized=True)]
    rows = {group: make_rows(args.rows, group, args.image_tokens, args.answer_tokens) for group in {1, *args.g}}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(args.size, args.image_tokens, folder)
        if cuda:
            torch.cuda.empty_cache()
        trainers = {
            quantized: load_trainer(folder, quantized, args.gradient_checkpointing) for quantized in (False, True)
        }

    plain_losses = {}
    for group, group_rows in rows.items():
        batch = make_batch(trainers[False], contestants[0], group_rows)
        length = batch["input_ids"].shape[1]
        with torch.no_grad():
            plain_losses[group] = float(loss_of(trainers[False], batch, plain=True))
    results = {
        contestant.name: count(
            trainers[contestant.quantized], contestant, rows[contestant.group], plain_losses[contestant.group]
        )
        for contestant in contestants
    }
    results["qlora"]["tflops"] = results["ours"]["tflops"]

    if args.gradient_checkpointing:
        for trainer in trainers.values():
            trainer.model.gradient_checkpointing_enable()
    width, feed_forward, *_, vocabulary, _ = SIZES[args.size][0]
    side = 8192 if cuda else 2048
    shapes = {"square": (side, side, side), "model": (args.rows * length, width, feed_forward)}
    factory = {"device": trainers[False].args.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    tasks = {
        name: partial(torch.mm, torch.randn(m, k, **factory), torch.randn(k, n, **factory))
        for name, (m, k, n) in shapes.items()
    }
    memory = {}
    for contestant in contestants:
        trainer = trainers[contestant.quantized]
        batch = make_batch(trainer, contestant, rows[contestant.group])
        tasks[contestant.name] = partial(train_step, trainer, batch, contestant.plain)
        tasks[contestant.name]()  # the warm-up
        memory[contestant.name] = step_memory(trainer, contestant, rows[contestant.group])
    times = measure_times(tasks, args.repeats)

    tokens = args.rows * length
    rates = {name: 2 * m * k * n / min(times[name]) / 1e12 for name, (m, k, n) in shapes.items()}
    for name, result in results.items():
        result["step_gb"] = memory[name] / 1e9
        result["peak_gb"] = result["step_gb"] + result["weights_gb"]
        result["step_s"], result["min_s"] = statistics.median(times[name]), min(times[name])
        result["tokens_per_s"] = tokens / result["step_s"]
        result["share_of_matmul"] = result["tflops"] / result["min_s"] / rates["square"]

    def ratio(first: str, second: str, key: str = "step_s") -> float:
        return results[first][key] / results[second][key]

    shared = {str(group): f"shared, G = {group}" for group in args.g}
    prefix = length - args.answer_tokens
    logits_gb = tokens * vocabulary * (2 + 4 if cuda else 4) / 1e9  # in the model's type, and in float32
    report = {
        "size": args.size,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(factory["dtype"]).removeprefix("torch."),
        "rows": args.rows,
        "prefix_tokens": prefix,
        "answer_tokens": args.answer_tokens,
        "gradient_checkpointing": args.gradient_checkpointing,
        "memory_plain_over_ours": ratio("plain", "ours", "step_gb"),
        "memory_with_weights_plain_over_ours": ratio("plain", "ours", "peak_gb"),
        "memory_drop_over_logits": (results["plain"]["step_gb"] - results["ours"]["step_gb"]) / logits_gb,
        "time_plain_over_ours": ratio("plain", "ours"),
        "time_plain_over_ours_of_minima": ratio("plain", "ours", "min_s"),
        "time_plain_over_shared": {group: ratio("plain", name) for group, name in shared.items()},
        "time_ours_over_shared": {group: ratio("ours", name) for group, name in shared.items()},
        "ideal_ours_over_shared": {
            group: int(group) * length / (prefix + int(group) * args.answer_tokens) for group in shared
        },
        "time_qlora_over_lora": ratio("qlora", "ours"),
        "collate_over_step": results["ours"]["collate_s"] / results["ours"]["step_s"],
        "optimizer_over_copy": optimizer_excess(trainers[False], rows[1]),
        "matmul_tflops": rates,
        "contestants": results,
    }
    print_report(report)
    if args.json:
        write_json(report, args.json)


def print_report(report: dict) -> None:
    results, lengths = report["contestants"], (report["prefix_tokens"], report["answer_tokens"])
    print(
        f"\n{report['size']}, {report['dtype']}, {report['device']}, {report['rows']} rows of {lengths[0]} + {lengths[1]} "
        f"tokens, gradient checkpointing {'on' if report['gradient_checkpointing'] else 'off'}\n"
    )
    header = ",step s,min s,tokens/s,step GB,weights GB,peak GB,of matmul,collate s,loss diff.".split(",")
    keys = ("step_s", "min_s", "tokens_per_s", "step_gb", "weights_gb", "peak_gb", "share_of_matmul", "collate_s")
    lines = [[name, *(result[key] for key in (*keys, "loss_difference"))] for name, result in results.items()]
    print(tabulate(lines, headers=header, floatfmt=".3g", tablefmt="github"), end="\n\n")
    keys = ("time_plain_over_shared", "time_ours_over_shared", "ideal_ours_over_shared")
    lines = [[group, *(report[key][group] for key in keys)] for group in report[keys[0]]]
    header = ["G", "plain/shared", "ours/shared", "its ideal"]
    print(tabulate(lines, headers=header, floatfmt=".3g", tablefmt="github"), end="\n\n")
    lines = [[key, value] for key, value in report.items() if isinstance(value, float)]
    lines += [[f"matmul TFLOP/s, {name}", rate] for name, rate in report["matmul_tflops"].items()]
    print(tabulate(lines, headers=["", "figure"], floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
