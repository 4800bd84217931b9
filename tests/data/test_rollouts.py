import io
import json
import logging
import pickle
import subprocess
import sys
import zipfile
import zlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ReadHub, hub_on_this_machine
from PIL import Image as PILImage

from trl_mprm.data import images
from trl_mprm.data.formats import parse
from trl_mprm.data.images import MAX_PIXELS
from trl_mprm.data.reading import Refusal, Rollout, describe_refusals, read_rollouts
from trl_mprm.data.rollouts import FEATURES, load_rollouts
from trl_mprm.data.rows import Reason


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def raw(**fields):
    steps = [
        {"step": "First.", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16},
        {"step": "Second.", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
    ]
    return {"question": "<image>\nHow many?", "steps_with_score": steps, "num_mc_sequences": 16} | fields


def stepwise(**fields):
    return {"prompt": "How many?", "completions": ["First.", "Second."], "labels": [True, False]} | fields


def step(**fields):
    return raw(steps_with_score=[raw()["steps_with_score"][0], raw()["steps_with_score"][1] | fields])


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def picture(path, size=(4, 4), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.effect_noise(size, 50).save(path, **save)
    return path


def only(path, **arguments):
    (item,) = read_rollouts(path, **arguments)
    return item


def test_raw_row(tmp_path):
    picture(tmp_path / "1.png")
    file = write(tmp_path / "AI2D.jsonl", raw(image="1.png", question_orig="How <image> many?", answer="52"))
    data = load_rollouts(file)
    assert data.features == FEATURES
    row = data[0]
    assert row.pop("images")[0].size == (4, 4)
    assert row == {
        "prompt": "How  many?",
        "completions": ["First.", "Second."],
        "labels": [0.5, 0.0],
        "mc_scores": [0.5, 0.0],
        "mc_counts": [8, 0],
        "mc_total": 16,
        "source": "AI2D",
        "rollout_id": "AI2D:0",
    }


@pytest.mark.parametrize("prompt", ["How many?", [{"role": "user", "content": "<image>How many?"}]])
def test_stepwise_row(tmp_path, prompt):
    row = load_rollouts(write(tmp_path / "old.jsonl", stepwise(prompt=prompt, source="GSM8K")))[0]
    assert row == {
        "images": [],
        "prompt": "How many?",
        "completions": ["First.", "Second."],
        "labels": [1.0, 0.0],
        "mc_scores": [1.0, 0.0],
        "mc_counts": [None, None],
        "mc_total": None,
        "source": "GSM8K",
        "rollout_id": "old:0",
    }


def test_stepwise_scores_counts_and_unlabelled_steps(tmp_path):
    rows = [
        stepwise(labels=[0.25, -100]),
        stepwise(labels=[1, 0], mc_scores=[0.25, None], mc_counts=[4, 0], mc_total=16),
        without(stepwise(mc_scores=[0.25, None]), "labels"),
    ]
    data = load_rollouts(write(tmp_path / "a.jsonl", *rows))
    assert data["labels"][:] == [[0.25, -100.0], [1.0, 0.0], [0.25, -100.0]]
    assert data["mc_scores"][:] == [[0.25, None]] * 3
    assert data["mc_counts"][:] == [[None, None], [4, 0], [None, None]]
    assert data["mc_total"][:] == [None, 16, None]


def test_a_step_with_total_0_is_not_measured(tmp_path):
    # the early stop of the annotation writes score 0.0 for steps that it never sampled
    row = load_rollouts(write(tmp_path / "a.jsonl", step(num_mc_total=0)))[0]
    assert row["mc_scores"] == [0.5, None]
    assert row["labels"] == [0.5, -100.0]
    assert row["mc_total"] == 16


def test_totals_that_differ_are_unknown(tmp_path):
    assert load_rollouts(write(tmp_path / "a.jsonl", step(num_mc_total=8)))[0]["mc_total"] is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "not_json"),
        ("[1]", "not_json"),
        ("[" * 100_000, "not_json"),
        ({"text": "no rollout"}, "unknown_format"),
        (raw(question="<image>"), "prompt_missing"),
        (without(raw(), "question"), "prompt_missing"),
        (stepwise(prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]), "prompt_missing"),
        (without(raw(), "steps_with_score"), "unknown_format"),
        (raw(steps_with_score=[]), "empty_steps"),
        (raw(steps_with_score="First."), "empty_steps"),
        (stepwise(completions=[]), "empty_steps"),
        (step(step=" "), "step_without_text"),
        (step(step=None), "step_without_text"),
        (raw(steps_with_score=["First."]), "step_without_text"),
        (stepwise(completions=["First.", 2]), "step_without_text"),
        (step(step="\ud800"), "text_not_unicode"),
        (raw(rollout_id="\ud800"), "text_not_unicode"),
        (raw(source="\ud800"), "text_not_unicode"),
        (stepwise(labels=[True]), "labels_not_one_a_step"),
        (stepwise(labels=1.0), "labels_not_one_a_step"),
        (stepwise(mc_scores=[0.5]), "labels_not_one_a_step"),
        (stepwise(mc_counts=[1]), "labels_not_one_a_step"),
        (step(score=None), "step_without_score"),
        (without(stepwise(), "labels"), "step_without_score"),
        (stepwise(labels=[True, None]), "step_without_score"),
        (step(score="0.5"), "score_not_a_number"),
        (step(score=True), "score_not_a_number"),
        (step(score=float("nan")), "score_not_a_number"),
        (stepwise(labels=["+", "-"]), "score_not_a_number"),
        (step(score=1.0625), "score_out_of_range"),
        (step(score=-1), "score_out_of_range"),
        (step(score=float("inf")), "score_out_of_range"),
        (stepwise(labels=[1, -1]), "score_out_of_range"),
        (raw(steps_with_score=[{"step": "First.", "score": 0.0, "num_mc_total": 0}]), "nothing_measured"),
        (stepwise(labels=[-100, -100]), "nothing_measured"),
        (raw(image=7), "image_not_a_path"),
        (raw(image=["ok.png", None]), "image_not_a_path"),
        (raw(image="\ud800.png"), "image_not_a_path"),
        (raw(image="nowhere.png"), "image_missing"),
        (raw(image=["ok.png", "x" * 5000]), "image_missing"),
        (raw(image="a\0b"), "image_missing"),
        (raw(image="../outside.png"), "image_outside_root"),
        (raw(image="/etc/hostname"), "image_outside_root"),
        (raw(image="link.png"), "image_outside_root"),
        (raw(image="no_picture.png"), "image_unreadable"),
        (raw(image="cut.png"), "image_unreadable"),
        (raw(image="cut.jpg"), "image_unreadable"),
        (raw(image="bomb.png"), "image_unreadable"),
    ],
)
def test_every_way_of_being_broken_has_its_reason(tmp_path, record, reason):
    root = tmp_path / "data"
    picture(root / "ok.png")
    picture(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "no_picture.png").write_text("GIF? no.")
    for name in ("cut.png", "cut.jpg"):
        data = picture(root / name, size=(64, 64)).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
    header = bytearray(picture(root / "bomb.png").read_bytes())
    header[16:24] = (10_000).to_bytes(4, "big") * 2  # width and height
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    assert MAX_PIXELS < 10_000**2 < 2 * MAX_PIXELS  # Pillow itself would only warn
    (root / "bomb.png").write_bytes(header)

    file = write(root / "a.jsonl", record)
    refusal = only(file)
    assert refusal[:-1] == Refusal(str(file), 1, "a", Reason(reason))[:-1]
    assert pickle.loads(pickle.dumps(refusal)) == refusal


