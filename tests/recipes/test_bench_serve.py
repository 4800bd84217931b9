"""The load bench runs, its contestants answer without an error, and it writes what it prints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_bench_serve(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "bench" / "serve.py"
    small = "--clients 2 --requests 2 --n 2 --image-tokens 16 --answer-tokens 18 --memory 4 8".split()
    argv = [sys.executable, script, *small, "--json", tmp_path / "serve.json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "serve.json").read_text())
    assert set(report["results"]) == {"ours, 2 clients", "one by one, 2 clients"}
    assert all(result["errors"] == 0 and result["per_second"] > 0 for result in report["results"].values())
    assert set(report["resident_bytes"]) == {"4", "8"}
