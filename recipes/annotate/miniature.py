"""
From questions to a trained process reward model, on the miniature: solve, annotate where it matters, train, evaluate.

    python recipes/annotate/miniature.py --output runs/annotate

The policy is the scripted one of `trl_mprm/demo/world.py`, as a function of the kind that `annotate` takes. Two models
are trained: on the tenth that `--budget bis` returns, and on a random tenth of as many rollouts, annotated with all
draws. Writes both models with their cards, and `results.json`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch

from trl_mprm import ProcessRewardConfig, ProcessRewardModel, ProcessRewardTrainer, evaluate_model, read_benchmark
from trl_mprm.annotation import annotate
from trl_mprm.demo.base import BASE_MODEL
from trl_mprm.demo.corpus import write_benchmark, write_pictures
from trl_mprm.demo.settings import DEMO
from trl_mprm.demo.world import NAMES, Problems, make_problems
from trl_mprm.files import write_json


class WorldPolicy:
    """The scripted policy, one draw at a time: `policy(images, prompt, steps, n, seed)`."""

    __name__ = "the miniature's scripted policy"

    def __init__(self, problems: Problems, pictures: list[str]):
        self.problems = problems
        self.places = {(pictures[i], problems.question(i)): i for i in range(len(problems))}

    def __call__(self, images: list[str], prompt: str, steps: list[str], n: int, seed: int) -> list[str]:
        problem = self.places[images[0], prompt]
        return ["\n\n".join(self._continue(problem, steps, random.Random(seed + i))) for i in range(n)]

    def _continue(self, i: int, steps: list[str], dice: random.Random) -> list[str]:
        problems, written = self.problems, []
        length, sign, path = int(problems.length[i]), int(problems.sign[i]), problems.path[i]
        truth, shown = problems.truth[i].tolist(), [int(problems.digits[i, place]) for place in path[:length]]
        names, word = [NAMES[problems.colours[i, place]] for place in path[:length]], ["left", "total"][sign > 0]
        done, value, slipped = 0, truth[0], 0
        for step in steps:
            *_, last = step.split()
            if step.startswith("answer"):
                return []
            if not step.startswith(("wait", "from")):
                if int(last) != (value + sign * shown[done]) % 10:
                    slipped = done
                done += 1
            value = int(last)
        if not steps:
            written.append(f"from {value}")
        while True:
            if value != truth[done] and dice.random() < problems.notice_rate[i]:
                value = truth[done]
                written.append(f"wait {names[slipped]} is {shown[slipped]} {word} {value}")
            elif done == length:
                offered = np.flatnonzero(problems.offered[i]).tolist()
                lost = problems.options[i] and value not in offered
                return [*written, f"answer {dice.choice(offered) if lost else value}"]
            else:
                digit, miscount = shown[done], 0
                if dice.random() < (problems.hard_rate[i] if done == problems.hard[i] else DEMO.policy.slip):
                    slipped = done
                    if dice.random() < DEMO.policy.misread:
                        digit = (digit - 1 + dice.randrange(1, 9)) % 9 + 1
                    else:
                        miscount = dice.randrange(1, 10)
                value = (value + sign * digit + miscount) % 10
                written.append(f"{names[done]} is {digit} {word} {value}")
                done += 1


def last_word(text: str, answer: str) -> bool:
    """The checker: the solution ends with the answer."""
    return text.split()[-2:] == ["answer", answer]


def train(rows, folder: Path, seed: int) -> ProcessRewardModel:
    torch.manual_seed(seed)
    args = ProcessRewardConfig(
        output_dir=str(folder),
        learning_rate=DEMO.full_learning_rate,
        per_device_train_batch_size=DEMO.batch_size,
        num_train_epochs=1,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        bf16=False,
    )
    trainer = ProcessRewardTrainer(model=str(BASE_MODEL), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return ProcessRewardModel.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/annotate"))
    parser.add_argument("--problems", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=31)
    args = parser.parse_args()
    started, folder, seed = time.time(), args.output, args.seed
    noise = {"options": DEMO.options, "wrong_reference": DEMO.wrong_reference}
    problems = make_problems(args.problems, DEMO.policy, np.random.default_rng([seed, 0]), **noise)
    pictures = [str(folder / name) for name in write_pictures(problems, folder / "images")]
    write_benchmark(
        folder / "benchmark", 150, DEMO.benchmark_policies, np.random.default_rng([seed, 2]), options=DEMO.options
    )
    questions = [
        {"images": [pictures[i]], "prompt": problems.question(i), "answer": str(problems.reference[i])}
        | {"source": problems.source(i), "rollout_id": f"q{i}"}
        for i in range(len(problems))
    ]
    options = {"checker": last_word, "n": 16, "solutions": 4, "seed": seed}
    policy = WorldPolicy(problems, pictures)
    kept = annotate(questions, policy, output=folder / "bis10.jsonl", budget="bis", fraction=0.1, **options)
    report = json.loads((folder / "bis10.annotation.json").read_text())
    planned, drawn = (
        sum(source[name] for source in report["sources"].values()) for name in ("draws_with_all", "draws")
    )
    rollouts = sum(source["rollouts"] for source in report["sources"].values())
    print(f"\n{rollouts} rollouts, {len(kept)} kept; {drawn:,} draws instead of {planned:,} ({drawn / planned:.1%})")
    # as many rollouts at random: single solutions of some questions
    rng = np.random.default_rng([seed, 3])
    some = [questions[i] for i in sorted(rng.permutation(len(questions))[: len(kept)])]
    others = annotate(some, policy, output=folder / "random10.jsonl", **options | {"solutions": 1})
    results = {
        "command": f"python recipes/annotate/miniature.py --problems {args.problems} --seed {seed}",
        "questions": len(questions),
        "rollouts": rollouts,
        "kept": len(kept),
        "draws_with_all": planned,
        "draws": drawn,
        "models": {},
    }
    benchmark = read_benchmark(folder / "benchmark")
    for name, rows in (("bis10", kept), ("random10", others)):
        prm = train(rows, folder / name, seed)
        metrics = evaluate_model(prm, benchmark, batch_size=64)
        results["models"][name] = {"rollouts": len(rows), "auc": metrics["auc"]} | {
            metric: metrics[metric] for metric in ("macro_f1_step_weighted", "macro_f1_pooled")
        }
        print(name, results["models"][name])
    results["seconds"] = round(time.time() - started)
    write_json(results, folder / "results.json")
    print(f"models and cards: {folder}/bis10, {folder}/random10\nfigures: {folder}/results.json")


if __name__ == "__main__":
    main()
