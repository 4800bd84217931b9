"""
The paper's 10% study in miniature: which subset of Monte-Carlo-annotated rollouts trains the best process reward model?

Paper: arXiv 2602.04145v2, Figures 1 and 2, Tables 2, 4 and 5. Command: `make study`, about three hours on two cores; a run
that is stopped goes on where it was when the command is given again.

A run is an arm (which rows, which labels, how often) in a world (the noise, the policy, the base) with a seed, which
draws data, benchmark, selection, order and fresh weights:

    {"world": "standard", "arm": "bis10", "seed": 21, "rollouts": 1597, "macro_f1_step_weighted": 0.806, "auc": 0.861, ...}

World, base, sizes and hyper-parameters are `trl_mprm/demo/settings.py`: calibrated on seeds 101 to 107 without a look at
BIS, frozen, and measured for the demo on seeds 11 to 15. The arms, worlds and seeds below were written before the first
of their runs; nothing was chosen on seeds 21 to 25.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, List
from report import write_report
from tqdm.auto import tqdm

from trl_mprm import (
    DataCollatorForProcessReward,
    ProcessRewardModel,
    evaluate_model,
    load_rollouts,
    load_zero_shot,
    read_benchmark,
    select,
)
from trl_mprm.demo.base import BASE_MODEL, train_base
from trl_mprm.demo.run import make_trainer, make_world, start_worker
from trl_mprm.demo.settings import DEMO, Settings
from trl_mprm.files import write_json
from trl_mprm.prompting.rendering import render_rows


SEEDS = (21, 22, 23, 24, 25)
WEAKER_BASE_UPDATES = 1000  # half of the base's own


@dataclass(frozen=True)
class Arm:
    """Which rows, which labels, how often: all that differs between the runs of one world."""

    rule: str | None = "bis"  # None: the base, untrained
    fraction: float = 1.0
    alpha: float = 0.2
    ties: str = "first"
    true_labels: bool = False
    num_train_epochs: int = 1
    loss_type: str = "hard"
    hard_threshold: float = 0.0


def bis(percent: int, **changes: Any) -> Arm:
    """Alpha as in the paper's code: 0.2 at 10% and, our reading, below; 0.05 at 25% and, our reading, everywhere else."""
    return replace(Arm(fraction=percent / 100, alpha=0.2 if percent <= 10 else 0.05), **changes)


def other(rule: str, percent: int, **changes: Any) -> Arm:
    return replace(Arm(rule, percent / 100), **changes)


FRACTIONS = (5, 10, 15, 25, 35, 50)
FULL = other("random", 100)
CORE = {
    "zero-shot": Arm(rule=None),
    **{f"random{percent}": other("random", percent) for percent in FRACTIONS},
    **{f"bis{percent}": bis(percent) for percent in FRACTIONS},
    "full": FULL,
    "true10": other("random", 10, true_labels=True),
}
MORE = {
    **{f"{rule}{percent}": other(rule, percent) for percent in (10, 25) for rule in ("mixed", "reliable", "low_mc")},
    **{f"bis10-alpha{alpha}": bis(10, alpha=alpha) for alpha in (0.02, 0.05, 0.1, 0.5)},
    "bis10-hash": bis(10, ties="hash"),
}
DEAR = {
    "full-1/N": replace(FULL, hard_threshold=1 / DEMO.num_mc),
    "full-2/N": replace(FULL, hard_threshold=2 / DEMO.num_mc),
    "full-soft": replace(FULL, loss_type="soft"),
    "random25x4": other("random", 25, num_train_epochs=4),  # as many updates as full
}
LAST = {
    **{f"bis25-alpha{alpha}": bis(25, alpha=alpha) for alpha in (0.02, 0.2)},
    "bis25-hash": bis(25, ties="hash"),
    "true-full": replace(FULL, true_labels=True),
}


ARMS = CORE | MORE | DEAR | LAST
ROBUSTNESS = ("zero-shot", "random10", "bis10")
WORLDS = ("standard", "lighter noise", "heavier noise", "better policy", "worse policy", "weaker base")


def settings_of(world: str, settings: Settings) -> Settings:
    """Settings of a world; each differs from the standard world in one thing."""
    changes = {
        "lighter noise": {"options": ((0, 1.0),)},  # no answer can be guessed
        "heavier noise": {"options": ((0, 0.1), (2, 0.45), (4, 0.45))},
        "better policy": {"policy": replace(settings.policy, hard_weights=(0.70, 0.26, 0.03, 0.01))},
        "worse policy": {"policy": replace(settings.policy, hard_weights=(0.38, 0.48, 0.09, 0.05))},
    }
    return replace(settings, **changes.get(world, {}))


