"""Selection on a real local Ray cluster of two workers: the bytes of one process, also when a worker is killed."""

import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from trl_mprm.cli import main
from trl_mprm.data.shards import plan_shards
from trl_mprm.selection.comparison import compare_rules
from trl_mprm.selection.files import select_files
from trl_mprm.selection.summary import KIND, Summary, merge


ray = pytest.importorskip("ray", reason='needs pip install "trl-mprm[ray]"')
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """12 MB in three files, most rollouts tied, some rows refused."""
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for source, copies in (("AI2D", 20), ("GEOS", 12), ("UniGeo", 8)):
        lines = []
        for number in range(150):
            counts = [rng.choice((16, 16, 16, 9, 0)) for _ in range(rng.randint(2, 6))]
            steps = [{"step": "so " * 100, "score": count / 16, "num_mc_total": 16} for count in counts]
            lines.append(json.dumps({"question": f"{number // 4}?", "steps_with_score": steps}))
        lines += ["no json", "{}"]
        (folder / f"{source}.jsonl").write_text(("\n".join(lines) + "\n") * copies)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("trl_mprm.selection.files.plan_shards", lambda inputs: plan_shards(inputs, 2**19))


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("rule, ties", [("bis", "first"), ("bis", "hash"), ("random", "hash")])
def test_ray_writes_what_one_process_writes(cluster, corpus, tmp_path, capsys, rule, ties):
    for engine in ("local", "ray"):
        argv = ["--rule", rule, "--ties", ties, "--fraction", "0.1", "--engine", engine, "--seed", "7"]
        argv += ["--output", str(tmp_path / engine), "--report", str(tmp_path / f"{engine}.html")]
        assert main(["select", str(corpus), *argv]) == 0
    assert set(files(tmp_path / "ray")) == {
        "AI2D.jsonl",
        "GEOS.jsonl",
        "UniGeo.jsonl",
        "selection.json",
        "refused.jsonl",
    }
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert (tmp_path / "ray.html").read_bytes() == (tmp_path / "local.html").read_bytes()


def test_relative_names_and_the_comparison(cluster, corpus, tmp_path, monkeypatch):
    """Workers were started elsewhere; the table of all rules is that of one process."""
    monkeypatch.chdir(corpus.parent)
    select_files(corpus.name, tmp_path / "local", fraction=0.1)
    monkeypatch.chdir(tmp_path)
    inputs = os.path.relpath(corpus)
    select_files(inputs, "ray", fraction=0.1, engine="ray")
    assert (tmp_path / "ray" / "GEOS.jsonl").read_bytes() == (tmp_path / "local" / "GEOS.jsonl").read_bytes()
    refused = json.loads((tmp_path / "ray" / "refused.jsonl").read_text().splitlines()[0])
    assert refused["file"] == os.path.join(inputs, "AI2D.jsonl")
    tables = [compare_rules(inputs, fraction=0.1, engine=engine) for engine in ("local", "ray")]
    assert tables[0] == tables[1]


def kill_a_worker(task: str, killed: list[int], stop: threading.Event) -> None:
    """SIGKILL the first process that is at a task of that name. Ray names a worker process after the task it is at."""
    while not stop.is_set() and not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == [f"ray::{task}"]:
                    process.send_signal(signal.SIGKILL)
                    killed.append(process.pid)
                    break
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.001)


@pytest.mark.parametrize("task", ["_score", "_call"])
def test_a_killed_worker_changes_nothing(cluster, corpus, tmp_path, task):
    select_files(corpus, tmp_path / "local", fraction=0.1, ties="hash")
    killed, stop = [], threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(task, killed, stop))
    killer.start()
    try:
        select_files(corpus, tmp_path / "ray", fraction=0.1, ties="hash", engine="ray")
    finally:
        stop.set()
        killer.join()
    assert killed and not psutil.pid_exists(killed[0])
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_a_worker_hands_over_less_than_a_megabyte(cluster, corpus):
    from trl_mprm.selection.engine_ray import RayRun

    shards = plan_shards(corpus, 2**19)
    assert len(shards) > 10
    with RayRun(shards) as run:
        summary = merge(run.summaries())
    assert summary.count.sum() == 40 * 152
    assert len(run.message_bytes) == 2 and max(run.message_bytes) < 2**20
    assert ray.is_initialized()  # a cluster that was there before stays


def test_a_large_summary_is_less_than_a_megabyte():
    """As many kinds and groups as a corpus of a million rollouts has: 38 sources, up to 16 steps, scores of k / 16."""
    from trl_mprm.selection.engine_ray import pack, unpack

    rng, n = np.random.default_rng(0), 1_000_000
    n_steps = np.clip(rng.normal(5.6, 2.2, n).round(), 1, 16).astype(int)
    n_pos = np.where(rng.random(n) < 0.08, rng.integers(0, n_steps + 1), n_steps)
    correct = (n_pos * np.clip(16 * rng.beta(3, 0.5, n), 1, 16)).round().astype(int)  # of 16 continuations a step
    shape = (38, 17, 17, 257)
    keys = np.ravel_multi_index((rng.integers(0, 38, n), n_steps, n_pos, correct), shape)
    keys, count = np.unique(keys, return_counts=True)
    source, n_steps, n_pos, correct = np.unravel_index(keys, shape)
    kinds = np.zeros(len(keys), KIND)
    kinds["source"], kinds["reason"], kinds["unread"] = source, -1, -1
    kinds["n_steps"], kinds["n_pos"], kinds["mc_sum"] = n_steps, n_pos, correct / 16
    groups = {("00", True): np.unique(rng.integers(0, 2**64, n // 4, dtype=np.uint64))}
    summary = merge([Summary(tuple(f"{i:02}" for i in range(38)), kinds, count.astype(np.uint64), None, groups)])
    assert len(summary.kinds) > 30_000 and summary.halved > 0
    message = pack(summary)
    assert len(message) < 2**20
    assert (unpack(message).kinds == summary.kinds).all()


def test_an_error_on_a_worker_is_the_error_of_one_process(cluster, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.jsonl.gz").write_bytes(b"\x1f\x8b no archive")
    told = []
    for engine in ("local", "ray"):
        assert main(["select", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--engine", engine]) == 2
        told.append(capsys.readouterr().err.splitlines()[-1])
    assert told[0] == told[1] and "broken.jsonl.gz" in told[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_cluster_that_does_not_start_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(**_):
        raise Exception("The current node timed out during startup.\nSee the logs.")  # as Ray raises it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert main(["select", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--engine", "ray"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Ray did not start (The current node timed out") and error.count("\n") == 1


def test_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "trl_mprm.selection.engine_ray")
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert main(["select", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert 'pip install "trl-mprm[ray]"' in capsys.readouterr().err
