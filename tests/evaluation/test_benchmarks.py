"""Reading benchmarks of four formats, with every way of being broken; their peculiarities; and the Hub."""

import io
import json
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler

import pytest
from helpers import GOOD, best_of_n_line, hub_on_this_machine, processbench, record, write
from PIL import Image

from trl_mprm.evaluation.benchmarks import load_benchmark, read_benchmark


def test_an_item(folder):
    write(folder, record(["good", "bad", "so-so"], [1, -1, 0], question="<image>\nHow many in <image 1>?"))
    benchmark = read_benchmark(folder)
    (item,) = benchmark.items
    assert len(item.pop("group")) == 16
    assert item == {
        "id": "DynaMath:0",
        "images": [str(folder / "images" / "red.png")],
        "prompt": "How many in ?",
        "completions": ["good", "bad", "so-so"],
        "labels": [1, -1, 0],
        "source": "DynaMath",
        "policy_model": "GPT-4o",
    }
    assert benchmark.report == {
        "name": "visualprocessbench",
        "title": "VisualProcessBench, other data",
        "hub_id": None,
        "path": str(folder / "test.jsonl"),
        "read": 1,
        "refused": {},
        "refused_lines": [],
        "quirks": {"neutral_steps": 1},
    }


def test_image_as_string_none_and_image_root(folder):
    write(folder, {**GOOD, "image": "red.png"}, {**GOOD, "image": []})
    items = read_benchmark(folder / "test.jsonl", image_root=folder / "images").items
    assert [item["images"] for item in items] == [[str(folder / "images" / "red.png")], []]


def test_a_group_is_a_question_with_its_pictures(folder):
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "red.png").read_bytes())
    write(
        folder,
        GOOD,
        {**GOOD, "policy_model": "QvQ"},
        {**GOOD, "image": ["images/copy.png"]},
        {**GOOD, "image": ["images/blue.png"]},
        {**GOOD, "question": "How few?"},
    )
    groups = [item["group"] for item in read_benchmark(folder).items]
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 3


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"image":', "not_json", "Expecting value"),
        ('{"image": "\udcff"', "not_json", ""),
        ("[" * 100_000, "not_json", ""),
        ("[1]", "not_json", "expected an object, got list"),
        ({k: v for k, v in GOOD.items() if k != "question"}, "bad_field", "question: expected str, got no such key"),
        ({**GOOD, "data_source": 3}, "bad_field", "data_source: expected str, got 3"),
        ({**GOOD, "response": "good"}, "bad_field", "response: expected dict, got 'good'"),
        ({**GOOD, "response": {"steps": ["good"]}}, "bad_field", "process_correctness: expected list"),
        ({**GOOD, "image": None}, "bad_field", r"image: expected str \| list, got None"),
        ({**GOOD, "image": [1]}, "image_not_a_path", "image is 1, expected a path"),
        ({**GOOD, "question": "\ud800?"}, "text_not_unicode", "question holds a lone surrogate"),
        (record(["good", "\ud800"], [1, 1]), "text_not_unicode", "step 1 holds a lone surrogate"),
        (
            {**GOOD, "question": f"How many in <image{'9' * 5000}>?"},
            "bad_field",
            "question: expected the number of an image, got <image999999999...>",
        ),
        (record([], []), "empty_steps", "the list of steps is empty"),
        (record(["good", " "], [1, 1]), "step_without_text", "step 1 is ' '"),
        (record(["good", None], [1, 1]), "step_without_text", "step 1 is None"),
        (record(["good"], [1, -1]), "labels_not_one_a_step", "1 steps, 2 labels"),
        (record(["good", "bad"], [1, 2]), "bad_label", "label 1 is 2"),
        (record(["good"], [True]), "bad_label", "label 0 is True"),
        (record(["good"], [None]), "bad_label", "label 0 is None"),
        ({**GOOD, "image": ["../secret.png"]}, "image_outside_root", "'../secret.png' leads out"),
        ({**GOOD, "image": ["/etc/hostname"]}, "image_outside_root", "'/etc/hostname' leads out"),
        ({**GOOD, "image": ["images/link.png"]}, "image_outside_root", "leads out"),
        ({**GOOD, "image": ["images/none.png"]}, "image_missing", "'images/none.png' is not in"),
        ({**GOOD, "image": ["images/\0.png"]}, "image_missing", "is not in"),
        ({**GOOD, "image": ["x" * 5000]}, "image_missing", "is not in"),
        ({**GOOD, "image": ["images/text.png"]}, "image_unreadable", "cannot identify"),
        ({**GOOD, "image": ["images/cut.png"]}, "image_unreadable", "images/cut.png"),
        ({**GOOD, "image": ["images/bomb.png"]}, "image_unreadable", "10000 x 10000 pixels, more than"),
    ],
)
def test_refused_lines_are_named_and_counted(folder, line, reason, detail):
    (folder.parent / "secret.png").write_bytes((folder / "images" / "red.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "images" / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(folder / "images" / "whole.png")
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "whole.png").read_bytes()[:900])
    (folder / "images" / "bomb.png").write_bytes(png_header(10_000, 10_000))
    text = line if isinstance(line, str) else json.dumps(line)
    data = "\n".join([json.dumps(GOOD), text, "", json.dumps(GOOD)])
    (folder / "test.jsonl").write_bytes(data.encode("utf-8", "surrogateescape"))

    with pytest.warns(UserWarning, match=rf"test\.jsonl: 1 lines refused \(1 {reason}\); first, line 2: "):
        benchmark = read_benchmark(folder)
    assert [item["id"] for item in benchmark.items] == ["DynaMath:0", "DynaMath:3"]
    (refusal,) = benchmark.refused
    assert (refusal["line"], refusal["reason"]) == (2, reason)
    assert re.search(detail, refusal["detail"])
    assert benchmark.report["refused"] == {reason: 1} and benchmark.report["read"] == 3


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match="OpenGVLab/VisualProcessBench: no such file; .* hf download"):
        read_benchmark("OpenGVLab/VisualProcessBench")
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl: no such file"):
        read_benchmark(folder)
    with pytest.raises(ValueError, match="no usable line .it is empty"):
        read_benchmark(write(folder))
    with pytest.raises(ValueError, match="no usable line .line 1: empty_steps, the list of steps is empty"):
        read_benchmark(write(folder, record([], [])))


