"""Reading a benchmark with every way of being broken, the bookkeeping of an evaluation, and its files."""

import json
import re
import struct
import zlib

import pytest
from PIL import Image

from trl_mprm.evaluation import evaluate_model, read_benchmark, recompute_metrics, table_rows
from trl_mprm.metrics import step_metrics


class Table:
    """Scores steps by their text."""

    def __init__(self, scores):
        self.scores = scores

    def score_batch(self, rows, batch_size=8):
        return [[self.scores[step] for step in row["completions"]] for row in rows]


MODEL = Table({"good": 0.9, "so-so": 0.6, "bad": 0.2})


def record(steps, labels, **changes):
    return {
        "image": ["images/red.png"],
        "question": "How many?",
        "answer": "2",
        "response": {"steps": steps, "process_correctness": labels},
        "policy_model": "GPT-4o",
        "data_source": "DynaMath",
        **changes,
    }


GOOD = record(["good", "bad"], [1, -1])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path


def write(folder, *records):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


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
    assert benchmark.report == {"path": str(folder / "test.jsonl"), "read": 1, "refused": {}, "refused_lines": []}


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
        (record([], []), "empty_steps", "response.steps is empty"),
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
    with pytest.raises(ValueError, match="no usable line .line 1: empty_steps, response.steps is empty"):
        read_benchmark(write(folder, record([], [])))


def four_items(folder):
    return write(
        folder,
        record(["good", "so-so", "bad"], [1, 0, -1]),
        record(["good", "bad"], [1, 1], question="How few?"),
        record(["good", "so-so"], [1, -1], question="Which?", data_source="WeMath"),
        record(["good", "bad"], [1, -1], question="Where?", data_source="WeMath", policy_model=None),
    )


def test_evaluation_equals_its_metrics_and_can_be_recomputed(folder):
    output = folder / "results"
    results = evaluate_model(MODEL, four_items(folder), threshold=0.5, output_dir=output)
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "scores.jsonl"]
    assert json.loads((output / "results.json").read_text()) == results

    records = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    groups = [each.pop("group") for each in records]
    assert records[0] == {
        "id": "DynaMath:0",
        "source": "DynaMath",
        "policy_model": "GPT-4o",
        "labels": [1, 0, -1],
        "scores": [0.9, 0.6, 0.2],
    }
    labels, scores = [[1, 0, -1], [1, 1], [1, -1], [1, -1]], [[0.9, 0.6, 0.2], [0.9, 0.2], [0.9, 0.6], [0.9, 0.2]]
    sources = ["DynaMath"] * 2 + ["WeMath"] * 2
    for threshold in (0.5, "held_out", "oracle"):
        expected = step_metrics(labels, scores, sources, groups, threshold=threshold)
        assert recompute_metrics(output / "scores.jsonl", threshold) == expected
    assert results.pop("benchmark") == {
        "path": str(folder / "test.jsonl"),
        "read": 4,
        "refused": {},
        "refused_lines": [],
    }
    assert results == recompute_metrics(output / "scores.jsonl", 0.5)


def test_evaluation_on_a_benchmark_that_is_read_already(folder):
    benchmark = read_benchmark(four_items(folder))
    assert evaluate_model(MODEL, benchmark) == evaluate_model(MODEL, folder)
    assert evaluate_model(MODEL, benchmark)["threshold_protocol"] == "held_out"


class Broken:
    def __init__(self, scores):
        self.scores = scores

    def score_batch(self, rows, batch_size=8):
        return self.scores


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.5, 0.5]], "the model scored 1 rows, expected 4"),
        ([[0.5], [0.5] * 2, [0.5] * 2, [0.5] * 2], "item DynaMath:0: expected 3 scores"),
        ([[0.5, 0.5, 1.5], [0.5] * 2, [0.5] * 2, [0.5] * 2], "item DynaMath:0: expected 3 scores in .0, 1."),
        ([[0.5] * 3, [0.5, float("nan")], [0.5] * 2, [0.5] * 2], "item DynaMath:1: expected 2 scores"),
    ],
)
def test_a_model_that_returns_nonsense_leaves_no_files(folder, scores, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(Broken(scores), four_items(folder), output_dir=folder / "results")
    assert not (folder / "results").exists()


def test_what_cannot_be_measured_fails_before_scoring(folder):
    class Expensive:
        def score_batch(self, rows, batch_size=8):
            pytest.fail("scored for hours")

    with pytest.raises(ValueError, match="needs at least 2 questions"):
        evaluate_model(Expensive(), write(folder, GOOD, GOOD))
    with pytest.raises(ValueError, match="threshold must be"):
        evaluate_model(Expensive(), four_items(folder), threshold="best")


def test_scores_that_cannot_be_recomputed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores\.jsonl: no such file"):
        recompute_metrics(tmp_path / "scores.jsonl")
    (tmp_path / "scores.jsonl").write_text('{"labels": [1], "scores": [0.5], "source": "a"}\n')
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1: expected a JSON object with .*KeyError"):
        recompute_metrics(tmp_path / "scores.jsonl")


def test_table_names_protocol_and_leaves_undefined_open():
    metrics = step_metrics([[1, 1], [1, -1]], [[0.9, 0.9], [0.9, 0.1]], ["a", "b"], n_resamples=0)
    assert table_rows(metrics) == [
        ["source", "steps", "F1 correct", "F1 incorrect", "macro-F1 (held_out threshold)", "95% interval", "AUC"],
        ["a", "2", "100.00", "-", "-", "-", "-"],
        ["b", "2", "100.00", "100.00", "100.00", "-", "100.00"],
        ["overall, step-weighted (the paper)", "4", "-", "-", "100.00", "-", "100.00"],
        ["overall, pooled (VisualPRM)", "4", "-", "-", "100.00", "-", "100.00"],
        ["overall, mean of sources", "4", "-", "-", "100.00", "-", "100.00"],
    ]
