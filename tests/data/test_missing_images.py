"""Annotations that came without their pictures: read, scored and selected, whoever reads them; refused by a training."""

import json

import datasets
import pytest
from helpers import write_jsonl
from PIL import Image

from trl_mprm import add_bis, load_rollouts, select, top_fraction
from trl_mprm.data.reading import read_rollouts
from trl_mprm.selection.files import select_files
from trl_mprm.training.checks import check_images


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(number, **fields):
    steps = [{"step": "a", "score": 1.0}, {"step": "b", "score": number % 4 / 4}]
    return {"question_orig": f"{number}?", "steps_with_score": steps} | fields


def with_pictures(n=20):
    return [row(number, image=f"x/{number}.png") for number in range(n)]


CORPORA = {
    "with pictures alone": with_pictures(),
    "and one of text": [*with_pictures(), row(20)],
    "and one outside": [*with_pictures(), row(20, image="../1.png")],
}


@pytest.mark.parametrize("name", CORPORA)
def test_both_ways_keep_the_same_rows(tmp_path, name, caplog):
    rows = CORPORA[name]
    file = write_jsonl(tmp_path / "raw" / "a.jsonl", *rows)
    loaded = load_rollouts(file)
    assert "not one image of these rollouts is on this disk" in caplog.text
    n = 20 + ("text" in name)
    assert len(loaded) == n
    assert [row["rollout_id"] for row in load_rollouts(file, streaming=True)] == loaded["rollout_id"][:]
    report = select_files(file, tmp_path / "kept.jsonl", fraction=0.5)
    assert report["images"] == "not checked" and report["total"]["valid"] == n
    assert report["total"]["refused"] == ({"image_outside_root": 1} if "outside" in name else {})
    assert report["total"]["mean_group_size"] == 1.0  # one rollout per question

    scored = loaded.map(add_bis)
    kept = scored.filter(top_fraction(scored, 0.5))
    assert kept["prompt"][:] == [json.loads(line)["question_orig"] for line in open(tmp_path / "kept.jsonl")]
    assert loaded.filter(select(loaded, fraction=0.5))["prompt"][:] == kept["prompt"][:]
    with pytest.raises(ValueError, match=rf"train_dataset, row a:.*: picture 0 is '{tmp_path}/raw/x/.*no such file"):
        check_images(kept, "train_dataset")


@pytest.mark.parametrize("found", [True, False])
def test_one_picture_that_is_there_makes_the_others_missing(tmp_path, found):
    """A broken picture was found, too."""
    file = write_jsonl(tmp_path / "raw" / "a.jsonl", *with_pictures(), row(20))
    (tmp_path / "raw" / "x").mkdir()
    if found:
        Image.new("RGB", (2, 2)).save(tmp_path / "raw" / "x" / "7.png")
    else:
        (tmp_path / "raw" / "x" / "7.png").write_text("no picture")
    assert load_rollouts(file)["prompt"][:] == (["7?", "20?"] if found else ["20?"])
    assert [row["prompt"] for row in load_rollouts(file, streaming=True)] == (["7?", "20?"] if found else ["20?"])
    report = select_files(file, tmp_path / "kept.jsonl", fraction=1.0)
    refused = {"image_missing": 19} | ({} if found else {"image_unreadable": 1})
    assert report["images"] == "checked" and report["total"]["refused"] == refused


def test_who_names_the_folder_of_the_images_wants_them(tmp_path):
    file = write_jsonl(tmp_path / "raw" / "a.jsonl", *with_pictures(), row(20))
    assert load_rollouts(file, tmp_path / "raw")["prompt"][:] == ["20?"]
    report = select_files(file, tmp_path / "kept.jsonl", fraction=1.0, image_root=tmp_path / "raw")
    assert report["total"]["refused"] == {"image_missing": 20}
    (item,) = read_rollouts(write_jsonl(tmp_path / "b.jsonl", row(0, image=["1.png", "/x/2.png"])), keep_missing=True)
    assert [image["path"] for image in item.row["images"]] == [f"{tmp_path}/1.png", "/x/2.png"]


def test_rows_of_text_alone_need_no_pictures(tmp_path, caplog):
    file = write_jsonl(tmp_path / "raw" / "a.jsonl", row(0), row(1))
    assert len(load_rollouts(file)) == 2 and not caplog.text
    assert select_files(file, tmp_path / "kept.jsonl", fraction=1.0)["images"] == "checked"