def test_quirks_of_visualprocessbench_are_counted_and_kept(folder):
    two = ["images/red.png", "images/blue.png"]
    write(
        folder,
        {**GOOD, "question": "<image1> How many in <image2>?"},
        {**GOOD, "question": "<image><image> How many?"},
        {**GOOD, "image": two, "question": "<image1><image2> Which?"},
        {**GOOD, "image": two, "question": "<image>\nWhich of <image 1> and <image 2>?"},
        record(["good", "so-so", "bad"], [1, 0, -1]),
    )
    benchmark = read_benchmark(folder)
    assert len(benchmark.items) == 5
    assert benchmark.report["quirks"] == {
        "items_naming_more_images_than_supplied": 2,
        "multi_image_items": 2,
        "neutral_steps": 1,
    }
    assert [item["prompt"] for item in benchmark.items[:3]] == ["How many in ?", "How many?", "Which?"]
    assert [path[-8:] for path in benchmark.items[2]["images"]] == ["/red.png", "blue.png"]


def test_processbench(tmp_path):
    benchmark = read_benchmark(processbench(tmp_path, label=0), name="processbench")
    assert [item["source"] for item in benchmark.items] == ["gsm8k"] * 3 + ["math", "olympiadbench", "omnimath"]
    # What follows the first error is not labelled.
    assert [item["labels"] for item in benchmark.items[:3]] == [[1, -1, 0], [1, 1, 1], [-1, 0, 0]]
    first = benchmark.items[0]
    assert (first["id"], first["prompt"], first["images"]) == ("gsm8k-0", "2+2?", [])
    assert (first["completions"], first["policy_model"]) == (["a", "b", "c"], "Qwen2-7B-Instruct")
    assert benchmark.report["path"] == str(tmp_path) and len({item["group"] for item in benchmark.items}) == 1
    alone = read_benchmark(tmp_path / "math.json", name="processbench")
    assert [item["id"] for item in alone.items] == ["math-0"]


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"label": 3}, "bad_label", "label is 3, expected -1 or the index of one of 3 steps"),
        ({"label": -2}, "bad_label", "label is -2"),
        ({"label": True}, "bad_label", "label is True"),
        ({"label": "1"}, "bad_field", "label: expected int, got '1'"),
        ({"problem": None}, "bad_field", "problem: expected str"),
        ({"steps": ["a", " "]}, "step_without_text", "step 1 is ' '"),
        ({"steps": []}, "empty_steps", "the list of steps is empty"),
        ({"id": "gsm8k-1"}, "duplicate_id", "'gsm8k-1' came before"),
    ],
)
def test_refused_records_of_processbench(tmp_path, changes, reason, detail):
    with pytest.warns(UserWarning, match=rf"gsm8k\.json: 1 lines refused \(1 {reason}\); first, line 3: "):
        benchmark = read_benchmark(processbench(tmp_path, **changes), name="processbench")
    (refusal,) = benchmark.refused
    assert (refusal["file"], refusal["line"], refusal["reason"]) == ("gsm8k.json", 3, reason)
    assert refusal["detail"].startswith(detail) and len(benchmark.items) == 5


