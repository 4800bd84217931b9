"""Odd files and odd pictures: one clear line each, or the same picture whoever opens it."""

import io
import os
import signal
import tempfile
import threading

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List
from helpers import run_processes, write_jsonl
from PIL import Image

from trl_mprm import load_rollouts
from trl_mprm.data.formats import to_row
from trl_mprm.data.images import open_image
from trl_mprm.data.reading import read_rollouts
from trl_mprm.data.rollouts import _write_arrow
from trl_mprm.data.rows import Reason, Refused
from trl_mprm.selection.files import select_files
from trl_mprm.training.checks import check_dataset


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


ROW = {"prompt": "1 + 1?", "completions": ["It is 2."], "labels": [1.0]}


# ---- pictures


def encoded(picture, kind, **save):
    picture.save(file := io.BytesIO(), kind, **save)
    return file.getvalue()


def turned(orientation):
    """A picture of 4 x 2 whose left half is red, and whose EXIF says that it lies on its side."""
    picture = Image.fromarray(np.repeat([[[255, 0, 0]] * 2 + [[0, 0, 255]] * 2], 2, 0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, "png", exif=exif)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_as_the_datasets_library_turns_it(tmp_path, orientation):
    data = turned(orientation)
    (tmp_path / "a.png").write_bytes(data)
    rows = Dataset.from_dict(
        {"images": [[{"path": None, "bytes": data}]]}, features=Features({"images": List(datasets.Image())})
    )
    expected = rows[0]["images"][0].convert("RGB")
    assert expected.size == ((2, 4) if orientation in (6, 8) else (4, 2))
    for image in (tmp_path / "a.png", {"bytes": data, "path": None}, Image.open(io.BytesIO(data)), expected):
        opened = open_image(image)
        assert (opened.size, opened.tobytes()) == (expected.size, expected.tobytes())


def test_what_is_transparent_is_white():
    drawing = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    drawing.putpixel((1, 0), (0, 0, 0, 255))
    drawing.putpixel((2, 0), (0, 0, 0, 128))
    grey = drawing.convert("LA")
    palette = Image.new("P", (3, 1), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    indexed = encoded(palette, "png", transparency=0)
    for image in (drawing, grey, {"bytes": encoded(drawing, "png")}, {"bytes": encoded(grey, "png")}):
        pixels = np.array(open_image(image))[0]
        assert pixels[0].tolist() == [255] * 3 and pixels[1].tolist() == [0] * 3 and pixels[2].tolist() == [127] * 3
    assert np.array(open_image({"bytes": indexed}))[0].tolist() == [[255] * 3, [9] * 3, [255] * 3]


def test_pictures_as_plain_bytes_of_a_parquet_file(tmp_path):
    data = turned(1)
    table = pa.table(
        {name: [value] for name, value in ROW.items()} | {"images": pa.array([[data]], pa.list_(pa.binary()))}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_rollouts(tmp_path / "a.parquet")[0]["images"][0].size == (4, 2)
    assert select_files(tmp_path / "a.parquet", tmp_path / "kept.jsonl", fraction=1.0)["total"]["kept"] == 1


# ---- rows

APS = {"question": "1 + 1?", "process": "It is 2. \n\n\n\n\n", "label": ["+"]}


@pytest.mark.parametrize("record", [APS, {"prompt": "1 + 1?", "step": "It is 2.", "score": 1.0}, {"question": "?"}])
def test_steps_under_another_name_are_an_unknown_format_with_its_keys(tmp_path, record, caplog):
    keys = ", ".join(map(repr, record))
    with pytest.raises(Refused, match=f"found the keys {keys}$") as refused:
        to_row(record)
    assert refused.value.reason is Reason.UNKNOWN_FORMAT
    file = write_jsonl(tmp_path / "a.jsonl", record, ROW)
    assert len(load_rollouts(file)) == 1
    assert f"unknown_format: refused 1 rows (a 1), the first at {file}:1: expected" in caplog.text
    assert f"found the keys {keys}" in caplog.text


@pytest.mark.parametrize("record", [[1], "text", b"bytes", 5])
def test_a_record_that_is_no_object(record):
    with pytest.raises(Refused, match="expected an object with keys, got") as refused:
        to_row(record)
    assert refused.value.reason is Reason.NOT_JSON


@pytest.mark.parametrize("labels", [[1.0, None], [None, None]])
def test_a_null_label_is_named(labels):
    rows = Dataset.from_list([ROW, ROW | {"completions": ["a", "b"], "labels": labels}])
    number = labels.index(None)
    with pytest.raises(ValueError, match=f"train_dataset, row 1: label of step {number} is None, expected a number"):
        check_dataset(rows, "train_dataset")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(tmp_path, encoding):
    text = write_jsonl(tmp_path / "a.jsonl", ROW, ROW, ROW).read_text()
    (tmp_path / "a.jsonl").write_text(text, encoding=encoding)
    message = rf"a.jsonl: expected JSON lines in UTF-8, got {encoding.upper()}.*iconv"
    with pytest.raises(ValueError, match=message):
        load_rollouts(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=message):
        select_files(tmp_path / "a.jsonl", tmp_path / "kept.jsonl", fraction=1.0)
    assert not (tmp_path / "kept.jsonl").exists()


# ---- the cache


def _read_and_die(file, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    rows = read_rollouts(file)

    def killed():
        yield next(rows).row
        os.kill(os.getpid(), signal.SIGKILL)

    _write_arrow(killed())


def test_what_a_killed_run_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    file, folder = write_jsonl(tmp_path / "a.jsonl", ROW), tmp_path / "cache" / "trl_mprm"
    assert run_processes(_read_and_die, file, tmp_path / "cache", log=tmp_path / "log") == [-signal.SIGKILL]
    (left,) = folder.glob("*.part")
    rows = iter([ROW])

    def while_another_reads():
        yield from rows
        assert not left.exists()
        (own,) = folder.glob("*.part")
        assert len(load_rollouts(file)) == 1
        assert own.exists()

    _write_arrow(while_another_reads())
    assert not list(folder.glob("*.part")) and len(list(folder.glob("*.arrow"))) == 2


def test_a_folder_that_is_made_and_not_locked_yet_is_not_taken_for_a_left_one(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "a.jsonl", ROW)
    mkdtemp, made, read = tempfile.mkdtemp, [], []
    other = threading.Thread(target=lambda: read.append(load_rollouts(file)))

    def made_while_another_starts(*args):
        made.append(mkdtemp(*args))
        if len(made) == 1:
            other.start()
            other.join(0.5)
            assert os.path.exists(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", made_while_another_starts)
    read.append(load_rollouts(file))
    other.join()
    assert [len(rows) for rows in read] == [1, 1] and len(made) == 2
    assert not list((tmp_path / "cache" / "trl_mprm").glob("*.part"))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(
        OSError, match="cannot keep the rows in .*cache.*: set HF_HOME to a folder that can be written"
    ):
        load_rollouts(write_jsonl(tmp_path / "a.jsonl", ROW))
