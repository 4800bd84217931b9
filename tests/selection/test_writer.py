"""Kept rows as a dataset on this disk and on the CommitHub."""

import fcntl
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset, load_from_disk
from helpers import PUSH, CommitHub, hub_on_this_machine

from trl_mprm import load_rollouts
from trl_mprm.cli import main
from trl_mprm.selection.dataset_card import dataset_card
from trl_mprm.selection.files import select_files
from trl_mprm.selection.report import find_report


TOKEN = "hf_" + "secret" * 5


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_save_to_disk(corpus, tmp_path, capsys):
    argv = ["select", str(corpus), "--fraction", "0.5", "--save-to-disk", "--report", str(tmp_path / "page.html")]
    argv += ["--output", str(tmp_path / "kept")]
    assert main(argv) == 0
    assert f"evidence: {tmp_path}/kept/selection.json" in capsys.readouterr().out
    assert "6 of 12 rollouts kept" in (tmp_path / "page.html").read_text("utf-8")
    kept = load_from_disk(str(tmp_path / "kept"))
    select_files(corpus, tmp_path / "jsonl", fraction=0.5)
    expected = load_rollouts(tmp_path / "jsonl", image_root=corpus)
    names = [name for name in expected.column_names if name not in ("images", "rollout_id")]
    assert kept.select_columns(names).to_list() == expected.select_columns(names).to_list()
    assert kept["rollout_id"][:] == ["AI2D:0", "AI2D:2", "AI2D:5", "GEOS:0", "GEOS:2", "GEOS:5"]  # BIS .15, .3, .3
    assert [row["images"][0].size for row in kept] == [row["images"][0].size for row in expected]
    assert set(kept["answer"]) == {"5"}
    assert json.loads((tmp_path / "kept" / "selection.json").read_text())["total"]["kept"] == 6
    assert (tmp_path / "kept" / "refused.jsonl").read_text().count("\n") == 1
    assert load_rollouts(tmp_path / "kept").to_list() == kept.to_list()
    # again: the same bytes; and a folder of something else stays as it is
    before = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert main(argv) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".select.*"))
    assert main([*argv[:-1], str(corpus)]) == 2
    assert "is no dataset of an earlier run" in capsys.readouterr().err