def test_every_reason_is_tested():
    marks = test_every_way_of_being_broken_has_its_reason.pytestmark[0].args[1]
    assert {reason for _, reason in marks} == set(Reason)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp"])
def test_whole_pictures_pass(tmp_path, name):
    picture(tmp_path / name)
    assert isinstance(only(write(tmp_path / "a.jsonl", raw(image=name))), Rollout)


def test_a_jpeg_with_bytes_after_its_end_passes(tmp_path):
    file = picture(tmp_path / "a.jpg")
    file.write_bytes(file.read_bytes() + b"\0" * 500)
    assert isinstance(only(write(tmp_path / "a.jsonl", raw(image="a.jpg"))), Rollout)


@pytest.mark.parametrize("place", ["VisualPRM400K-v1.1-Raw/x/1.png", "x/1.png", "images/x/1.png"])
def test_the_prefix_of_the_raw_annotations_is_found_elsewhere(tmp_path, place):
    path = picture(tmp_path / "root" / place)
    file = write(tmp_path / "a.jsonl", raw(image="VisualPRM400K-v1.1-Raw/x/1.png"))
    assert only(file, image_root=tmp_path / "root").row["images"] == [{"path": str(path), "bytes": None}]


def test_short_paths_and_lists_of_nlvr2(tmp_path):
    paths = [picture(tmp_path / "images/nlvr2/images" / name) for name in ("train-0.png", "train-1.png")]
    file = write(tmp_path / "NLVR2.jsonl", raw(image=["images/train-0.png", "images/train-1.png"]))
    assert [image["path"] for image in only(file).row["images"]] == list(map(str, paths))


