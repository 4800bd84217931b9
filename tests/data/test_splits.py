"""A folder is read like the data set of the Hub that it copies; a folder of sources is read whole."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, load_dataset_builder
from helpers import write_jsonl

from trl_mprm import load_rollouts
from trl_mprm.cli import main
from trl_mprm.data.shards import SplitFiles, plan_shards
from trl_mprm.data.splits import SPLIT_WORDS, local_inputs, split_of
from trl_mprm.selection.dataset_card import dataset_card
from trl_mprm.selection.files import select_files


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stepwise(prompt):
    return {"prompt": prompt, "completions": ["First.", "Second."], "labels": [True, False]}


def copy_of(folder, names):
    """Files of one row each, whose question is the name of the file."""
    for name in names:
        if name.endswith(".parquet"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list([stepwise(name)]).to_parquet(folder / name)
        else:
            write_jsonl(folder / name, stepwise(name))
    return folder


LAYOUTS = {
    "files": ["train.jsonl", "test.jsonl"],
    "words": ["my_training.jsonl", "my-val.jsonl", "my.dev2.jsonl", "evaluation 3.jsonl"],
    "shards": [f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "test") for n in range(2)],
    "other_shards": ["data/main-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
    "folders_with_words": ["data/train_set/a.jsonl", "data/test_set/train.jsonl"],
    "sources": ["AI2D.jsonl", "GEOS.jsonl", "contest.jsonl"],
    "sources_below": ["annotations/AI2D.jsonl", "annotations/trained.jsonl"],
}


def files_of(inputs):
    return list(dict.fromkeys(shard.file for shard in plan_shards(inputs)))


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_the_same_files_as_the_datasets_library_takes(tmp_path, names):
    folder = copy_of(tmp_path / "d", names)
    expected = load_dataset_builder(str(folder)).config.data_files
    for split, files in expected.items():
        assert sorted(files_of(local_inputs(folder, str(split)))) == sorted(files)
    with pytest.raises(ValueError, match="d: no split 'other'"):
        local_inputs(folder, "other")


def test_the_words_are_those_of_the_datasets_library():
    assert {split: list(words) for split, words in SPLIT_WORDS.items()} == {
        str(split): words for split, words in datasets.data_files.SPLIT_KEYWORDS.items()
    }
    assert split_of("GeoQA_train.jsonl") == "train" and split_of("training_free.jsonl") == "train"
    assert split_of("contest.jsonl") is None


@pytest.mark.parametrize("names", [LAYOUTS[name] for name in ("files", "shards", "folders")])
def test_a_test_split_is_never_read_for_training(tmp_path, names):
    folder = copy_of(tmp_path / "d", names)
    train, test = (sorted(name for name in names if split in name) for split in ("train", "test"))
    loaded = load_rollouts(folder)
    assert sorted(loaded["prompt"]) == train
    assert sorted(row["prompt"] for row in load_rollouts(folder, streaming=True)) == train
    assert sorted(load_rollouts(folder, split="test")["prompt"]) == test
    report = select_files(folder, tmp_path / "kept.jsonl", fraction=1.0)
    assert report["total"]["read"] == report["total"]["kept"] == len(train)
    assert list(report["sources"]) == sorted(set(loaded["source"]))
    if len(train) > 1:  # one source, as on the Hub, its lines counted through
        assert loaded["rollout_id"][:] == ["d:0", "d:1"]
    assert load_rollouts(folder / test[0])["prompt"][:] == test[:1]  # who names a file means it


def test_select_reads_the_split_that_is_named(tmp_path, capsys):
    folder, kept = copy_of(tmp_path / "d", LAYOUTS["shards"]), tmp_path / "kept.parquet"
    argv = ["select", str(folder), "--output", str(kept), "--fraction", "1"]
    for split in ("test", "train"):
        assert main([*argv, "--split", split, "--compare"]) == 0
        expected = sorted(name for name in LAYOUTS["shards"] if split in name)
        assert sorted(load_rollouts(kept)["prompt"]) == expected
        report = json.loads((tmp_path / "kept.parquet.selection.json").read_text())
        assert report.get("split", "train") == split
        assert ("--split test" in dataset_card("org/kept", report).text) == (split == "test")
    assert main([*argv, "--split", "dev"]) == 2
    assert "d: no split 'dev', found " in capsys.readouterr().err


def test_select_says_that_it_reads_no_folder_of_save_to_disk(tmp_path, capsys):
    rows = Dataset.from_list([stepwise("?")])
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "several")
    rows.save_to_disk(tmp_path / "one")
    for name in ("several", "one"):
        assert main(["select", str(tmp_path / name), "--split", "test", "--output", str(tmp_path / "kept")]) == 2
        assert f"{name}: expected files of rollouts, and it is a folder of save_to_disk" in capsys.readouterr().err


def test_a_folder_of_sources_is_read_whole(tmp_path):
    folder = copy_of(tmp_path / "d", LAYOUTS["sources"])
    assert load_rollouts(folder)["source"][:] == ["AI2D", "GEOS", "contest"]


def test_names_that_are_not_clear_are_listed(tmp_path):
    folder = copy_of(tmp_path / "d", ["train.jsonl", "AI2D.jsonl", "GEOS.jsonl"])
    message = r"not clear what to read.*no split \(AI2D.jsonl, GEOS.jsonl\); train \(train.jsonl\).*Name the files"
    with pytest.raises(ValueError, match=message):
        load_rollouts(folder)
    with pytest.raises(ValueError, match=message):
        select_files(folder, tmp_path / "kept.jsonl", fraction=1.0)
    only_test = copy_of(tmp_path / "e", ["test.jsonl"])
    with pytest.raises(ValueError, match=r"e: no split 'train', found test \(test.jsonl\)$"):
        load_rollouts(only_test)
    with pytest.raises(ValueError, match="train_test.jsonl names the splits train and test: rename it"):
        load_rollouts(copy_of(tmp_path / "f", ["train_test.jsonl"]))


def test_a_saved_dataset_dict(tmp_path):
    rows = {split: Dataset.from_list([stepwise(split)]) for split in ("train", "test")}
    DatasetDict(rows).save_to_disk(tmp_path / "saved")
    assert load_rollouts(tmp_path / "saved")["prompt"][:] == ["train"]
    assert load_rollouts(tmp_path / "saved", split="test")["prompt"][:] == ["test"]
    with pytest.raises(ValueError, match="saved: no split 'dev', found train, test"):
        load_rollouts(tmp_path / "saved", split="dev")


def test_configurations_of_a_card(tmp_path):
    folder = copy_of(tmp_path / "d", ["a/one.jsonl", "a/two.jsonl", "b/one.jsonl"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: a/one.jsonl\n  - split: other\n"
        "    path: a/two.jsonl\n- config_name: b\n  data_files: b/*.jsonl\n---\n"
    )
    assert load_rollouts(folder, name="a")["prompt"][:] == ["a/one.jsonl"]
    assert load_rollouts(folder, name="a", split="other")["prompt"][:] == ["a/two.jsonl"]
    assert load_rollouts(folder, name="b")["prompt"][:] == ["b/one.jsonl"]
    with pytest.raises(ValueError, match="Config name is missing"):
        load_rollouts(folder)


def test_a_split_of_several_files_is_one_source(tmp_path):
    local = local_inputs(copy_of(tmp_path / "d", LAYOUTS["shards"]))
    assert isinstance(local, SplitFiles) and {shard.source for shard in plan_shards(local)} == {"d"}
