"""The paper's selection in thirty lines of plain Python: `python plain_select.py CORPUS OUTPUT`. It checks nothing."""

import json
import sys
from pathlib import Path


FRACTION, ALPHA = 0.1, 0.2


def bis(scores: list[float]) -> float:
    positive = [score for score in scores if score > 0]
    p_pos = len(positive) / len(scores)
    return (p_pos * (1 - p_pos) + ALPHA) * (sum(positive) / len(positive) if positive else 1.0)


corpus, output = map(Path, sys.argv[1:])
output.mkdir(parents=True, exist_ok=True)
for path in sorted(corpus.glob("*.jsonl")):
    scores, ends = [], [0]
    with open(path, "rb") as lines:
        for line in lines:
            scores.append(bis([step["score"] for step in json.loads(line)["steps_with_score"]]))
            ends.append(ends[-1] + len(line))
    best = sorted(range(len(scores)), key=lambda row: -scores[row])[: max(1, int(len(scores) * FRACTION))]
    with open(path, "rb") as lines, open(output / path.name, "wb") as kept:
        for row in sorted(best):
            lines.seek(ends[row])
            kept.write(lines.read(ends[row + 1] - ends[row]))
