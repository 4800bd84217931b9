"""The benches of the selection run, and their contestants agree; what they measure is no test."""

import json
import subprocess
import sys
from pathlib import Path

from pytest import approx


BENCH = Path(__file__).parents[2] / "recipes" / "bench"


def run(name, *argv):
    done = subprocess.run([sys.executable, BENCH / name, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # it stops where the contestants kept different rows
    return done.stdout


def test_bench_select(tmp_path):
    output = tmp_path / "bench.json"
    shown = run("select.py", "--quick", "--repeats", "1", "--before", BENCH.parents[1], "--json", output)
    results = json.loads(output.read_text())
    for row in results["corpora"].values():
        assert set(row["seconds"]) == {"plain", "parse", "ours", "before"} and 0 <= row["overlap"] <= 1
        assert all(times["cpu"] > 0 and times["wall"] > 0 for times in row["seconds"].values())
    assert set(results["1,000 rows"]) == {"plain", "ours", "before"}
    assert "CPU / plain" in shown and "wall / plain" in shown and "peak memory" in shown
    # The peak is that of the selecting process: about what its imports take, by another's count, not what the bench takes
    alone = "import psutil, trl_mprm.selection.files; print(psutil.Process().memory_info().rss)"
    imports = int(subprocess.run([sys.executable, "-c", alone], capture_output=True, check=True).stdout) / 2**20
    for peaks in results["memory"].values():
        assert peaks["ratio"] == approx(peaks["mb"][1] / peaks["mb"][0])
        assert all(0.9 * imports < peak < 1.5 * imports for peak in peaks["mb"])


def test_bench_select_peers(tmp_path):
    output = tmp_path / "bench.json"
    shown = run("select_peers.py", "--rows", "300", "--repeats", "1", "--json", output)
    results = json.loads(output.read_text())
    assert all(results[name] > 0 for name in ("plain_over_ours", "ours_over_read", "row_map_over_arrow_map"))
    assert results["hf_path_over_ours"] > 0 and results["kept"] == 30 <= results["kept_by_hf_path"]
    assert "300 rollouts" in shown


def test_bench_parsers():
    """Those that are installed are compared, and the others named."""
    shown = run("select_peers.py", "--rows", "40", "--parsers", "--repeats", "1")
    named = {line.replace(":", " ").split()[0] for line in shown.splitlines() if line.strip()}
    assert {"json", "msgspec", "pyarrow", "orjson", "simdjson", "polars", "duckdb"} <= named