def base_of(world: str, output_dir: Path) -> Path:
    return output_dir / "weaker-base" if world == "weaker base" else BASE_MODEL


def plan() -> list[tuple[str, str, int]]:
    """World, arm and seed of every run, what matters most first."""
    core, more, dear, last = ([("standard", arm) for arm in arms] for arms in (CORE, MORE, DEAR, LAST))
    other_worlds = [(world, arm) for world in WORLDS[1:] for arm in ROBUSTNESS]
    blocks = [(core, SEEDS)]
    for seeds in (SEEDS[:2], SEEDS[2:]):  # some seeds of everything before more seeds of anything
        blocks += [(block, seeds) for block in (more, other_worlds, dear, last)]
    return [(world, arm, seed) for block, seeds in blocks for seed in seeds for world, arm in block]


def build_world(folder: Path, settings: Settings, seed: int) -> None:
    """Corpus, validation split and benchmark of one world and seed; statistics last, so they say that all is there."""
    if not (folder / "statistics.json").is_file():
        write_json(make_world(folder, settings, seed), folder / "statistics.json")


@lru_cache(maxsize=1)  # tasks of one world and seed follow each other
def load_world(folder: Path) -> tuple[Dataset, Dataset, dict[str, list[int]], dict]:
    """Rollouts of the corpus and of the validation split, true labels by rollout, and what `RenderedOnce` remembers."""
    rows, validation = (
        load_rollouts(folder / part / "annotations", image_root=folder / part).cast_column(
            "images", List(Image(decode=False))
        )
        for part in ("corpus", "validation")
    )
    return rows, validation, json.loads((folder / "corpus" / "true_labels.json").read_text(encoding="utf-8")), {}


class RenderedOnce(DataCollatorForProcessReward):
    """Renders each rollout of a world once: a fifth of the time of a run, and twelve runs read it."""

    remembered: dict[str, Any]

    def _fitting(self, rows: list[dict[str, Any]], same_prompt: bool = False):
        parts = [self._once(row) for row in rows]
        tensors = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
        return rows, [part[0] for part in parts], tensors, [0, 0, 0]

    def _once(self, row: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        if row["rollout_id"] not in self.remembered:
            (rendered,), tensors = render_rows([row], self.processing_class, self.step_format)
            picture = row["images"][0]["path"]  # four rollouts share it
            self.remembered[row["rollout_id"]] = rendered, self.remembered.setdefault(picture, tensors)
        return self.remembered[row["rollout_id"]]


def subset_figures(mc_scores: list[list[float]], truth: list[list[int]]) -> dict[str, float]:
    """Count the wrong labels of a subset, which only a synthetic world can tell."""
    steps, true = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (mc_scores, truth))
    mixed = [0 < sum(score > 0 for score in row) < len(row) for row in mc_scores]
    return {
        "steps": len(steps),
        "error_steps": float((steps == 0).mean()),
        "mixed_rollouts": float(np.mean(mixed)),
        "mean_mc": float(steps.mean()),
        "wrong_but_positive": float((steps[true == 0] > 0).mean()),
    }


def run(output_dir: Path, settings: Settings, world: str, arm_name: str, seed: int, record: Path) -> None:
    """Select, train, evaluate, write one record."""
    print(f"{world}, {arm_name}, seed {seed}", flush=True)
    started, arm = time.time(), ARMS[arm_name]
    settings, base = settings_of(world, settings), base_of(world, output_dir)
    folder = output_dir / "worlds" / data_name(world, seed)
    result = {"world": world, "arm": arm_name, "seed": seed, "rollouts": 0, "optimizer_steps": 0}
    if arm.rule is None:
        prm = load_zero_shot(str(base))
    else:
        scored, validation, truth, remembered = load_world(folder)
        kept = select(scored, arm.rule, fraction=arm.fraction, alpha=arm.alpha, ties=arm.ties, seed=seed)
        rows = scored.select(kept.indices)
        true_labels = [truth[rollout] for rollout in rows["rollout_id"]]
        result |= {"rollouts": len(rows)} | subset_figures(rows["mc_scores"], true_labels)
        if arm.true_labels:
            labels = [[-100.0 if v < 0 else float(v) for v in row] for row in true_labels]
            rows = rows.remove_columns("labels").add_column("labels", labels)
        config = {name: getattr(arm, name) for name in ("num_train_epochs", "loss_type", "hard_threshold")}
        with TemporaryDirectory() as scratch:
            trainer = make_trainer(
                rows, validation, kept.report, Path(scratch), settings, seed, base=base, disable_tqdm=True, **config
            )
            collator = trainer.data_collator
            trainer.data_collator = RenderedOnce(collator.processing_class, collator.step_format)
            trainer.data_collator.remembered = remembered
            trainer.train()
        result["optimizer_steps"] = trainer.state.global_step
        prm = ProcessRewardModel(trainer.model, trainer.processing_class)
    metrics = evaluate_model(prm, read_benchmark(folder / "benchmark"), batch_size=64)
    names = ("macro_f1_step_weighted", "macro_f1_pooled", "macro_f1_source_mean", "auc", "threshold_protocol")
    write_json(result | {k: metrics[k] for k in names} | {"seconds": round(time.time() - started, 1)}, record)


