"""
Write the files of the miniature: a corpus in the schema of VisualPRM400K-v1.1-Raw, and a benchmark in VisualProcessBench's.

    python -m trl_mprm.demo.corpus data     # a small pair to try things on: data/rollouts and data/benchmark

One line of `corpus/annotations/sum-2.jsonl`, shortened:

    {"image": "images/00000.png", "question": "<image>\\nadd red blue options 2 7", "answer": "2", "num_mc_sequences": 16,
     "steps_with_score": [{"step": "from 0", "score": 0.875, "num_mc_correct": 14, "num_mc_total": 16},
                          {"step": "red is 7 total 7", "score": 0.9375, "num_mc_correct": 15, "num_mc_total": 16}, ...]}
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from trl_mprm.files import atomic_output

from .settings import DEMO
from .world import (
    OPEN,
    Policy,
    Problems,
    Steps,
    draw_grids,
    draw_tiles,
    make_problems,
    roll_out,
    step_texts,
    true_labels,
)


def raw_rows(problems: Problems, steps: Steps, pictures: list[str]) -> dict[str, list[dict]]:
    """
    Rollouts as rows of VisualPRM400K-v1.1-Raw, by source.

    A row also carries `true_labels` (1 right, 0 wrong, -1 states nothing), which `write_corpus` puts into a side file.
    """
    rows: dict[str, list[dict]] = {}
    for j, i in enumerate(steps.problem):
        texts = step_texts(problems, steps, j)
        question = problems.question(i)
        row = {
            "image": pictures[i],
            "question": f"<image>\n{question}",
            "question_orig": question,
            "answer": str(problems.reference[i]),
            "response": "\n\n".join(texts),
            "steps_with_score": [
                {"step": text, "score": int(k) / steps.num_mc, "num_mc_correct": int(k), "num_mc_total": steps.num_mc}
                for text, k in zip(texts, steps.correct[j], strict=False)
            ],
            "num_mc_sequences": steps.num_mc,
            "true_labels": true_labels(steps, j),
        }
        rows.setdefault(problems.source(i), []).append(row)
    return rows


def write_pictures(problems: Problems, folder: Path) -> list[str]:
    """Write the pictures as PNG to `folder`; return each problem's path relative to the parent of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _, first = np.unique(problems.picture, return_index=True)
    grids = draw_grids(problems.colours[first], problems.digits[first], draw_tiles())
    names = [f"{folder.name}/{number:05d}.png" for number in range(len(first))]
    for name, grid in zip(tqdm(names, desc=f"drawing {folder.name}", delay=2), grids, strict=True):
        Image.fromarray(grid).save(folder.parent / name, compress_level=1)
    return [names[number] for number in problems.picture]


def write_lines(path: Path, rows: list[dict]) -> None:
    with atomic_output(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_corpus(
    folder: Path, n: int, policy: Policy, rng: np.random.Generator, rollouts: int = 4, num_mc: int = 16, **problem
) -> dict:
    """
    Write `n` problems with `rollouts` annotated rollouts each, in the schema of VisualPRM400K-v1.1-Raw.

    Files: `annotations/<source>.jsonl`, `images/*.png`, `true_labels.json` ({"<source>:<line>": [1, 0, -1, ...]}).

    Returns:
        `dict`: statistics of the corpus, including the true labels' figures, which no real corpus has.
    """
    problems = make_problems(n, policy, rng, **problem)
    steps = roll_out(problems, np.repeat(np.arange(n), rollouts), policy, rng, num_mc)
    truth = {}
    for source, rows in raw_rows(problems, steps, write_pictures(problems, folder / "images")).items():
        for line, row in enumerate(rows):
            truth[f"{source}:{line}"] = row.pop("true_labels")
        write_lines(folder / "annotations" / f"{source}.jsonl", rows)
    write_lines(folder / "true_labels.json", [truth])
    return corpus_statistics(steps)


def write_benchmark(folder: Path, n: int, policies: dict[str, Policy], rng: np.random.Generator, **problem) -> dict:
    """
    Write `n` solutions of each policy in the format of VisualProcessBench, with true step labels (1, 0, -1).

    Files: `test.jsonl`, `images/*.png`.
    """
    rows, labels = [], []
    for name, policy in policies.items():
        problems = make_problems(n, policy, rng, **problem)
        steps = roll_out(problems, np.arange(n), policy, rng, num_mc=0)
        for j, picture in enumerate(write_pictures(problems, folder / f"images-{name}")):
            # Our neutral is -1 and wrong is 0; VisualProcessBench has it the other way round.
            labels.append([{1: 1, 0: -1, -1: 0}[label] for label in true_labels(steps, j)])
            rows.append({
                "image": [picture],
                "question": problems.question(j),
                "answer": str(problems.reference[j]),
                "response": {"steps": step_texts(problems, steps, j), "process_correctness": labels[-1]},
                "policy_model": name,
                "data_source": problems.source(j),
            })  # fmt: skip
    write_lines(folder / "test.jsonl", rows)
    flat = np.concatenate(labels)
    return {"solutions": len(rows), "steps": len(flat), "wrong": float((flat == -1).sum() / (flat != 0).sum()),
            "neutral": float((flat == 0).mean())}  # fmt: skip


def corpus_statistics(steps: Steps) -> dict[str, float]:
    """The figures of the paper's Table 1 and, since this world is synthetic, how often labels are wrong."""
    there = steps.kind >= 0
    positive = there & (steps.correct > 0)
    states = there & (steps.kind != OPEN)
    right, wrong = states & steps.right, states & ~steps.right
    share = positive.sum(axis=1) / there.sum(axis=1)
    return {
        "rollouts": len(steps.problem),
        "steps": int(there.sum()),
        "steps_per_rollout": float(there.sum(axis=1).mean()),
        "error_steps": float((there & ~positive).sum() / there.sum()),
        "mixed_rollouts": float(((share > 0) & (share < 1)).mean()),
        "all_negative_rollouts": float((share == 0).mean()),
        "mean_mc": float(steps.correct[there].mean() / steps.num_mc),
        "truly_wrong_steps": float(wrong.sum() / states.sum()),
        "wrong_but_positive": float((wrong & positive).sum() / wrong.sum()),
        "right_but_negative": float((right & ~positive).sum() / right.sum()),
    }


def main() -> None:
    """Write 200 rollouts and 60 solutions of a benchmark, the data of the guides in `recipes/`."""
    parser = argparse.ArgumentParser(
        description="Write 200 rollouts and a benchmark of 60 solutions of the miniature."
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    corpus = write_corpus(
        folder / "rollouts",
        50,
        DEMO.policy,
        np.random.default_rng(0),
        options=DEMO.options,
        wrong_reference=DEMO.wrong_reference,
    )
    benchmark = write_benchmark(
        folder / "benchmark", 20, DEMO.benchmark_policies, np.random.default_rng(1), options=DEMO.options
    )
    print(f"{folder}/rollouts: {corpus['rollouts']} rollouts, {corpus['steps']:,} steps with Monte Carlo scores")
    print(f"{folder}/benchmark: {benchmark['solutions']} solutions, {benchmark['steps']:,} steps with true labels")


if __name__ == "__main__":
    main()
