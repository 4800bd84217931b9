"""
What does one shared prefix save when N candidates of one question are scored? Against running each from its first token.

    python recipes/bench/score.py                               # CPU: a small decoder, real lengths
    python recipes/bench/score.py --size 7b --json score.json   # one GPU: Qwen2.5-VL-7B's shapes in bfloat16

One picture of `--image-tokens` tokens, N answers of `--answer-tokens` tokens in nine steps. Weights are random, shapes
are real; both contestants are `ProcessRewardModel.score_batch`, from the picture to the scores, with `share_prefix` on
and off, interleaved ABBA. The ideal is the ratio of the tokens, N (P + R) / (P + N R), where P is the prefix.
The plain one runs batches of eight. FLOPs are counted by torch, not timed, without the vision encoder (a batch encodes
equal pictures once, so the plain one encodes the picture once for eight candidates); `flops_over_ideal` is close to 1
where nothing of the prefix runs twice.
"""

import sys


sys.path.pop(0)  # this folder, whose select.py would hide the standard library's

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLConfig

import trl_mprm.demo
from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.models.loading import add_marker
from trl_mprm.models.shared_prefix import shared_length
from trl_mprm.prompting.rendering import render_rows


PROCESSOR = Path(trl_mprm.demo.__file__).parent / "qwen2.5-vl-miniature"
# Decoder and vision encoder. 3b and 7b: config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
SIZES = {
    "tiny": ((256, 1024, 6, 4, 2, 8192), {"depth": 4, "hidden_size": 64, "intermediate_size": 256, "num_heads": 4}),
    "3b": ((2048, 11008, 36, 16, 2, 151936), QWEN_VISION),
    "7b": ((3584, 18944, 28, 28, 4, 152064), QWEN_VISION),
}


def build(size: str, image_tokens: int, device: str) -> ProcessRewardModel:
    """A random Qwen2.5-VL behind the real processor, with the word-level tokenizer of the demo: a word is a token."""
    text, vision = SIZES[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    pixels = image_tokens * 28 * 28
    processor = AutoProcessor.from_pretrained(
        PROCESSOR, size={"shortest_edge": pixels, "longest_edge": pixels}, use_fast=True
    )
    tokenizer = processor.tokenizer
    section = text[0] // text[3] // 8
    every = max(4, vision["depth"] // 4)  # as in the 32 layers of the real one, most see a window only
    config = Qwen2_5_VLConfig(
        text_config={
            **dict(zip((*names, "vocab_size"), text, strict=True)),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [section, section * 3 // 2, section * 3 // 2],
            },
            "max_position_embeddings": 128000,
        },
        vision_config={
            **vision,
            "out_hidden_size": text[0],
            "window_size": 112,
            "fullatt_block_indexes": list(range(every - 1, vision["depth"], every)),
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
    add_marker(model, processor, StepFormat())
    return ProcessRewardModel(model, processor)


def candidates(n: int, answer_tokens: int, image_tokens: int) -> list[dict]:
    """Answers of nine steps that differ from the first word on; a step ends with its marker."""
    side = 28 * round(image_tokens**0.5)
    image = Image.effect_noise((side, side), 64).convert("RGB")
    words = "red orange yellow green blue purple pink brown grey total left 0 1 2 3 4 5 6 7 8 9".split()
    lengths = [(answer_tokens - 9) // 9 + (step < (answer_tokens - 9) % 9) for step in range(9)]
    rows = []
    for index in range(n):
        steps = [
            " ".join(words[(index * 7 + step * 3 + place * (1 + index)) % len(words)] for place in range(length))
            for step, length in enumerate(lengths)
        ]
        rows.append({"images": [image], "prompt": "look at the picture ?", "completions": steps})
    for index, row in enumerate(rows):  # the first word tells the candidates apart
        row["completions"][0] = " ".join([words[index % len(words)], *row["completions"][0].split()[1:]])
    return rows


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b" if cuda else "tiny")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4, 16, 64], help="candidates")
    parser.add_argument("--image-tokens", type=int, default=1600)
    parser.add_argument("--answer-tokens", type=int, default=220)
    parser.add_argument("--max-batch-tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3, help="ABBA rounds, each runs both contestants twice")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()

    device = "cuda" if cuda else "cpu"
    prm = build(args.size, args.image_tokens, device)
    results = {}
    for n in args.n:
        rows = candidates(n, args.answer_tokens, args.image_tokens)
        rendered, _ = render_rows(rows[:2] if n > 1 else rows * 2, prm.processing_class, prm.step_format)
        prefix = shared_length(rendered)
        answer = len(rendered[0].input_ids) - prefix
        run = {
            share: partial(prm.score_batch, rows, max_batch_tokens=args.max_batch_tokens, share_prefix=share)
            for share in (True, False)
        }
        flops, scores = {}, {}
        for share in (True, False):  # also the warm-up
            with FlopCounterMode(display=False) as counter:
                scores[share] = run[share]()
            counts = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
            flops[share] = counts["Global"] - next(n for name, n in counts.items() if name.endswith("model.visual"))
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.repeats):
            for share in (True, False, False, True):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run[share]()
                if cuda:
                    torch.cuda.synchronize()
                times[share].append(time.perf_counter() - start)
        ideal = n * (prefix + answer) / (prefix + n * answer)
        results[n] = {
            "prefix_tokens": prefix,
            "answer_tokens": answer,
            "plain_s": statistics.median(times[False]),
            "shared_s": statistics.median(times[True]),
            "time_plain_over_shared": statistics.median(times[False]) / statistics.median(times[True]),
            "time_plain_over_shared_of_minima": min(times[False]) / min(times[True]),
            "ideal": ideal,
            "flops_over_ideal": flops[True] / flops[False] * ideal,
            "max_abs_score_difference": max(
                abs(a - b)
                for row, other in zip(scores[True], scores[False], strict=True)
                for a, b in zip(row, other, strict=True)
            ),
        }
        print(f"N = {n}: {results[n]['time_plain_over_shared']:.2f}x", flush=True)
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{args.size}, {prm.model.dtype}, {name}, median of {2 * args.repeats} runs each\n")
    header = ["N", "prefix", "answer", "plain s", "shared s", "plain/shared", "ideal", "FLOPs/ideal", "score diff."]
    keys = ("prefix_tokens", "answer_tokens", "plain_s", "shared_s", "time_plain_over_shared", "ideal")
    keys += ("flops_over_ideal", "max_abs_score_difference")
    rows = [[n, *(result[key] for key in keys)] for n, result in results.items()]
    print(tabulate(rows, headers=header, floatfmt=".3g", tablefmt="github"))
    if args.json:
        report = {"size": args.size, "device": name, "max_batch_tokens": args.max_batch_tokens, "n": results}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