def test_images_are_not_decoded_at_load_and_looked_at_once(tmp_path, monkeypatch):
    picture(tmp_path / "1.png")
    file = write(tmp_path / "a.jsonl", *[raw(image="1.png")] * 5)
    opened, plain_check = [], images.check_file
    monkeypatch.setattr(images, "check_file", lambda *args: opened.append(args) or plain_check(*args))
    monkeypatch.setattr(PILImage.Image, "load", lambda self: pytest.fail("decoded"))
    assert len(load_rollouts(file)) == 5
    assert len(opened) == 1


def test_unchecked_images_keep_their_path(tmp_path):
    item = only(write(tmp_path / "a.jsonl", raw(image="../x.png")), check_images=False)
    assert item.row["images"] == [{"path": "../x.png", "bytes": None}]


def test_a_folder_is_read_by_name_and_a_list_in_its_order(tmp_path):
    write(tmp_path / "b.jsonl", raw(), "", raw())
    write(tmp_path / "a.jsonl", raw())
    write(tmp_path / "refused.jsonl", {"file": "a.jsonl", "line": 1, "reason": "not_json"})
    (tmp_path / "notes.txt").write_text("no rollouts")
    assert load_rollouts(tmp_path)["rollout_id"][:] == ["a:0", "b:0", "b:2"]
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    assert load_rollouts(files)["source"][:] == ["b", "b", "a"]


def test_line_ends_and_unicode(tmp_path):
    text = json.dumps(raw(question_orig="é\u2028ü 数"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}".encode())
    assert load_rollouts(tmp_path)["prompt"][:] == ["é\u2028ü 数"] * 2


def test_a_number_of_more_digits_than_python_reads(tmp_path):
    """Harmless in a field that is not read; as a score it is out of range."""
    text = json.dumps(raw(answer="X", n=5)).replace('"X"', "1" * 5000)
    assert parse(text.encode())["n"] == 5 and parse(text.encode()[:-1]) is None
    odd = json.dumps(step(score="X")).replace('"X"', "1" * 5000)
    items = list(read_rollouts(write(tmp_path / "a.jsonl", text, odd)))
    assert items[0].row["labels"] == [0.5, 0.0] and items[1].reason is Reason.SCORE_OUT_OF_RANGE


def test_refusals_are_logged_one_line_a_reason(tmp_path, caplog):
    write(tmp_path / "a.jsonl", "{", raw(), "{")
    write(tmp_path / "b.jsonl", "{", step(score=2))
    with caplog.at_level(logging.WARNING):
        assert len(load_rollouts(tmp_path)) == 1
    assert caplog.messages == [
        f"not_json: refused 3 rows (a 2, b 1), the first at {tmp_path}/a.jsonl:1",
        f"score_out_of_range: refused 1 rows (b 1), the first at {tmp_path}/b.jsonl:2",
    ]
    refusals = [item for item in read_rollouts(tmp_path) if isinstance(item, Refusal)]
    assert describe_refusals(refusals) == caplog.messages


def test_the_fingerprint_is_the_content(tmp_path):
    file = write(tmp_path / "a.jsonl", raw())
    first = load_rollouts(file)
    assert load_rollouts(file)._fingerprint == first._fingerprint
    write(file, raw(), raw())
    assert load_rollouts(file)._fingerprint != first._fingerprint
    assert len(first) == 1  # read from its own file, which is still there
    assert pickle.loads(pickle.dumps(first))[0] == first[0]
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "no.jsonl", FileNotFoundError, "no such file or folder"),
        (lambda path: path, FileNotFoundError, r"expected \*.jsonl files"),
        (lambda path: write(path / "a.jsonl", "{"), ValueError, "not_json: refused 1 rows.*Expected raw annotations"),
        (lambda path: write(path / "a.jsonl"), ValueError, "No rows at all"),
        (
            lambda path: [write(path / "x" / "a.jsonl", raw()), write(path / "y" / "a.jsonl", raw())],
            ValueError,
            "rename one of them",
        ),
        (
            lambda path: [write(path / "a.jsonl", raw()), path],
            ValueError,
            "is the same file: its rows would count twice",
        ),
    ],
)
def test_errors_say_what_to_do(tmp_path, make, error, message):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(error, match=message) as caught:
        load_rollouts(make(folder))
    assert "\n" not in str(caught.value)