def test_what_killed_runs_left_is_removed_and_what_others_use_is_not(corpus, tmp_path):
    host = platform.node()
    left = [f".select.{name}.part" for name in (f"{host}.dead", f"{host}.empty", f"{host}.alive", "elsewhere.dead")]
    for name in left:
        (tmp_path / "out" / name).mkdir(parents=True)
        if "empty" not in name:  # empty: killed while it cleaned up
            (tmp_path / "out" / name / "0.kept").touch()
    handle = os.open(tmp_path / "out" / left[2], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    select_files(corpus, tmp_path / "out" / "kept.jsonl", fraction=0.5)
    os.close(handle)
    assert {path.name for path in (tmp_path / "out").glob(".*")} == set(left[2:])


def test_no_report_of_an_earlier_run_stands_beside_other_rows(corpus, tmp_path, monkeypatch):
    select_files(corpus, tmp_path / "out", fraction=0.5)
    renames, rename = [], Path.rename

    def killed_at_the_second(path, target):
        renames.append(path.name)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        select_files(corpus, tmp_path / "out", fraction=1.0)
    assert len(renames) == 2 and not (tmp_path / "out" / "selection.json").exists()


def test_a_page_that_cannot_be_written_stops_before_the_outputs(corpus, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["select", str(corpus), "--output", str(tmp_path / "out"), "--report", str(tmp_path / "file" / "page.html")]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: ") and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to_disk", [False, True])
def test_half_a_surrogate_pair_in_an_unused_field(tmp_path, caplog, to_disk):
    row = {"prompt": "q", "completions": ["a"], "labels": [1], "answer": "\ud800!", "x": ["\udfff"], "\ud800key": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "out" / ("kept" if to_disk else "kept.parquet")
    select_files(tmp_path / "a.jsonl", output, fraction=1, save_to_disk=to_disk)
    (kept,) = (load_from_disk(str(output)) if to_disk else Dataset(pq.read_table(output))).to_list()
    assert (kept["answer"], kept["x"], kept["\\ud800key"]) == ("\\ud800!", '["\\udfff"]', "1")
    assert any("3 texts hold half of a surrogate pair" in message for message in caplog.messages)


def test_streaming(corpus, caplog):
    whole, stream = load_rollouts(corpus), load_rollouts(corpus, streaming=True)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 2 and stream.features == whole.features
    rows = list(stream)
    assert [row["rollout_id"] for row in rows] == whole["rollout_id"][:]
    assert [row["images"][0].size for row in rows] == [row["images"][0].size for row in whole]
    assert any("not_json: refused 1 rows (GEOS 1)" in message for message in caplog.messages)
    assert len(list(load_rollouts(str(corpus / "*.jsonl"), streaming=True).take(3))) == 3
    assert [r["source"] for r in stream.shard(2, 1)] == ["GEOS"] * 6


def test_push_to_hub(corpus, tmp_path):
    handler = type("OneHub", (CommitHub,), {"commits": [], "lfs": {}})
    argv = [sys.executable, "-c", PUSH, corpus, tmp_path / "kept.jsonl"]
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        done = subprocess.run(argv, env=env | {"HF_TOKEN": TOKEN}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (files,) = handler.commits
    assert set(files) == {"README.md", "selection.json", "data/train-00000-of-00001.parquet"}
    for secret in (TOKEN, str(tmp_path)):
        assert not [name for name, content in files.items() if secret.encode() in content]
    for oid, content in handler.lfs.items():
        assert hashlib.sha256(content).hexdigest() == oid
    # the rows hold their pictures
    kept = Dataset(pq.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"])))
    local = load_rollouts(tmp_path / "kept.jsonl", image_root=corpus)
    assert kept.features["images"] == local.features["images"]
    assert [row["images"][0].size for row in kept] == [row["images"][0].size for row in local]
    assert kept["labels"][:] == local["labels"][:]
    # and can be selected from again, their pictures with them
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "train.parquet").write_bytes(files["data/train-00000-of-00001.parquet"])
    for name in ("again.jsonl", "again.parquet"):
        select_files(tmp_path / "pushed", tmp_path / name, "random", fraction=0.5)
        again = load_rollouts(tmp_path / name)
        assert len(again) == 2 and set(again["rollout_id"]) < set(kept["rollout_id"])
        sizes = {row["rollout_id"]: row["images"][0].size for row in kept}
        assert [row["images"][0].size for row in again] == [sizes[row["rollout_id"]] for row in again]
    card = files["README.md"].decode()
    for words in (
        "path: data/train-*",
        "6 rollouts with Monte Carlo step scores",
        "| rule | `mixed`: rollouts with good and bad steps first, the rest at random |",
        "| GEOS | 7 | 3 | 3 | 1 |",
        "| `not_json` | 1 |",
        "trl-mprm select raw --rule mixed --fraction 0.5 --ties hash --seed 4 --output kept",
    ):
        assert words in card, words
    assert json.loads(files["selection.json"])["inputs"] == ["raw"]


def test_a_name_that_the_hub_does_not_take_is_told_before_anything_is_read(tmp_path, capsys):
    argv = ["select", str(tmp_path / "not there"), "--output", str(tmp_path / "out"), "--push-to-hub"]
    for name in ("a/b/c", "you/kept rollouts", "../kept", ""):
        assert main([*argv, name]) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1 and f"expected the name of a dataset on the Hub, as you/kept, got {name!r}" in error
        )


def test_an_offline_push_keeps_the_rows_and_says_what_to_do(corpus, tmp_path):
    code = "import sys; from trl_mprm.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "select", corpus, "--output", tmp_path / "kept.jsonl", "--fraction", "0.5"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*argv, "--push-to-hub", "you/kept"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: dataset you/kept was not published (OfflineModeIsEnabled: ")
    assert f"The kept rollouts are in {tmp_path / 'kept.jsonl'}" in last and last.endswith(
        "run the same command again"
    )
    assert find_report(tmp_path / "kept.jsonl", 6)[0] is not None


def test_card_of_a_dataset_of_the_hub(corpus, tmp_path):
    report = select_files(corpus, tmp_path / "kept.jsonl", fraction=0.5, alpha=0.2, drop_answer_step=True)
    card = dataset_card("you/kept", report | {"inputs": ["org/rollouts"]})
    assert card.data.source_datasets == ["org/rollouts"]
    assert (
        "| alpha | 0.2 |" in card.text
        and "of [org/rollouts](https://huggingface.co/datasets/org/rollouts)." in card.text
    )
    assert "trl-mprm select org/rollouts --rule bis --fraction 0.5 --alpha 0.2" in card.text
    whole = dataset_card("you/kept", report | {"by": "corpus"})
    assert "--by corpus" in whole.text and "50% of the whole corpus that" in whole.text
    assert "--by" not in card.text and "of the usable rollouts of each source" in card.text
    assert "--drop-answer-step" in card.text and 'load_dataset("you/kept", split="train")' in card.text


def test_a_name_of_a_source_cannot_break_the_tables_of_a_card(tmp_path):
    row = {"prompt": "?", "completions": ["a"], "labels": [1], "source": "a\\|b\r\n\n# c"}
    (tmp_path / "toy.jsonl").write_text(json.dumps(row) + "\n")
    report = select_files(tmp_path / "toy.jsonl", tmp_path / "kept.jsonl", fraction=1.0)
    assert "\n| a&#92;&#124;b # c | 1 | 1 |" in dataset_card("you/kept", report).text
