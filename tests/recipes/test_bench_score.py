"""The bench of scoring runs, and its two contestants agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_bench_score(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "bench" / "score.py"
    command = [sys.executable, script, "--size", "tiny", "--n", "1", "4", "--image-tokens", "64"]
    command += ["--answer-tokens", "40", "--repeats", "1", "--json", tmp_path / "score.json"]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    report = json.loads((tmp_path / "score.json").read_text())
    assert list(report["n"]) == ["1", "4"]
    for result in report["n"].values():
        assert result["time_plain_over_shared"] > 0
        assert result["max_abs_score_difference"] < 1e-5
    assert report["n"]["4"]["flops_over_ideal"] <= 1.05