LOAD = """
import json, sys
from trl_mprm import load_rollouts
try:
    data = load_rollouts("org/rollouts", **json.loads(sys.argv[1]))
    size = lambda image: image["path"] if isinstance(image, dict) else image.size
    print(json.dumps({"source": data["source"][:], "id": data["rollout_id"][:], "labels": data["labels"][:],
                      "sizes": [[size(image) for image in row] for row in data["images"]]}))
except (ValueError, FileNotFoundError) as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def load_from_hub(tmp_path, files, **arguments):
    """`load_rollouts` in a new process, against a real server on this machine: the address is read at import."""
    handler = type("OneHub", (ReadHub,), {"files": files})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        command = [sys.executable, "-c", LOAD, json.dumps(arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def zipped(path, members):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_hub_dataset_with_zipped_annotations(tmp_path):
    picture(tmp_path / "images" / "x" / "1.png")
    with_image = json.dumps(raw(image="VisualPRM400K-v1.1-Raw/x/1.png"))
    members = {"annotations/": "", "annotations/b.jsonl": with_image, "annotations/a.jsonl": json.dumps(raw())}
    files = {"annotations.zip": zipped(tmp_path / "z.zip", members).read_bytes(), "README.md": b"# rollouts"}
    loaded = load_from_hub(tmp_path, files, image_root=str(tmp_path))
    assert loaded["id"] == ["a:0", "b:0"]
    assert loaded["sizes"] == [[], [[4, 4]]]
    # again from the cache, now without saying where the images are: rows keep the paths where they would be
    loaded = load_from_hub(tmp_path, files)
    assert loaded["id"] == ["a:0", "b:0"]
    assert loaded["sizes"][0] == [] and loaded["sizes"][1][0].endswith("/VisualPRM400K-v1.1-Raw/x/1.png")


def parquet(rows):
    """A table of rows as a file of the ReadHub."""
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


SELECT = """
import sys
from trl_mprm import load_rollouts
from trl_mprm.cli import main
for streaming in (True, False):
    print([row["rollout_id"] for row in load_rollouts("org/rollouts", streaming=streaming)])