def data_name(world: str, seed: int) -> str:
    """The weaker base is measured on the very data of the standard world."""
    return f"{'standard' if world == 'weaker base' else world}-{seed}".replace(" ", "-")


def record_path(output_dir: Path, task: tuple[str, str, int]) -> Path:
    name = "-".join(map(str, task)).replace(" ", "-").replace("/", "_")
    return output_dir / "records" / f"{name}.json"


def take_records(results: Path, output_dir: Path) -> dict[str, dict]:
    """The records of an earlier run, as its report keeps them. Returns the statistics of its corpora."""
    earlier = json.loads(results.read_text(encoding="utf-8"))
    for run in earlier["runs"]:
        write_json(run, record_path(output_dir, (run["world"], run["arm"], run["seed"])))
    return earlier["corpora"]


def run_all(output_dir: Path, tasks: list[tuple[str, str, int]], settings: Settings = DEMO) -> None:
    """Every task (world, arm, seed) that has no record yet."""
    records = {task: record_path(output_dir, task) for task in tasks}
    left = {task: record for task, record in records.items() if not record.is_file()}
    print(f"{len(records) - len(left)} of {len(records)} runs are done")
    (output_dir / "records").mkdir(parents=True, exist_ok=True)
    log, spawn = output_dir / "training.log", get_context("spawn")
    # Two trainings of one thread each go nearly twice as fast as one of two threads: the models are that small.
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=start_worker, initargs=(log,)) as pool:
        waiting = [
            pool.submit(build_world, output_dir / "worlds" / name, settings_of(world, settings), seed)
            for name, (world, seed) in {data_name(world, seed): (world, seed) for world, _, seed in left}.items()
        ]
        for future in tqdm(as_completed(waiting), total=len(waiting), desc="worlds"):
            future.result()
        tasks = list(left)
        on_weaker = next((place for place, (world, _, _) in enumerate(tasks) if world == "weaker base"), len(tasks))
        weaker = base_of("weaker base", output_dir)
        training = [pool.submit(train_weaker_base, weaker)] if tasks[on_weaker:] and not weaker.is_dir() else []
        with tqdm(total=len(tasks) + len(training), desc=f"runs (details: {log})") as bar:
            for part in (tasks[:on_weaker], tasks[on_weaker:]):
                running = [pool.submit(run, output_dir, settings, *task, left[task]) for task in part]
                for future in as_completed(training + running):
                    future.result()
                    bar.update()
                training = []


def train_weaker_base(folder: Path) -> None:
    part = folder.with_suffix(".part")
    train_base(part, WEAKER_BASE_UPDATES)
    part.rename(folder)


def read_records(output_dir: Path) -> dict[str, Any]:
    """All records, by world, arm and seed."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (output_dir / "records").glob("*.json")]
    arms = list(ARMS)
    records.sort(key=lambda record: (WORLDS.index(record["world"]), arms.index(record["arm"]), record["seed"]))
    statistics = {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
                  for path in sorted((output_dir / "worlds").glob("*/statistics.json"))}  # fmt: skip
    return {"arms": {name: asdict(arm) for name, arm in ARMS.items()}, "corpora": statistics, "runs": records}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of all runs and of the report")
    parser.add_argument("--take", type=Path, help="results.json of an earlier run: what it has is not run again")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    arguments = parser.parse_args()
    corpora = take_records(arguments.take, arguments.output) if arguments.take else {}
    if not arguments.report:
        run_all(arguments.output, plan())
    results = read_records(arguments.output)
    write_json(results | {"corpora": corpora | results["corpora"]}, arguments.output / "results.json")
    write_report(arguments.output)
