"""
The miniature from end to end with the public API, as a user would write it.

    from trl_mprm.demo.run import run_demo
    run_demo("runs/demo")

For every seed: make a corpus and a benchmark, score the rollouts with BIS, select, train, evaluate. Then compare.
"""

import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig

from trl_mprm import (
    ProcessRewardConfig,
    ProcessRewardModel,
    ProcessRewardTrainer,
    add_bis,
    evaluate_model,
    load_rollouts,
    load_zero_shot,
    read_benchmark,
    select,
    top_fraction,
)
from trl_mprm.files import write_json

from . import plots
from .base import BASE_MODEL
from .corpus import write_benchmark, write_corpus
from .inference import interval, p_equivalent
from .settings import DEMO, QUICK, Settings


METRICS = ("macro_f1_step_weighted", "macro_f1_pooled", "auc")
F1 = "macro_f1_step_weighted"
MARGIN = 2.0  # points of F1 that count as no difference
CRITERION = (
    "Differences in step-weighted macro-F1, paired by seed. Better: the 95% interval lies above 0. As good: two one-sided "
    f"tests place the difference within {MARGIN:g} points at the 5% level."
)


def run_demo(
    output_dir: str | Path, quick: bool = False, full: bool = False, settings: Settings | None = None
) -> dict:
    """
    Run the miniature and write `results.json`, pictures and every trained model with its card into `output_dir`.

    Args:
        output_dir (`str` or `Path`):
            Folder for everything; what an earlier run left there is replaced.
        quick (`bool`, *optional*, defaults to `False`):
            Run one seed on a smaller corpus, to show that everything runs; the result is no evidence.
        full (`bool`, *optional*, defaults to `False`):
            Train all weights but the vision encoder's, instead of an adapter on a base in 4 bit (QLoRA).
        settings (`Settings`, *optional*):
            Settings to use instead of the frozen ones.

    Returns:
        `dict`: the content of `results.json`.
    """
    started = time.time()
    settings = settings or (QUICK if quick else DEMO)
    output_dir = Path(output_dir)
    for old in (*output_dir.glob("seed-*"), *output_dir.glob("*.png"), output_dir / "results.json"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    seeds = sorted({seed for seeds in settings.seeds.values() for seed in seeds})
    tasks = [(subset, seed) for seed in seeds for subset in settings.seeds if seed in settings.seeds[subset]]
    # The models are so small that two trainings of one thread each go nearly twice as fast as one of two threads.
    log, spawn = output_dir / "training.log", get_context("spawn")
    log.unlink(missing_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=start_worker, initargs=(log,)) as pool:
        bar = {"desc": f"worlds of {settings.problems:,} problems, {settings.num_mc} continuations per step"}
        worlds = pool.map(make_world, [output_dir / f"seed-{seed}" for seed in seeds], repeat(settings), seeds)
        corpora = dict(zip(seeds, tqdm(worlds, total=len(seeds), **bar), strict=True))
        long_first = sorted(tasks, key=lambda task: not task[0].endswith("full"))
        running = {pool.submit(run_subset, output_dir, settings, *task, full): task for task in long_first}
        done = tqdm(as_completed(running), total=len(tasks), desc=f"trainings and evaluations (details: {log})")
        records = {running[future]: future.result() for future in done}
    runs = [records[task] for task in tasks]
    summary = summarise(runs)
    results = {
        "quick": quick,
        "full_fine_tuning": full,
        "settings": asdict(settings),
        "corpus": corpora,
        "runs": runs,
        "summary": summary,
        "verdict": verdict(runs),
        "seconds": round(time.time() - started, 1),
    }
    results = json.loads(json.dumps(results))  # returns the same types as reading the file: lists, string keys
    write_json(results, output_dir / "results.json")
    plots.draw_results(results, output_dir / "f1_by_subset.png")
    first = output_dir / f"seed-{seeds[0]}"
    plots.draw_corpus(load_scored(first, settings), settings.fraction, output_dir / "corpus.png")
    trained = first / "bis10"
    if trained.is_dir():
        prm, items = load_prm(trained, full), read_benchmark(first / "benchmark").items
        plots.draw_solution(prm, items, output_dir / "solution.png")
    print_table(results, output_dir)
    return results


def start_worker(log: Path) -> None:
    """One thread, and all bars and logs of a worker into one file."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def make_world(folder: Path, settings: Settings, seed: int) -> dict:
    """Write the corpus and the benchmark, from two streams of one seed."""
    rng, rng_benchmark = (np.random.default_rng([seed, stream]) for stream in (0, 2))  # of three, once
    noise: dict[str, Any] = {"options": settings.options, "wrong_reference": settings.wrong_reference}
    mc: dict[str, Any] = {"rollouts": settings.rollouts, "num_mc": settings.num_mc}
    return {
        "train": write_corpus(folder / "corpus", settings.problems, settings.policy, rng, **mc, **noise),
        "benchmark": write_benchmark(
            folder / "benchmark", settings.benchmark_problems, settings.benchmark_policies, rng_benchmark,
            options=settings.options,
        ),
    }  # fmt: skip


def load_scored(folder: Path, settings: Settings) -> Dataset:
    rollouts = load_rollouts(folder / "corpus" / "annotations", image_root=folder / "corpus")
    return rollouts.map(add_bis, fn_kwargs={"alpha": settings.alpha}, batched=True)


def run_subset(output_dir: Path, settings: Settings, subset: str, seed: int, full: bool) -> dict:
    """One row of the results: select, train, save, load, evaluate."""
    print(f"seed {seed}: {subset}", flush=True)
    folder = output_dir / f"seed-{seed}"
    rows, selection = select_rows(subset, load_scored(folder, settings), folder, settings, seed)
    started, steps = time.time(), 0
    if rows is None:
        prm = load_zero_shot(str(BASE_MODEL))
    else:
        trainer = make_trainer(rows, selection, folder / subset, settings, seed, full)
        trainer.train()
        trainer.save_model()
        prm, steps = load_prm(folder / subset, full), trainer.state.global_step
    seconds = time.time() - started
    benchmark = read_benchmark(folder / "benchmark")
    metrics = evaluate_model(prm, benchmark, batch_size=64, output_dir=folder / f"evaluation-{subset}")
    if rows is not None:
        trainer.create_model_card(results=metrics, benchmark="miniature of VisualProcessBench")
    return {
        "subset": subset,
        "seed": seed,
        "rollouts": 0 if rows is None else len(rows),
        "optimizer_steps": steps,
        "seconds": round(seconds, 1),
        **{name: metrics[name] for name in METRICS},
        "threshold_protocol": metrics["threshold_protocol"],
    }


def select_rows(
    subset: str, scored: Dataset, folder: Path, settings: Settings, seed: int
) -> tuple[Dataset | None, dict | None]:
    """Training rows of a subset, and the report of its selection."""
    if subset == "zero-shot":
        return None, None
    if subset == "full":
        return scored, None
    if subset == "bis10":
        keep = top_fraction(scored, settings.fraction, by="source")
        return scored.filter(keep, batched=True), keep.report | {"alpha": settings.alpha}
    fraction = 0.25 if subset == "random25" else settings.fraction
    selection = select(scored, rule="random", fraction=fraction, seed=seed)
    if subset.startswith("random"):
        return scored.filter(selection, batched=True), selection.report
    # The same rows with true labels: what the label noise costs.
    rows = scored if subset == "true-full" else scored.filter(selection, batched=True)
    truth = json.loads((folder / "corpus" / "true_labels.json").read_text(encoding="utf-8"))
    labels = [[-100.0 if v < 0 else float(v) for v in truth[name]] for name in rows["rollout_id"]]
    return rows.remove_columns("labels").add_column("labels", labels), None


def make_trainer(
    rows: Dataset, selection: dict | None, output_dir: Path, settings: Settings, seed: int, full: bool = False,
    **config: Any,
) -> ProcessRewardTrainer:  # fmt: skip
    """
    The trainer of one process reward model: the same recipe for every subset, but for `config`.

    QLoRA, that is a base in 4 bit, with an adapter on the decoder and a trained projector; or with `full` all weights
    but the vision encoder's.
    """
    lora = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, modules_to_save=["merger"])
    return ProcessRewardTrainer(
        model=str(BASE_MODEL),
        args=ProcessRewardConfig(
            output_dir=str(output_dir),
            hub_model_id=f"miniature-mprm-{output_dir.name}",  # the name on the card
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.full_learning_rate if full else settings.learning_rate,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            dataloader_pin_memory=False,
            **config,
        ),
        train_dataset=rows,
        peft_config=None if full else lora,
        quantization_config=None if full else nf4(),
        selection=selection,
    )


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def load_prm(folder: Path, full: bool) -> ProcessRewardModel:
    return ProcessRewardModel.from_pretrained(folder, quantization_config=None if full else nf4())


def summarise(runs: list[dict]) -> dict:
    """Means of every subset, and differences paired by seed."""
    by_subset: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_subset.setdefault(run["subset"], {})[run["seed"]] = run
    subsets = {
        subset: {name: interval([run[name] for run in of_seed.values()]) for name in METRICS}
        for subset, of_seed in by_subset.items()
    }
    pairs = {}
    for one, other in (
        ("bis10", "random10"),
        ("bis10", "full"),
        ("full", "random10"),
        ("full", "zero-shot"),
        ("true10", "random10"),
        ("true-full", "full"),
    ):
        both = sorted(by_subset.get(one, {}).keys() & by_subset.get(other, {}).keys())
        if both:
            pairs[f"{one} - {other}"] = {
                name: interval([by_subset[one][seed][name] - by_subset[other][seed][name] for seed in both])
                for name in METRICS
            }
    return {"subsets": subsets, "paired_differences": pairs}


def verdict(runs: list[dict]) -> dict:
    """
    Answer the two questions of the demo by criteria that were written before the final seeds ran.

    See `CRITERION`.
    """
    by_subset: dict[str, dict[int, float]] = {}
    for run in runs:
        by_subset.setdefault(run["subset"], {})[run["seed"]] = 100 * run[F1]
    questions = {
        "BIS-10% is better than a random 10%": ("random10", lambda d: interval(d)["low"] > 0),
        "BIS-10% is as good as all rollouts": ("full", lambda d: p_equivalent(d, MARGIN) < 0.05),
    }
    answers: dict[str, Any] = {"criterion": CRITERION}
    for question, (other, is_shown) in questions.items():
        one, two = by_subset.get("bis10", {}), by_subset.get(other, {})
        differences = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
        if len(differences) < 2:
            answers[question] = {"answer": "not run", "words": f"{question}: not run on two seeds or more."}
            continue
        found, answer = interval(differences), "shown" if is_shown(differences) else "not shown"
        spread = f"95% interval {found['low']:+.1f} to {found['high']:+.1f}, {found['seeds']} seeds"
        words = f"{question}: {answer} ({found['mean']:+.1f} points of F1, {spread})."
        answers[question] = {"answer": answer, "words": words}
    return answers


def print_table(results: dict, output_dir: Path) -> None:
    """The one table of the demo, the verdict, and what was written."""
    runs: dict[str, list[dict]] = {}
    for run in results["runs"]:
        runs.setdefault(run["subset"], []).append(run)
    print(f"\n{'subset':<12}{'seeds':>6}{'rollouts':>10}{'updates':>9}{'s':>7}{'F1':>8}{'95% interval':>16}{'AUC':>8}")
    for subset, rows in runs.items():
        f1, auc = (results["summary"]["subsets"][subset][name] for name in ("macro_f1_step_weighted", "auc"))
        spread = "" if f1["low"] is None else f"{100 * f1['low']:.1f} to {100 * f1['high']:.1f}"
        rollouts, steps, seconds = (np.mean([r[k] for r in rows]) for k in ("rollouts", "optimizer_steps", "seconds"))
        print(f"{subset:<12}{len(rows):>6}{rollouts:>10,.0f}{steps:>9,.0f}{seconds:>7.0f}"
              f"{100 * f1['mean']:>8.1f}{spread:>16}{100 * auc['mean']:>8.1f}")  # fmt: skip
    print("F1: step-weighted macro-F1 x 100, held-out threshold. Training: "
          + ("all weights." if results["full_fine_tuning"] else "QLoRA."))  # fmt: skip
    for answer in results["verdict"].values():
        if isinstance(answer, dict):
            print(answer["words"])
    if results["quick"]:
        print("QUICK: one seed on a smaller corpus. It shows that everything runs; it is no evidence.")
    print(f"{results['seconds']:.0f} s. Wrote {output_dir}/: results.json, f1_by_subset.png, corpus.png, "
          "solution.png, seed-*/<subset>/ (models with their cards)")  # fmt: skip