sys.exit(main(["select", "org/rollouts", "--fraction", "0.5", "--output", sys.argv[1]]))
"""


@pytest.mark.parametrize("zip_there", [True, False])
def test_hub_dataset_is_streamed_and_selected(tmp_path, zip_there):
    # steps with different keys, which the datasets library stores as JSON
    rows = [raw(), raw(steps_with_score=[{"step": "a", "score": 1.0, "num_mc_total": 16}])]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"README.md": b"# rollouts", "train.jsonl": text.encode()}
    if zip_there:
        archive = zipped(tmp_path / "z.zip", {"annotations/train.jsonl": text})
        files = {"README.md": b"# rollouts", "annotations.zip": archive.read_bytes()}
    handler = type("OneHub", (ReadHub,), {"files": files})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        command = [sys.executable, "-c", SELECT, str(tmp_path / "kept")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name = "train" if zip_there else "rollouts"
    assert done.stdout.splitlines()[:2] == [f"['{name}:0', '{name}:1']"] * 2
    assert (tmp_path / "kept" / f"{name}.jsonl").read_text() == json.dumps(rows[0]) + "\n"
    assert json.loads((tmp_path / "kept" / "selection.json").read_text())["inputs"] == ["org/rollouts"]
    assert not list((tmp_path / "home").rglob("annotations"))  # nothing is unpacked


def test_hub_dataset_of_several_splits_and_files(tmp_path):
    """The split train is one source, its files one after the other, as `load_dataset` reads them; test is not read."""
    rows = [stepwise(labels=[True, i % 3 == 0], prompt=f"{i}?") for i in range(8)]
    rows[5]["labels"] = [True, None]  # refused
    files = {"README.md": b"# rollouts", "data/test-00000-of-00001.parquet": parquet(rows)}
    files |= {f"data/train-0000{i}-of-00002.parquet": parquet(rows[4 * i : 4 * i + 4]) for i in range(2)}
    handler = type("OneHub", (ReadHub,), {"files": files})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        command = [sys.executable, "-c", SELECT, str(tmp_path / "kept" / "rows.parquet")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = [f"rollouts:{i}" for i in range(8) if i != 5]
    assert done.stdout.splitlines()[:2] == [str(ids)] * 2
    kept = pq.read_table(tmp_path / "kept" / "rows.parquet")
    assert kept["rollout_id"].to_pylist() == ["rollouts:1", "rollouts:2", "rollouts:4"]  # mixed, int(7 * 0.5) of them
    report = json.loads((tmp_path / "kept" / "rows.parquet.selection.json").read_text())
    assert list(report["sources"]) == ["rollouts"] and report["total"]["read"] == 8
    (refused,) = (tmp_path / "kept" / "rows.parquet.refused.jsonl").read_text().splitlines()
    assert json.loads(refused) == {"file": "org/rollouts", "line": 6, "reason": "step_without_score"}


def test_hub_dataset_that_select_cannot_read(tmp_path):
    files = {"README.md": b"# rollouts", "train.json": json.dumps(stepwise()).encode()}
    handler = type("OneHub", (ReadHub,), {"files": files})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        code = "import sys; from trl_mprm.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "select", "org/rollouts", "--output", str(tmp_path / "kept")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert error.startswith("error: org/rollouts: expected annotations.zip, or a split train of *.jsonl")
    assert "got train.json" in error


def test_hub_dataset_of_rows(tmp_path):
    rows = [stepwise(labels=[0.5, 0.0]), stepwise(labels=[0.25, 1.0], source="y")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    loaded = load_from_hub(tmp_path, {"train.jsonl": text.encode(), "README.md": b"# rollouts"})
    assert loaded["labels"] == [[0.5, 0.0], [0.25, 1.0]]
    assert loaded["source"] == ["rollouts", "y"]
    assert loaded["id"] == ["rollouts:0", "rollouts:1"]


@pytest.mark.parametrize("name", ["../evil.jsonl", "/evil.jsonl", "a/../../evil.jsonl", "..\\evil.jsonl"])
def test_a_zip_is_read_in_place_whatever_its_members_are_called(tmp_path, name):
    archive = zipped(tmp_path / "in" / "z.zip", {name: json.dumps(raw())})
    assert load_rollouts(archive)["rollout_id"][:] == ["evil:0"]
    assert sorted(path.name for path in (tmp_path / "in").rglob("*")) == ["z.zip"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in"]


def test_data_files_never_import_torch():
    code = "import sys, trl_mprm.data.rollouts, trl_mprm.selection.bis, trl_mprm.selection.datasets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
