"""A report tells of its rows alone: it is named after them, and bound to them by their content."""

import json
import os
import resource
import stat

import datasets
import pytest
from datasets import Dataset, load_from_disk

from trl_mprm import load_rollouts
from trl_mprm.cli import main
from trl_mprm.selection import select_files
from trl_mprm.selection.report import find_report


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path):
    """Two raw files of eight rows, one row of each refused."""
    (tmp_path / "raw").mkdir()
    for name in ("tiles", "bars"):
        rows = [{"prompt": f"{name} {i}", "completions": ["a", "b"], "labels": [1.0, i % 2]} for i in range(8)]
        (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return tmp_path / "raw"


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_outputs_in_one_folder_keep_their_evidence(raw, tmp_path):
    out = tmp_path / "d"
    one = select_files(raw / "tiles.jsonl", out / "a.jsonl", fraction=0.5)
    two = select_files(raw / "bars.jsonl", out / "b.jsonl", fraction=0.25)
    three = select_files(raw, out / "a.parquet", fraction=0.25)
    names = ["a", "a.parquet", "b"]
    evidence = [f"{name}.{kind}" for name in names for kind in ("refused.jsonl", "selection.json")]
    assert sorted(files(out)) == sorted(["a.jsonl", "a.parquet", "b.jsonl", *evidence])
    assert find_report(out / "a.jsonl", 4) == (one, "") and find_report(out / "b.jsonl", 2) == (two, "")
    assert find_report(out / "a.parquet", 4) == (three, "") and list(three["sources"]) == ["bars", "tiles"]
    report, why = find_report(out, 10)  # a folder of three selections is none of them
    assert report is None and why == f"{out}: no report of a selection beside these rows"
    # and what was refused is read by nobody as rows
    assert len(load_rollouts([out / "a.jsonl", out / "b.jsonl"])) == 6


def test_a_merged_file_keeps_its_sources_whatever_is_put_beside_it(raw, tmp_path):
    merged = tmp_path / "d" / "all.jsonl"
    select_files(raw, merged, fraction=1.0)
    select_files(raw / "bars.jsonl", tmp_path / "d" / "b.jsonl", fraction=0.5)
    assert set(load_rollouts(merged)["source"]) == {"tiles", "bars"}
    again = select_files(merged, tmp_path / "again.jsonl", fraction=0.5)
    assert {name: facts["kept"] for name, facts in again["sources"].items()} == {"bars": 4, "tiles": 4}


def test_a_report_applies_to_exactly_its_rows(raw, tmp_path):
    kept = tmp_path / "kept"
    report = select_files(raw, kept, fraction=0.5)
    assert find_report(kept, 8) == (report, "") and find_report(str(kept), 8)[0] == report
    for rows, n, why in (
        (kept, 7, "it counts 8 rows, and 7 were read"),
        (kept / "tiles.jsonl", 4, "it also lists bars.jsonl"),
        (raw, 16, "no report of a selection beside these rows"),
        (tmp_path / "none", 1, "no report of a selection beside these rows"),
    ):
        found = find_report(rows, n)
        assert found[0] is None and found[1].endswith(why), found
    (kept / "more.jsonl").write_text("{}\n")
    assert find_report(kept, 8)[1].endswith("selection.json: it does not list more.jsonl")
    (kept / "more.jsonl").unlink()
    lines = (kept / "tiles.jsonl").read_text().replace("tiles 2", "tiles 9")  # as many rows, other ones
    (kept / "tiles.jsonl").write_text(lines)
    assert find_report(kept, 8)[1].endswith("tiles.jsonl changed after the selection")
    old = json.loads((kept / "selection.json").read_text()) | {"version": "2", "output": {}}
    (kept / "selection.json").write_text(json.dumps(old))
    assert find_report(kept, 8)[1].endswith("of an older version, without hashes")
    assert len(load_rollouts(kept)) == 8


def test_a_dataset_on_this_disk_has_its_report_inside(raw, tmp_path):
    report = select_files(raw, tmp_path / "kept", fraction=0.5, save_to_disk=True)
    assert find_report(tmp_path / "kept", len(load_rollouts(tmp_path / "kept"))) == (report, "")


@pytest.mark.parametrize("change", ["their dataset", "a file beside", "a folder beside", "other rows", "other report"])
def test_save_to_disk_replaces_only_what_it_wrote(raw, tmp_path, capsys, change):
    out = tmp_path / "kept"
    if change == "their dataset":
        Dataset.from_dict({"mine": [1]}).save_to_disk(out)
    else:
        select_files(raw, out, fraction=0.5, save_to_disk=True)
        if change == "a file beside":
            (out / "notes.txt").write_text("weeks of work")
        elif change == "a folder beside":
            (out / "notes").mkdir()
        elif change == "other rows":
            arrow = next(out.glob("*.arrow"))
            mine = load_from_disk(str(out)).select([0])
            mine.save_to_disk(tmp_path / "mine")
            arrow.write_bytes(next((tmp_path / "mine").glob("*.arrow")).read_bytes())
        else:
            (out / "selection.json").write_text("{}")
    before = files(tmp_path)
    capsys.readouterr()
    assert main(["select", str(raw), "--fraction", "0.25", "--save-to-disk", "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error and files(tmp_path) == before


def hostile(report: dict) -> list:
    output = report["output"]["all.jsonl"]
    sources = {"all.jsonl": output | {"sources": [["tiles", 10**10]]}}
    return [
        report | {"output": sources},
        report | {"output": {"all.jsonl": output | {"sources": [["tiles", 10**10], ["bars", 16 - 10**10]]}}},
        report | {"output": {"all.jsonl": output | {"sources": [[None, 16]]}}},
        report | {"output": {"all.jsonl": output | {"sources": 7}}},
        report | {"output": {"all.jsonl": None}},
        report | {"output": None},
        report | {"sources": None},
        report | {"total": {}},
        {},
        [],
        None,
        "selection",
    ]


@pytest.mark.parametrize("number", range(14))
def test_a_hostile_report_is_one_line(raw, tmp_path, number, capsys):
    merged = tmp_path / "all.jsonl"
    report = select_files(raw, merged, fraction=1.0)
    texts = [*map(json.dumps, hostile(report)), "[" * 100_000, "\x00\xff"]
    (tmp_path / "all.selection.json").write_text(texts[number])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))  # a count of 10**10 would take 80 GB
    try:
        assert main(["select", str(merged), "--output", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    assert "all.selection.json" in error and "delete" in error and "select again" in error
    assert not (tmp_path / "out").exists()


def test_outputs_have_the_rights_that_the_user_gives_to_files(raw, tmp_path):
    before = os.umask(0o077)
    try:
        select_files(raw, tmp_path / "out", fraction=0.5, page=tmp_path / "page.html")
        select_files(raw, tmp_path / "saved", fraction=0.5, save_to_disk=True)
    finally:
        os.umask(before)
    for path in (*(tmp_path / "out").iterdir(), *(tmp_path / "saved").iterdir(), tmp_path / "page.html"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_training_tells_of_the_selection_of_its_own_rows(raw, tmp_path, tiny_folders, capsys):
    """Two outputs in one folder: the card of a model trained on the first one tells of the first."""
    out = tmp_path / "d"
    select_files(raw / "tiles.jsonl", out / "a.jsonl", fraction=0.5)
    select_files(raw / "bars.jsonl", out / "b.jsonl", fraction=0.5)
    argv = ["train", "--model_name_or_path", tiny_folders["qwen2"], "--max_steps", "1", "--use_cpu", "--report_to"]
    argv += ["none", "--dtype", "float32", "--dataset_name", str(out / "a.jsonl"), "--output_dir"]
    assert main([*argv, str(tmp_path / "one")]) == 0
    selection = json.loads((tmp_path / "one" / "model_card.json").read_text())["selection"]
    assert list(selection["sources"]) == ["tiles"] and selection["alpha"] == 0.2
    text = (out / "a.jsonl").read_text()
    (out / "a.jsonl").write_text(text.replace('"labels": [1.0, 0]', '"labels": [0.5, 0]', 1))
    assert main([*argv, str(tmp_path / "two")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a.jsonl changed after a.selection.json was written, which has the sources of its lines" in error
