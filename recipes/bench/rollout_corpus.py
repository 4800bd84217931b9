"""Generate rollouts in the schema of VisualPRM400K-v1.1-Raw from a seed, for the benches of selection."""

import json
import random
from pathlib import Path


SOURCES = {"ChartQA": 0.4, "Geometry3K": 0.3, "IconQA": 0.2, "VQAv2": 0.1}
WORDS = r"""therefore the angle at this vertex equals measure of opposite side which we can read from figure so subtract
both parts and divide by two to obtain value area triangle length base height chart bar shows percent total number blue
objects left right above legend axis maximum minimum answer option "ABC" \( \frac{1}{2} \) \angle = x + 90^\circ""".split()
# The smallest PNG
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010100000000376ef9240000000a49444154789c636800000082008177cd72b60000"
    "000049454e44ae426082"
)
SOLUTIONS = 4096  # different ones; each row has a question of its own, or shares it with the rows beside it


def write_corpus(
    folder: Path, rows: int, kilobytes: float = 3.5, per_question: int = 4, pictures: bool = True, seed: int = 0
) -> None:
    """
    Four files of raw annotations, about `kilobytes` per row: 5.6 steps, scores k/16, 92% of the rollouts not mixed.

    `per_question` rows beside each other share a question and its picture, which is on the disk or not.
    """
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(14, 42))) + "." for _ in range(4096)]
    sentences[::50] = [f"{sentence} ∠ABC ≤ 90°, naïve “三角形”" for sentence in sentences[::50]]
    instruction = "<image>\n" + " ".join(sentences[1:3])
    solutions = [_solution(rng, sentences, round(kilobytes / 2.6)) for _ in range(SOLUTIONS)]
    folder.mkdir(parents=True, exist_ok=True)
    for source, share in SOURCES.items():
        (folder / source).mkdir()
        with open(folder / f"{source}.jsonl", "w", encoding="utf-8") as file:
            for row in range(max(4, int(rows * share))):
                number = row // per_question
                question = f"Question {number} of {source}: {sentences[number % 4096]}"
                if pictures and row % per_question == 0:
                    (folder / source / f"{number}.png").write_bytes(PNG)
                record = {
                    "image": f"{source if pictures else 'elsewhere'}/{number}.png",
                    "question": f"{instruction}\n{question}",
                    "question_orig": question,
                    "answer": str(row % 97),
                }
                head = json.dumps(record, ensure_ascii=False)[:-1]
                file.write(f'{head}, {rng.choice(solutions)}, "num_mc_sequences": 16}}\n')


def _solution(rng: random.Random, sentences: list[str], n_sentences: int) -> str:
    counts = random_counts(rng, min(16, max(2, round(rng.gauss(5.6, 2.2)))))
    steps = [
        f"Step {number + 1}: {' '.join(rng.choices(sentences, k=max(1, n_sentences)))}"
        for number in range(len(counts))
    ]
    record = {
        "response": "\n\n".join(steps),
        "steps_with_score": [
            {"step": step, "score": count / 16, "num_mc_correct": count, "num_mc_total": 16}
            for step, count in zip(steps, counts, strict=True)
        ],
    }
    return json.dumps(record, ensure_ascii=False)[1:-1]


def random_counts(rng: random.Random, n_steps: int) -> list[int]:
    """Correct continuations, of 16, for each step: 8% of the rollouts mixed, 1% all wrong, half of the rest perfect."""
    kind, lowest = rng.random(), rng.choice((1, 6, 10, 14, 16, 16, 16, 16))
    if kind < 0.01:
        return [0] * n_steps
    n_good = rng.randint(1, n_steps - 1) if kind < 0.09 else n_steps
    return [rng.randint(lowest, 16) for _ in range(n_good)] + [0] * (n_steps - n_good)
