"""The bench of the selection runs, and its contestants agree; what it measures is no test."""

import json
import subprocess
import sys
from pathlib import Path


def test_bench_select(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "bench" / "select.py"
    output = tmp_path / "bench.json"
    argv = [sys.executable, script, "--rows", "300", "--repeats", "1", "--json", output]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr  # it stops where the contestants kept different rows
    results = json.loads(output.read_text())
    ratios = ("plain_over_ours", "ours_over_read", "row_map_over_arrow_map", "hf_path_over_ours", "rss_8x_over_1x")
    assert all(results[name] > 0 for name in ratios)
    assert results["kept"] == 30 <= results["kept_by_hf_path"]
    # The peak is that of the selecting process: about what its imports take, by another's count, not what the bench takes
    alone = "import psutil, trl_mprm.selection.files; print(psutil.Process().memory_info().rss)"
    imports = int(subprocess.run([sys.executable, "-c", alone], capture_output=True, check=True).stdout) / 2**20
    assert all(0.9 * imports < peak < 1.3 * imports for peak in results["peak_mb"]["1x"] + results["peak_mb"]["8x"])
    assert "300 rollouts" in run.stdout and "peak memory" in run.stdout


def test_bench_parsers():
    """Those that are installed are compared, and the others named."""
    script = Path(__file__).parents[2] / "recipes" / "bench" / "select.py"
    argv = [sys.executable, script, "--rows", "40", "--parsers", "--repeats", "1"]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    named = {line.replace(":", " ").split()[0] for line in run.stdout.splitlines() if line.strip()}
    assert {"json", "msgspec", "pyarrow", "orjson", "simdjson", "polars", "duckdb"} <= named