def test_processbench_files_that_cannot_be_read(tmp_path):
    processbench(tmp_path)
    (tmp_path / "math.json").write_text('{"id": "math-0"}')
    with pytest.raises(ValueError, match=r"math\.json: expected a JSON array of records, got dict"):
        read_benchmark(tmp_path, name="processbench")
    (tmp_path / "math.json").write_text("[{")
    with pytest.raises(ValueError, match=r"math\.json: expected a JSON array of records \(.*download it again"):
        read_benchmark(tmp_path, name="processbench")
    (tmp_path / "math.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"math\.json: no such file; expected a file or a folder with gsm8k"):
        read_benchmark(tmp_path, name="processbench")
    with pytest.raises(ValueError, match="benchmark is 'gsm8k', expected one of visualprocessbench, processbench"):
        read_benchmark(tmp_path, name="gsm8k")


def test_prmbench(tmp_path):
    row = {
        "original_question": "2+2?",
        "modified_question": "2+2, really?",
        "original_process": ["1. 4"],
        "modified_process": ["1. two", "2. five", "3. so 5"],
        "modified_steps": [2],
        "error_steps": [2, 3],
        "reason": "...",
        "idx": "circular_0",
        "question": "2+2?",
        "classification": "circular",
    }
    rows = [
        row,
        {**row, "classification": "multi_solutions", "error_steps": []},
        {**row, "idx": "circular_1", "error_steps": [3, 9]},
        row,
        {**row, "idx": "circular_2", "error_steps": ["2"]},
    ]
    (tmp_path / "prmbench_preview.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    with pytest.warns(UserWarning, match="2 lines refused .1 bad_label, 1 duplicate_id.; first, line 4"):
        benchmark = read_benchmark(tmp_path, name="prmbench")
    assert [item["labels"] for item in benchmark.items] == [[1, -1, -1], [1, 1, 1], [1, 1, -1]]
    assert [item["id"] for item in benchmark.items][:2] == ["circular:circular_0", "multi_solutions:circular_0"]
    assert benchmark.items[0]["prompt"] == "2+2, really?"
    # PRMBench's own evaluator passes over the number 9 too.
    assert benchmark.report["quirks"] == {"error_steps_out_of_range": 1}
    assert len({item["group"] for item in benchmark.items}) == 1


def test_best_of_n(folder):
    good, bad = {"steps": ["good", "bad"], "correct": True}, {"text": "one\n\ntwo\nAnswer: 3", "correct": False}
    lines = [best_of_n_line(good, bad), best_of_n_line(bad, source="tiles"), {"question": "?", "candidates": [good]}]
    (folder / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = read_benchmark(folder, name="best-of-n")
    assert [item["group"] for item in benchmark.items] == [f"candidates:{number}" for number in (0, 0, 1, 2)]
    first, second, third, fourth = benchmark.items
    assert (first["completions"], first["labels"], first["correct"]) == (["good", "bad"], [0, 0], True)
    assert (second["completions"], second["correct"]) == (["one", "two", "Answer: 3"], False)
    assert (first["source"], third["source"], fourth["images"]) == ("candidates", "tiles", [])
    assert benchmark.report["quirks"] == {}


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (best_of_n_line(), "bad_field", "candidates is empty"),
        (best_of_n_line("text"), "bad_field", "candidate 0: expected an object, got 'text'"),
        (best_of_n_line({"steps": ["a"]}), "bad_field", "candidate 0: correct: expected bool, got no such key"),
        (best_of_n_line({"steps": ["a"], "correct": 1}), "bad_field", "candidate 0: correct: expected bool, got 1"),
        (best_of_n_line({"correct": True}), "bad_field", "candidate 0: text: expected str, got no such key"),
        (best_of_n_line({"text": " \n", "correct": True}), "empty_steps", "candidate 0: the list of steps is empty"),
        (best_of_n_line({"steps": ["a"], "correct": True}, images=["x.png"]), "image_missing", "'x.png' is not in"),
    ],
)
def test_refused_questions_of_best_of_n(folder, line, reason, detail):
    whole = best_of_n_line({"steps": ["a"], "correct": True})
    (folder / "bon.jsonl").write_text(f"{json.dumps(whole)}\n{json.dumps(line)}\n")
    with pytest.warns(UserWarning, match="1 lines refused"):
        benchmark = read_benchmark(folder / "bon.jsonl", name="best-of-n")
    (refusal,) = benchmark.refused
    assert refusal["reason"] == reason and refusal["detail"].startswith(detail) and len(benchmark.items) == 1


class Hub(BaseHTTPRequestHandler):
    """One dataset: `files[name] = bytes`."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{zlib.crc32(self.path.encode())}"'}
        if self.path.startswith("/api/datasets/OpenGVLab/VisualProcessBench/tree/"):
            sizes = [(name, len(content)) for name, content in self.files.items()]
            tree = [{"type": "file", "path": name, "size": size, "oid": "1" * 40} for name, size in sizes]
            status, body = 200, json.dumps(tree).encode()
        elif self.path.startswith("/api/datasets/OpenGVLab/VisualProcessBench"):
            names = [{"rfilename": name} for name in self.files]
            info = {"id": "OpenGVLab/VisualProcessBench", "sha": "0" * 40, "siblings": names}
            status, body = 200, json.dumps(info).encode()
        else:
            name = self.path.split("/resolve/")[-1].split("/", 1)[-1]
            status, body = (200, self.files[name]) if name in self.files else (404, b"")
            headers |= {} if name in self.files else {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


LOAD = """
import json, sys
from trl_mprm.evaluation.benchmarks import load_benchmark

benchmark = load_benchmark("visualprocessbench", sys.argv[1] if len(sys.argv) > 1 else None)
print(json.dumps([item["images"] for item in benchmark.items]))
"""


def test_the_dataset_of_the_hub_with_its_archive_of_images(folder, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.write(folder / "images" / "red.png", "images/red.png")
        members.write(folder / "images" / "red.png", "../../../outside.png")
    files = {"test.jsonl": json.dumps(GOOD).encode(), "images.zip": archive.getvalue(), "README.md": b"not needed"}
    home = tmp_path / "home"
    with hub_on_this_machine(type("OneHub", (Hub,), {"files": files}), home) as env:
        for _ in range(2):  # the second finds the images unpacked
            done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            ((image,),) = json.loads(done.stdout)
            assert image.endswith("unpacked-images/images/red.png")
        names = {path.name for path in home.rglob("*")}
        # A member that leads out of the archive lands inside, and what the benchmark does not need is not fetched.
        assert "unpacked-images/outside.png" in "\n".join(map(str, home.rglob("outside.png")))
        assert "README.md" not in names and not [name for name in names if name.startswith(".unpacked-images")]
        missing = subprocess.run(
            [sys.executable, "-c", LOAD, "nobody/nothing"], env=env, capture_output=True, text=True, timeout=300
        )
        assert "nobody/nothing: no such file or folder here, and" in missing.stderr
        files["images.zip"] = b"cut short"
        env["HF_HOME"] = str(tmp_path / "other-home")
        broken = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=300)
    assert "images.zip is no whole archive (File is not a zip file): delete it and run again" in broken.stderr


def test_only_as_many_records_as_are_published_are_the_published_dataset(folder):
    benchmark = read_benchmark(write(folder, *[GOOD] * 2866))
    assert (benchmark.hub_id, benchmark.title) == ("OpenGVLab/VisualProcessBench", "VisualProcessBench")
    benchmark = read_benchmark(write(folder, *[GOOD] * 2865))
    assert (benchmark.hub_id, benchmark.title) == (None, "VisualProcessBench, other data")


def test_best_of_n_has_no_dataset_of_its_own():
    with pytest.raises(ValueError, match="best-of-n has no dataset on the Hub: name a file or folder of yours"):
        load_benchmark("best-of-n")
