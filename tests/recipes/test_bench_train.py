"""The bench of training runs, its contestants have the same loss, and what it counts is what the shapes say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_bench_train(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "bench" / "train.py"
    command = [sys.executable, script, "--size", "tiny", "--rows", "2", "--g", "2", "--image-tokens", "16"]
    command += ["--answer-tokens", "60", "--repeats", "1", "--json", tmp_path / "train.json"]
    run = subprocess.run(command, timeout=300, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "| shared, G = 2 |" in run.stdout
    report = json.loads((tmp_path / "train.json").read_text())
    assert report["memory_plain_over_ours"] > 0 and report["time_plain_over_ours"] > 0
    assert report["time_plain_over_shared"]["2"] > 0

    results = report["contestants"]
    assert list(results) == ["plain", "ours", "shared, G = 2", "qlora"]
    quantized = results.pop("qlora")
    assert 0 < quantized["loss_difference"] < 0.5 and quantized["weights_gb"] < results["ours"]["weights_gb"]
    for result in results.values():
        assert result["loss_difference"] < 1e-5
    # The LM head, forwards and backwards to its input, at all tokens but the nine markers of each row.
    prefix, answer = report["prefix_tokens"], report["answer_tokens"]
    head = 2 * 2 * 2 * (prefix + answer - 9) * 256 * 152064 / 1e12
    assert results["plain"]["tflops"] - results["ours"]["tflops"] == pytest.approx(head, rel=1e-6)
    # What plain has more at its peak is the logits of all tokens, in float32; memory is counted, not sampled.
    assert report["memory_drop_over_logits"] == pytest.approx(1, abs=0.1)
    assert report["memory_plain_over_ours"] > report["memory_with_weights_plain_over_ours"] > 1
    ideal = report["ideal_ours_over_shared"]["2"]
    assert ideal == 2 * (prefix + answer) / (prefix + 2 * answer)
    # Both run the LM head at the markers alone; the rest is what the ideal counts.
    markers = 2 * 2 * 2 * 9 * 256 * 152064 / 1e12
    ours, shared = (results[name]["tflops"] - markers for name in ("ours", "shared, G = 2"))
    assert ours / shared >= ideal / 1.05
