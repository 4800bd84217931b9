"""Scoring a benchmark: its bookkeeping and files, bad items, a killed run, two processes, and what people read of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import GOOD, Steady, best_of_n_line, items_of, processbench, record, write
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from trl_mprm import ProcessRewardModel
from trl_mprm.cards.model_card import add_eval_results
from trl_mprm.cli import main
from trl_mprm.cli.arguments import print_table
from trl_mprm.evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkEntry, read_benchmark
from trl_mprm.evaluation.fingerprint import fingerprint
from trl_mprm.evaluation.metrics import best_of_n_metrics, prmbench_scores, step_metrics
from trl_mprm.evaluation.published_results import TABLES, VISUALPROCESSBENCH_STEPS
from trl_mprm.evaluation.records import compare_models, recompute_metrics
from trl_mprm.evaluation.report import results_markdown, write_report
from trl_mprm.evaluation.run import evaluate_model, score_items
from trl_mprm.evaluation.tables import table_rows
from trl_mprm.models.loading import add_marker, load_model, load_processing_class
from trl_mprm.prompting.step_format import StepFormat


class Table:
    """Scores steps by their text; a step that it does not know cannot be scored. `calls` holds the rows of each call."""

    def __init__(self, scores):
        self.scores = scores
        self.calls = []

    def score_batch(self, rows, batch_size=8):
        self.calls.append([row["rollout_id"] for row in rows])
        unknown = [step for row in rows for step in row["completions"] if step not in self.scores]
        if unknown:
            raise ValueError(f"row has the step {unknown[0]!r}:\nshorten it")
        return [[self.scores[step] for step in row["completions"]] for row in rows]


SCORES = {"good": 0.9, "so-so": 0.6, "bad": 0.2}
MODEL = Table(SCORES)


def four_items(folder):  # noqa: F811
    return write(
        folder,
        record(["good", "so-so", "bad"], [1, 0, -1]),
        record(["good", "bad"], [1, 1], question="How few?"),
        record(["good", "so-so"], [1, -1], question="Which?", data_source="WeMath"),
        record(["good", "bad"], [1, -1], question="Where?", data_source="WeMath", policy_model=None),
    )


def test_evaluation_equals_its_metrics_and_can_be_recomputed(folder):  # noqa: F811
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
    assert results.pop("benchmark") == {**read_benchmark(folder).report, "failed": []}
    assert results == recompute_metrics(output / "scores.jsonl", 0.5)


def test_evaluation_on_a_benchmark_that_is_read_already(folder):  # noqa: F811
    benchmark = read_benchmark(four_items(folder))
    assert evaluate_model(MODEL, benchmark) == evaluate_model(MODEL, folder)
    assert evaluate_model(MODEL, benchmark)["threshold_protocol"] == "held_out"


def test_one_bad_item_is_reported_and_the_others_are_scored(folder):  # noqa: F811
    write(
        folder,
        record(["good", "so-so", "bad"], [1, 0, -1]),
        record(["good", "endless"], [1, 1], question="How few?"),
        record(["good", "so-so"], [1, -1], question="Which?", data_source="WeMath"),
    )
    model = Table(SCORES)
    with pytest.warns(UserWarning, match="1 of 3 items could not be scored; first, DynaMath:1: row has the step"):
        results = evaluate_model(model, folder, 0.5, output_dir=folder / "results")
    error = "row has the step 'endless': shorten it"
    assert results["benchmark"]["failed"] == [{"id": "DynaMath:1", "error": error}]
    assert results["n_solutions"] == 2
    kept = [json.loads(line) for line in (folder / "results" / "scores.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in kept] == [[0.9, 0.6, 0.2], None, [0.9, 0.6]] and kept[1]["error"] == error
    recomputed = recompute_metrics(folder / "results" / "scores.jsonl", 0.5)
    assert recomputed == {key: value for key, value in results.items() if key != "benchmark"}
    # The chunk was halved until the bad item stood alone.
    assert model.calls == [
        ["DynaMath:0", "DynaMath:1", "WeMath:2"],
        ["DynaMath:0"],
        ["DynaMath:1", "WeMath:2"],
        ["DynaMath:1"],
        ["WeMath:2"],
    ]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (KeyError("image"), "KeyError: 'image'"),
        (torch.OutOfMemoryError("CUDA out of memory:\n2 GB"), "OutOfMemoryError: CUDA out of memory: 2 GB"),
        (IndexError(), "IndexError"),
        (OSError("no disk"), "no disk"),
    ],
)
def test_any_error_of_one_item_is_reported(folder, raised, told):  # noqa: F811
    class Odd(Table):
        def score_batch(self, rows, batch_size=8):
            if any("endless" in row["completions"] for row in rows):
                raise raised
            return super().score_batch(rows, batch_size)

    good, bad = record(["good", "bad"], [1, -1]), record(["endless"], [1], question="How few?")
    with pytest.warns(UserWarning, match="1 of 2 items could not be scored"):
        results = evaluate_model(Odd(SCORES), write(folder, good, bad), 0.5)
    assert results["benchmark"]["failed"] == [{"id": "DynaMath:1", "error": told}]
    with pytest.raises(ValueError, match="none of 2 items could be scored; first, DynaMath:0: "):
        evaluate_model(Odd(SCORES), write(folder, bad, {**bad, "question": "Why?"}), 0.5)


def test_a_model_without_eyes_is_told_before_scoring(folder, tiny_folders, monkeypatch):  # noqa: F811
    model, tokenizer = load_model(tiny_folders["qwen2"]), load_processing_class(tiny_folders["qwen2"], False)
    add_marker(model, tokenizer, StepFormat())
    monkeypatch.setattr(ProcessRewardModel, "score_batch", lambda *args, **kwargs: pytest.fail("scored for hours"))
    with pytest.raises(ValueError, match="all 4 items have images, and this model, or its step_format, reads none"):
        evaluate_model(ProcessRewardModel(model, tokenizer), four_items(folder))


class Broken:
    def __init__(self, scores):
        self.scores = scores

    def score_batch(self, rows, batch_size=8):
        return self.scores


@pytest.mark.parametrize(
    ("scores", "failed"),
    [
        ([[0.5], [0.5] * 2, [0.5] * 2, [0.5] * 2], "DynaMath:0: expected 3 scores in .0, 1., one per step, got .0.5."),
        ([[0.5, 0.5, 1.5], [0.5] * 2, [0.5] * 2, [0.5] * 2], "DynaMath:0: expected 3 scores in .0, 1."),
        ([[0.5] * 3, [0.5, float("nan")], [0.5] * 2, [0.5] * 2], "DynaMath:1: expected 2 scores"),
    ],
)
def test_scores_that_are_none_count_as_failed(folder, scores, failed):  # noqa: F811
    with pytest.warns(UserWarning, match=f"1 of 4 items could not be scored; first, {failed}"):
        assert evaluate_model(Broken(scores), four_items(folder), 0.5)["n_solutions"] == 3


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.5, 0.5]], "the model scored 1 rows, expected 4"),
        ([[7], [7], [7], [7]], "none of 4 items could be scored; first, DynaMath:0: expected 3 scores"),
    ],
)
def test_a_model_that_returns_nonsense_leaves_no_results(folder, scores, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        evaluate_model(Broken(scores), four_items(folder), output_dir=folder / "results")
    assert not list((folder / "results").glob("[!.]*"))


def test_what_cannot_be_measured_fails_before_scoring(folder):  # noqa: F811
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


def test_chunks_hold_whole_questions_and_records_keep_the_order():
    items = items_of(20, group_size=3)
    shuffled = [items[index] for index in np.random.default_rng(0).permutation(20)]
    model = Table(SCORES)
    records = score_items(model, shuffled, batch_size=1)
    assert [record["id"] for record in records] == [item["id"] for item in shuffled]
    chunks = [{next(item["group"] for item in items if item["id"] == name) for name in call} for call in model.calls]
    assert len(model.calls) > 1 and sum(map(len, chunks)) == len({item["group"] for item in items})
    assert min(len(call) for call in model.calls[:-1]) >= 4


KILLED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from helpers import Steady, items_of
from trl_mprm.evaluation.benchmarks import Benchmark
from trl_mprm.evaluation.run import evaluate_model

evaluate_model(Steady(sys.argv[2], seconds=0.2), Benchmark("", items_of(200), []), 0.5, 2, sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
    benchmark, output = Benchmark("", items_of(200), []), tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, Path(__file__).parents[1], tmp_path / "log", output]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (parts := [p for p in output.glob(".*.part") if p.stat().st_size > 500]):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [path for path in output.iterdir()] == parts  # no results yet, under any other name
    first = (tmp_path / "log").read_text().splitlines()
    assert 0 < len(first) < 200

    with open(parts[0], "ab") as part:
        part.write(b'{"id": "a:9", "scores": [0.')  # a write that was cut short
    results = evaluate_model(Steady(tmp_path / "log"), benchmark, 0.5, 2, output)
    again = (tmp_path / "log").read_text().splitlines()[len(first) :]
    # Every item is scored; of those that were scored before, at most the last chunk is scored twice.
    assert set(first) | set(again) == {item["id"] for item in benchmark.items}
    assert len(set(first) & set(again)) <= 8 and len(again) < 200
    whole = evaluate_model(Steady(tmp_path / "log"), benchmark, 0.5, 2, tmp_path / "whole")
    assert results == whole
    assert {path.name for path in output.iterdir()} == {"results.json", "scores.jsonl"}
    for name in ("results.json", "scores.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Stops(Table):
    """Breaks down at its third call."""

    def score_batch(self, rows, batch_size=8):
        if len(self.calls) == 2:
            raise KeyboardInterrupt
        return super().score_batch(rows, batch_size)


def interrupted(folder, items, batch_size=1):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        score_items(Stops(SCORES), items, batch_size, folder)


def test_only_the_same_items_and_settings_continue(tmp_path):
    items = items_of(16)

    def scored(items, batch_size=1, model=None):
        interrupted(tmp_path, items_of(16))
        model = model or Stops.__new__(Stops)
        model.scores, model.calls = SCORES, [None] * 3  # counts, and does not break down
        score_items(model, items, batch_size, tmp_path)
        for part in tmp_path.glob(".*.part"):
            part.unlink()
        return sum(map(len, model.calls[3:]))

    assert scored(items) == 8
    assert scored(items, batch_size=2) == 16
    assert scored([{**item, "prompt": item["prompt"] + "?"} for item in items]) == 16
    assert scored([{**item, "group": "g" + item["group"]} for item in items]) == 16
    assert scored(items, model=Table({})) == 16


def test_what_failed_is_tried_again(tmp_path):
    items = items_of(8)
    items[1]["completions"] = ["good", "endless"]
    with pytest.raises(KeyboardInterrupt):
        score_items(type("Stops", (Stops,), {"__qualname__": "M"})(SCORES), items, 1, tmp_path)
    model = type("Table", (Table,), {"__qualname__": "M"})(SCORES | {"endless": 0.4})
    records = score_items(model, items, 1, tmp_path)
    assert records[1]["scores"] == [0.9, 0.4] and "error" not in records[1]


def save_prm(folder, base):  # noqa: F811
    """A process reward model that was never trained, on disk."""
    model, processor = load_model(base), load_processing_class(base, True)
    add_marker(model, processor, StepFormat())
    ProcessRewardModel(model, processor).save_pretrained(folder)
    return str(folder)


def big_benchmark(folder):  # noqa: F811
    lines = []
    for index in range(24):
        steps = [f"tile {number} of {index}" for number in range(1 + index % 4)]
        labels = [(1, -1, 0)[(index + number) % 3] for number in range(len(steps))]
        color = ("red", "blue")[index % 2]
        lines.append(
            record(steps, labels, question=f"How many of {index // 2}?", image=[f"images/{color}.png"])
            | {"data_source": ("DynaMath", "WeMath")[index // 2 % 2]}
        )
    lines.append({**lines[0], "question": "One <|image_pad|> more?"})  # the model refuses a special token
    # Header and end mark of this picture are whole; that its middle is broken shows when it is decoded.
    Image.effect_noise((300, 300), 80).save(folder / "images" / "broken.png")
    data = (folder / "images" / "broken.png").read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    (folder / "images" / "broken.png").write_bytes(data[:second] + b"\0\1\2\3" + data[second + 4 :])
    lines.append({**lines[1], "image": ["images/broken.png"]})
    return write(folder, *lines)


def test_all_that_decides_a_score_is_part_of_the_fingerprint(folder, tiny_folders, tmp_path):  # noqa: F811
    items = read_benchmark(big_benchmark(folder)).items
    path = save_prm(tmp_path / "prm", tiny_folders["qwen2_5_vl"])
    shutil.copytree(path, tmp_path / "moved")
    before = fingerprint(ProcessRewardModel.from_pretrained(path), items, 2)
    prm = ProcessRewardModel.from_pretrained(tmp_path / "moved")
    assert before == fingerprint(prm, items, 2) != fingerprint(prm, items, 4)

    weight, processor = next(iter(prm.model.parameters())).data.flatten(), prm.processing_class
    last = weight[-1].item()  # beyond the first values of its tensor
    weight[-1] += 1e-3
    assert before != fingerprint(prm, items, 2)
    weight[-1] = last
    assert before == fingerprint(prm, items, 2)
    template = processor.chat_template
    processor.chat_template = "Be strict. " + template
    assert before != fingerprint(prm, items, 2)
    processor.chat_template = template
    size = processor.image_processor.size["longest_edge"]
    processor.image_processor.size["longest_edge"] = size // 2
    assert before != fingerprint(prm, items, 2)
    processor.image_processor.size["longest_edge"] = size
    assert before == fingerprint(prm, items, 2)
    # Candidates of best-of-N are grouped by line: another picture under the same name shows in its bytes alone.
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8), "green").save(other)
    assert before != fingerprint(prm, [items[0] | {"images": [str(other)]}, *items[1:]], 2)


def test_junk_in_a_progress_file_is_named(tmp_path):
    items = items_of(16)
    interrupted(tmp_path, items)
    (part,) = tmp_path.glob(".*.part")
    part.write_bytes(part.read_bytes() + b"\0junk\n")
    n_lines = part.read_bytes().count(b"\n")
    message = rf"{re.escape(str(part))}, line {n_lines}: expected the scores of an item, .* delete the file"
    with pytest.raises(ValueError, match=message):
        score_items(Stops(SCORES), items, 1, tmp_path)


TWO = """
import sys
from accelerate import PartialState
from trl_mprm import ProcessRewardModel
from trl_mprm.cli import main
from trl_mprm.evaluation.run import score_items

assert PartialState(cpu=True).num_processes == 2
try:
    score_items(ProcessRewardModel.from_pretrained(sys.argv[3]), [])
except ValueError as error:
    print(error)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_score_what_one_does(folder, tiny_folders, tmp_path, capsys):  # noqa: F811
    prm = save_prm(tmp_path / "prm", tiny_folders["qwen2_5_vl"])
    argv = ["evaluate", "--model", prm, "--data", str(big_benchmark(folder)), "--batch-size", "1", "--output"]
    # `accelerate launch --cpu --num_processes 2` would start one process, and leave more to MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "two.py").write_text(TWO)
    argv_of_two = [*launch, tmp_path / "two.py", *argv, tmp_path / "two"]
    done = subprocess.run(argv_of_two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes need a folder to bring their scores together: set --output") == 2
    with pytest.warns(UserWarning, match="2 of 26 items could not be scored; first, DynaMath:24: .*special token"):
        assert main([*argv, str(tmp_path / "one")]) == 0
    # One table, by one process.
    assert done.stdout.count("overall, pooled (VisualPRM)") == capsys.readouterr().out.count("overall, pooled") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 26 and one[-2]["scores"] is one[-1]["scores"] is None
    for a, b in zip(one[:-2], two[:-2], strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-6)
        assert {**a, "scores": None} == {**b, "scores": None}


# ---- the command


def test_the_command_writes_everything(folder, tiny_folders, tmp_path, capsys):  # noqa: F811
    prm = save_prm(tmp_path / "prm", tiny_folders["qwen2_5_vl"])
    (tmp_path / "prm" / "README.md").write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    argv = ["evaluate", "--model", prm, "--benchmark", "visualprocessbench", "--data", str(big_benchmark(folder))]
    argv += ["--threshold", "oracle", "--output"]
    with pytest.warns(UserWarning, match="2 of 26 items could not be scored"):
        assert main([*argv, str(tmp_path / "one")]) == 0
        other = ["--compare", str(tmp_path / "one" / "scores.jsonl"), "--update-card"]
        assert main([*argv, str(tmp_path / "two"), *other]) == 0
    printed = capsys.readouterr().out
    assert "not scored: DynaMath:24: row DynaMath:24: the prompt contains the special token" in printed
    assert "not scored: DynaMath:25: " in printed and "broken PNG file" in printed
    assert printed.count("figures in percent; oracle threshold") == 2
    assert (
        max(map(len, printed.split("not scored")[0].splitlines())) <= 100
        and f"card: {tmp_path / 'prm' / 'README.md'}" in printed
    )
    names = {"evaluation.html", "results.json", "results.md", "scores.jsonl"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert {test["p_value"] for test in results["comparison"]["tests"].values()} == {1.0}
    card = ModelCard.load(tmp_path / "prm" / "README.md")
    assert card.data.model_name == "prm"
    title = "VisualProcessBench, other data (2 of 26 items not scored)"
    assert card.data.eval_results[0].dataset_name == title
    assert not (tmp_path / "prm" / ".eval_results").exists()
    # The same scores as without a command, and the words of before.
    prm = ProcessRewardModel.from_pretrained(prm)
    first = read_benchmark(folder).items[0]
    kept = json.loads((tmp_path / "one" / "scores.jsonl").read_text().splitlines()[0])
    assert kept["scores"] == pytest.approx(prm.score(first["images"], first["prompt"], first["completions"]), abs=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no model to evaluate: name a Hub id or folder with --model"),
        (["--model", "m", "--compare", "x"], "--compare needs a folder for the results: set --output"),
        (["--model", "m", "--update-card"], "--update-card needs a folder for the results: set --output"),
        (
            ["m", "--update-card", "--output", "o"],
            "--update-card: m has no README.md; expected the folder of a trained",
        ),
        (
            ["m", "--compare", "none.jsonl", "--output", "o"],
            "none.jsonl: no such file; expected a scores.jsonl written",
        ),
        (["--model", "m", "--data", "none.jsonl"], "none.jsonl: no such file; expected a file or a folder with test"),
        (["--model", "m", "--benchmark", "best-of-n"], "best-of-n has no dataset on the Hub: name a file or folder"),
        (["m", "someone/none", "--benchmark", "prmbench"], "someone/none: no such file or folder here, and the Hub"),
        (["m", "x", "--output", __file__], "test_evaluation.py is a file, expected a folder for scores and reports"),
    ],
)
def test_bad_input_of_the_command_is_one_line(argv, message, capsys):
    assert main(["evaluate", *argv]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--threshold", "foo", "held_out, oracle or a number"),
        ("--batch-size", "0", "a whole number of at least 1"),
        ("--batch-size", "two", "a whole number of at least 1"),
    ],
)
def test_bad_values_of_flags(flag, value, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "m", flag, value])
    assert f"error: argument {flag}: expected {expected}, got {value!r}" in capsys.readouterr().err


EARLY = """
import sys
from trl_mprm.cli import main

code = main(["evaluate", "no/such-model", *sys.argv[1:]])
sys.exit(10 * code + ("torch" in sys.modules))
"""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threshold", "7"], 'threshold must be "held_out", "oracle" or a number in [0, 1], got 7.0'),
        (["--output", "out", "--compare", "other.jsonl"], "item DynaMath:1 has other labels in other.jsonl than in"),
    ],
)
def test_what_the_benchmark_refuses_is_told_before_torch_is_imported(folder, argv, message):  # noqa: F811
    four_items(folder)
    record = {"id": "DynaMath:1", "labels": [1, -1], "scores": [0.5, 0.5], "source": "DynaMath", "group": "g"}
    (folder / "other.jsonl").write_text(json.dumps(record) + "\n")
    argv = [sys.executable, "-c", EARLY, "test.jsonl", *argv]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 20 and message in done.stderr and done.stderr.count("error: ") == 1


def test_a_reader_that_has_gone_costs_no_report(tmp_path, tiny_folders, monkeypatch):
    """`evaluate ... | head -1` and an ASCII terminal once ended in exit code 2, without a report; a base is zero-shot."""
    row = {"id": "a-0", "generator": "Qwen", "problem": "2+2?", "steps": ["two", "five"], "label": 1}
    data = tmp_path / "café\x1b[31m.json"
    data.write_text(json.dumps([row, row | {"id": "a-1", "label": -1}]))
    argv = ["evaluate", tiny_folders["qwen2"], str(data), "--benchmark", "processbench", "--output"]
    read, write_end = os.pipe()
    with open(write_end, "w", encoding="ascii") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        assert main([*argv, str(tmp_path / "one")]) == 0
    with open(read) as reader:
        said = reader.read()
    assert f"{Path(tiny_folders['qwen2']).name}, zero-shot on ProcessBench, other data" in said
    assert "caf??[31m" in said and "\x1b" not in said
    assert ", zero-shot on ProcessBench" in (tmp_path / "one" / "results.md").read_text()

    read, write_end = os.pipe()
    os.close(read)
    with open(write_end, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        assert main([*argv, str(tmp_path / "two")]) == 0
    assert {"results.md", "evaluation.html"} < {path.name for path in (tmp_path / "two").iterdir()}


def test_a_table_fits_a_page_and_its_names_stay_text(capsys):
    print_table([["source", "n"], ["long " * 40, 1], ["a\x1b[2J\nb", 2]])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) == 100 and "long…" in printed.replace(" …", "…")
    assert "a\ufffd[2J b" in printed and "\x1b" not in printed


# ---- the other benchmarks


def test_processbench_is_measured_as_its_paper_does(tmp_path):
    processbench(tmp_path, label=0)
    benchmark = read_benchmark(tmp_path, name="processbench")
    # "b" is taken for wrong everywhere: right for label 1, wrong for the solutions with label -1 and 0.
    results = evaluate_model(Table({"a": 0.9, "b": 0.1, "c": 0.9}), benchmark, 0.5)
    gsm8k = results["sources"]["gsm8k"]
    assert (gsm8k["first_error_accuracy_erroneous"], gsm8k["first_error_accuracy_correct"]) == (0.5, 0.0)
    assert gsm8k["processbench_f1"] == 0.0
    assert results["processbench_f1_source_mean"] == 0.0  # the other subsets hold no correct solution
    results = evaluate_model(Table({"a": 0.9, "b": 0.6, "c": 0.9}), benchmark, 0.5)
    assert results["sources"]["gsm8k"]["first_error_accuracy_correct"] == 1.0


def test_prmbench_scores_are_among_the_results(tmp_path):
    rows = [
        {
            "original_question": f"{kind}?",
            "modified_question": "2+2?",
            "modified_process": ["good", "bad"],
            "error_steps": [] if kind == "multi_solutions" else [2],
            "idx": "0",
            "classification": kind,
        }
        for kind in ("redundency", "circular", "multi_solutions")
    ]
    (tmp_path / "prmbench_preview.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = read_benchmark(tmp_path, name="prmbench")
    results = evaluate_model(MODEL, benchmark, 0.5, output_dir=tmp_path / "results")
    assert results["prmbench"] == prmbench_scores(results)
    # Correct steps: 3 found, 1 (the second of multi_solutions) taken for wrong; wrong steps: 2 found.
    assert results["prmbench"]["overall"] == pytest.approx((2 * 3 / (2 * 3 + 1) + 2 * 2 / (2 * 2 + 1)) / 2)
    assert results["prmbench"]["multi_solutions"] == pytest.approx(2 / 3) and results["prmbench"]["simplicity"] == 1.0
    results["benchmark"]["hub_id"] = "hitsmy/PRMBench_Preview"
    records = [json.loads(line) for line in (tmp_path / "results" / "scores.jsonl").read_text().splitlines()]
    report = results_markdown(results, records, "tiny")
    assert "| **tiny** | **82.86** | **100.00** | **100.00** | **-** |" in report
    assert "| ReasonEval-7B | 60.0 | 61.0 | 50.1 | 62.1 |" in report


@pytest.fixture
def candidates(folder):  # noqa: F811
    good, bad = {"steps": ["good", "so-so"], "correct": True}, {"steps": ["bad", "good"], "correct": False}
    lines = [best_of_n_line(bad, good), best_of_n_line(good, bad, source="tiles", images=[])]
    endless = best_of_n_line(good, {"steps": ["endless"], "correct": False})
    (folder / "bon.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, endless]))
    return folder / "bon.jsonl"


def test_best_of_n_is_measured_by_question(candidates):
    benchmark = read_benchmark(candidates, name="best-of-n")
    output = candidates.parent / "results"
    with pytest.warns(UserWarning, match="1 of 6 items could not be scored; first, bon:2:1"):
        results = evaluate_model(MODEL, benchmark, output_dir=output)
    # The question of the candidate that could not be scored is left out: its best is not known.
    expected = best_of_n_metrics(
        [False, True, True, False],
        [[0.2, 0.9], [0.9, 0.6], [0.9, 0.6], [0.2, 0.9]],
        ["bon:0", "bon:0", "bon:1", "bon:1"],
        ["bon", "bon", "tiles", "tiles"],
    )
    assert {key: value for key, value in results.items() if key != "benchmark"} == expected
    assert (results["accuracy_mean"], results["accuracy_last"], results["pass_at_1"]) == (1.0, 0.0, 0.5)
    assert recompute_metrics(output / "scores.jsonl") == expected
    paths = write_report(output, benchmark, "tiny")
    assert "| best of N by mean | 100.00 |" in paths[0].read_text()
    page = paths[1].read_text()
    assert [path.name for path in paths] == ["results.md", "evaluation.html"]
    assert page.count("<details") == 5 and page.count("<details open>") == 3  # the best candidate of each is open
    with pytest.raises(ValueError, match="two models are compared by their step labels, and best-of-N has none"):
        write_report(output, benchmark, "tiny", compare=output / "scores.jsonl")


# ---- what people read


def test_table_leaves_undefined_open():
    metrics = step_metrics([[1, 1], [1, -1]], [[0.9, 0.9], [0.9, 0.1]], ["a", "b"], n_resamples=0)
    assert table_rows(metrics) == [
        ["source", "steps", "F1 correct", "F1 incorrect", "macro-F1", "95% interval"],
        ["a", "2", "100.00", "-", "-", "-"],
        ["b", "2", "100.00", "100.00", "100.00", "-"],
        ["overall, step-weighted (the paper)", "4", "-", "-", "100.00", "-"],
        ["overall, pooled (VisualPRM)", "4", "-", "-", "100.00", "-"],
        ["overall, mean of sources", "4", "-", "-", "100.00", "-"],
    ]


def visualprocessbench_records(seed=0):
    """As many labelled steps as VisualProcessBench has, by source, with scores that know something of the labels."""
    generator = np.random.default_rng(seed)
    records = []
    for source, (correct, incorrect) in VISUALPROCESSBENCH_STEPS.items():
        labels = generator.permutation([1] * correct + [-1] * incorrect)
        scores = 1 / (1 + np.exp(-labels * 0.5 - generator.normal(0.8, 1, len(labels))))
        for index, (part, score) in enumerate(
            zip(np.array_split(labels, 400), np.array_split(scores, 400), strict=True)
        ):
            records.append(
                {
                    "id": f"{source}:{index}",
                    "source": source,
                    "group": f"{source} {index // 4}",
                    "labels": part.tolist(),
                    "scores": score.tolist(),
                }
            )
    return records


def section(report, source):
    (own,) = [part for part in report.split("\n## ") if part.startswith(f"Beside {source}")]
    return own


def test_markdown_stands_beside_published_rows_in_their_own_convention():
    records = visualprocessbench_records()
    columns = [[record[key] for record in records] for key in ("labels", "scores", "source", "group")]
    measured = {threshold: step_metrics(*columns, threshold=threshold, n_resamples=0) for threshold in (0.5, "oracle")}
    report = {
        "name": "visualprocessbench",
        "title": "VisualProcessBench",
        "refused": {},
        "failed": [],
        "quirks": {"neutral_steps": 2674},
    }
    report["hub_id"] = "OpenGVLab/VisualProcessBench"
    results = {**measured[0.5], "benchmark": report, "n_solutions": 2866}
    text = results_markdown(results, records, "tiny")
    assert "figures in percent. Threshold: set beforehand" in text and "2,674 neutral steps" in text

    paper = section(text, "Training Data Efficiency")
    # The paper's convention: step-weighted, and the threshold tuned on the test items, whatever this run was asked for.
    overall = f"{100 * measured['oracle']['macro_f1_step_weighted']:.2f}"
    assert f"| **tiny** | **{overall}** |" in paper and "Threshold of all rows: tuned on the same items" in paper
    assert "| InternVL2.5-8B BIS-10% | 65.46 | 66.90 | 65.07 | 63.35 | 65.56 | 65.10 |" in paper
    assert "VisualPRM-8B" not in paper and "solutions, the others on" not in paper
    rows = [line.replace("*", "").split(" | ") for line in paper.splitlines() if line.startswith("| ")]
    figures = [float(row[1]) for row in rows[2:]]
    assert figures == sorted(figures, reverse=True) and len(figures) == 15

    visualprm = section(text, "VisualPRM")
    overall = f"{100 * measured[0.5]['macro_f1_pooled']:.2f}"
    assert f"| **tiny** | **{overall}** |" in visualprm and "(pooled)" in visualprm
    assert "Threshold of the published rows: not stated by the source; of this model: set beforehand" in visualprm
    assert "| VisualPRM-8B | 62.0 | 62.1 | 61.0 | 58.5 | 62.7 | 61.8 |" in visualprm and "BIS" not in visualprm


def test_published_rows_stand_only_beside_the_published_data(folder):  # noqa: F811
    """Twenty toy items once put a random model above a published one, in bold."""
    output = folder / "results"
    results = evaluate_model(MODEL, four_items(folder), 0.5, output_dir=output)
    records = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    text = results_markdown(results, records, "tiny")
    assert "## Beside" not in text and "InternVL2.5-8B" not in text and "**" not in text
    assert "The published rows stand on the 2,866 records of OpenGVLab/VisualProcessBench, and this run read 4" in text
    results["benchmark"]["hub_id"] = "OpenGVLab/VisualProcessBench"  # all were read, and some could not be scored
    results["n_solutions"] = 2860
    text = results_markdown(results, records, "tiny")
    assert text.count("The row of this model is based on 2,860 solutions, the others on 2,866.") == 2


def test_the_title_says_what_is_missing(folder):  # noqa: F811
    with pytest.warns(UserWarning, match="lines refused"):
        benchmark = read_benchmark(write(folder, *[GOOD] * 2863, *[record(["good", ""], [1, 1])] * 3))
    assert benchmark.hub_id == "OpenGVLab/VisualProcessBench"
    assert benchmark.title == "VisualProcessBench (3 of 2,866 records refused)"
    assert benchmark.titled(2) == "VisualProcessBench (3 of 2,866 records refused, 2 of 2,863 items not scored)"


def test_names_cannot_break_a_report(folder):  # noqa: F811
    name = "a\n# b <img src=x onerror=alert(1)> [c](javascript:d) `e` **f**|g"
    rows = [record(["good", "bad"], [1, -1], question=f"{i}?", data_source=f"{name} {i % 2}") for i in range(4)]
    benchmark = read_benchmark(write(folder, *rows))
    evaluate_model(MODEL, benchmark, 0.5, output_dir=folder / "results")
    (folder / name.replace("/", "")).mkdir()
    other = folder / name.replace("/", "") / "scores.jsonl"
    other.write_bytes((folder / "results" / "scores.jsonl").read_bytes())
    text = write_report(folder / "results", benchmark, name, compare=other)[0].read_text().split("\n---\n", 1)[1]
    safe = (
        "a # b &lt;img src=x onerror=alert(1)&gt; &#91;c&#93;(javascript:d) &#96;e&#96; &#42;&#42;f&#42;&#42;&#124;g"
    )
    assert text.lstrip().startswith(f"# {safe} on VisualProcessBench") and f"## Against {safe}\n" in text
    assert f"| {safe} 0 | 4 |" in text
    assert not re.search(r"<img|\n# b|\[c\]|`e`", text)


def test_published_tables_keep_conventions_apart():
    for tables in TABLES.values():
        for table in tables:
            assert table.source and table.convention and {len(row) for row in table.rows} == {2 + len(table.columns)}
            assert set(table.headline) <= {row[0] for row in table.rows}
    names = [{row[0] for row in table.rows} for table in TABLES["visualprocessbench"]]
    assert not names[0] & names[1]


@pytest.fixture
def evaluated(folder):  # noqa: F811
    """An evaluation with pictures, text that looks like HTML, a refused line and an item that fails."""
    Image.effect_noise((1500, 1000), 80).convert("RGBA").save(folder / "images" / "huge.png")
    write(
        folder,
        record(["good", "so-so", "bad"], [1, 0, -1], image=["images/huge.png", "images/red.png"]),
        record(["good", "bad"], [1, 1], question="<script>alert(1)</script> & \u202eso?", data_source="WeMath<b>")
        | {"policy_model": "GPT\ud800"},
        record(["good", "so-so"], [1, -1], question="Which?", data_source="WeMath<b>"),
        record(["endless"], [1], question="When?"),
        {**GOOD, "image": ["images/none.png"]},
    )
    with pytest.warns(UserWarning, match="1 lines refused"):
        benchmark = read_benchmark(folder)
    with pytest.warns(UserWarning, match="could not be scored"):
        evaluate_model(MODEL, benchmark, 0.5, output_dir=folder / "results")
    return folder / "results", benchmark


def test_page(evaluated):
    output, benchmark = evaluated
    page = write_report(output, benchmark, "someone/tiny")[1].read_text()
    # Nothing is loaded and nothing runs: pictures are data, and the texts of the benchmark are escaped.
    assert "default-src 'none'" in page and not re.search(r"https?://|<script|src=\"(?!data:)|url\(", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so?" in page and "WeMath&lt;b&gt;" in page
    assert str(output.parent) not in page and len(page) < 200_000  # thumbnails of a picture of 1500 x 1000 pixels
    assert page.count("<img ") == 4 and page.count('<article class="card') == 3
    # Human labels, scores, the first error, and the verdicts: found, false alarm, missed.
    assert page.count('title="labelled correct"') == 4 and page.count('title="no label"') == 1
    assert page.count("<mark>first error</mark>") == 2 and page.count('class="reported"') == 2
    assert re.findall(r'data-verdict="(\w+)"', page).count("found") == 1
    assert set(re.findall(r'data-verdict="(\w+)"', page)) == {"found", "false", "missed"}
    assert "refused, test.jsonl line 5: image missing" in page
    assert "could not be scored, DynaMath:3: row has the step" in page
    # Marks and words beside the colours, three decimals, and pictures with their dimensions.
    assert page.count("✗ false alarm") == 1 and page.count("✓ first error found") == 1 and page.count(">0.900<") == 3
    assert page.count('<span class="wrong">missed</span>') == page.count('<span class="wrong">false alarm</span>') == 1
    assert re.findall(r'(width="\d+" height="\d+")', page)[0] == 'width="400" height="267"' and "lazy" not in page
    # A rule of CSS for each filter.
    assert page.count("main:has(#source-") == 2 and page.count("main:has(#verdict-") == 3


def test_the_worst_are_those_that_are_judged_worst(folder):
    """A wrong verdict first, then steps on the wrong side of the threshold; scores on the right side are never worst."""
    unsure = {f"right {number}": 0.51 for number in range(40)}  # far from the label, but judged rightly
    items = [
        {"id": f"a:{name}", "source": "a", "group": name, "images": [], "prompt": "?", "completions": steps,
         "labels": labels, "policy_model": None}
        for name, steps, labels in [
            *[(name, [name], [1]) for name in unsure],
            ("missed", ["good", "so-so"], [1, -1]),
            ("late", ["bad", "good", "good"], [-1, -1, -1]),
            ("false", ["good", "good", "good", "bad"], [1, 1, 1, 1]),
        ]
    ]  # fmt: skip
    benchmark = Benchmark("", items, [])
    evaluate_model(Table(SCORES | unsure), benchmark, 0.5, output_dir=folder / "results")
    page = write_report(folder / "results", benchmark, "tiny")[1].read_text()
    cards = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    worst = [re.search(r'dir="auto">a:(.*?)<', card).group(1) for card in cards if "among the worst judged" in card]
    assert worst == ["missed", "false", "late"] and len(cards) == 43
    assert "2 of 3 steps judged wrongly" in cards[2]


def test_the_worst_questions_are_those_where_a_correct_answer_lost(candidates):
    benchmark = read_benchmark(candidates, name="best-of-n")
    output = candidates.parent / "results"
    with pytest.warns(UserWarning, match="could not be scored"):
        evaluate_model(Table({"good": 0.1, "so-so": 0.2, "bad": 0.9}), benchmark, output_dir=output)
    page = write_report(output, benchmark, "tiny")[1].read_text()
    cards = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    assert ["among the worst judged" in card for card in cards] == ["✗ wrong answer" in card for card in cards]
    assert sum("among the worst judged" in card for card in cards) == 2


def test_page_is_bounded(folder):  # noqa: F811
    items = items_of(400, group_size=1)
    for item in items:
        item["images"] = [str(folder / "images" / "red.png")]
    results = evaluate_model(MODEL, Benchmark("", items, []), 0.5, output_dir=folder / "results")
    page = write_report(folder / "results", Benchmark("", items, []), "tiny")[1].read_text()
    assert results["n_solutions"] == 400 and page.count('<article class="card') == 60
    assert "60 of 400, the same number from each source" in page
    assert len(re.findall('<article [^>]*data-source="1"', page)) == 30


def test_results_of_a_benchmark_go_into_cards(evaluated, tmp_path):
    output, benchmark = evaluated
    results = json.loads((output / "results.json").read_text())
    # Results on other data do not go to the leaderboard of the published dataset.
    markdown, _ = write_report(output, benchmark, "someone/tiny")
    front = ModelCard.load(markdown).data.eval_results
    assert {(each.dataset_type, each.dataset_name) for each in front} == {(results["benchmark"]["title"],) * 2}
    assert front[0].dataset_name == (
        "VisualProcessBench, other data (1 of 5 records refused, 1 of 4 items not scored)"
    )
    published = Benchmark(benchmark.path, benchmark.items, benchmark.refused * (2866 - len(benchmark.items)))
    markdown, _, eval_results = write_report(output, published, "someone/tiny")
    entries = parse_eval_result_entries(yaml.safe_load(eval_results.read_text()))
    assert eval_results.relative_to(output).as_posix() == ".eval_results/visualprocessbench.yaml"
    assert {entry.dataset_id for entry in entries} == {"OpenGVLab/VisualProcessBench"}
    values = {entry.task_id: entry.value for entry in entries}
    assert values["macro_f1_pooled"] == round(results["macro_f1_pooled"], 4) and values["auc"] == round(
        results["auc"], 4
    )
    assert "threshold: fixed" in entries[0].notes
    front = ModelCard.load(markdown).data.eval_results
    assert {(each.metric_type, each.metric_value) for each in front} == set(values.items())

    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# Tiny\n\nText stays.\n")
    earlier = {**results, "auc": 0.1}
    for metrics in (earlier, results):
        path = add_eval_results(
            model, "visualprocessbench", "VisualProcessBench", "OpenGVLab/VisualProcessBench", metrics
        )
    card = ModelCard.load(path)
    assert "Text stays." in card.text and card.data.license == "mit" and card.data.model_name == "model"
    assert {(each.metric_type, each.metric_value) for each in card.data.eval_results} == set(values.items())
    assert (model / ".eval_results" / "visualprocessbench.yaml").read_text() == eval_results.read_text()
    with pytest.raises(FileNotFoundError, match=r"README\.md: no such file; expected the card"):
        add_eval_results(tmp_path, "visualprocessbench", "VisualProcessBench", None, results)


def test_two_models_are_compared_on_what_both_scored(folder):  # noqa: F811
    benchmark = read_benchmark(four_items(folder))
    evaluate_model(MODEL, benchmark, 0.5, output_dir=folder / "one")
    evaluate_model(Table({"good": 0.6, "so-so": 0.6, "bad": 0.6}), benchmark, 0.5, output_dir=folder / "other")
    tests = compare_models(folder / "one" / "scores.jsonl", folder / "other" / "scores.jsonl", 0.5)
    one, other = (json.loads((folder / name / "results.json").read_text()) for name in ("one", "other"))
    for name, test in tests.items():
        assert (test["first"], test["second"]) == pytest.approx((one[name], other[name]))
    write_report(folder / "one", benchmark, "tiny", compare=folder / "other" / "scores.jsonl")
    assert json.loads((folder / "one" / "results.json").read_text())["comparison"] == {
        "other": "other",
        "tests": tests,
    }
    text = (folder / "one" / "results.md").read_text()
    assert "## Against other" in text and f"| AUC | {100 * one['auc']:.2f} | 50.00 | " in text

    lines = (folder / "other" / "scores.jsonl").read_text()
    (folder / "other" / "scores.jsonl").write_text(lines.replace('"labels": [1, 1]', '"labels": [1, -1]'))
    with pytest.raises(ValueError, match="item DynaMath:1 has other labels in"):
        compare_models(folder / "one" / "scores.jsonl", folder / "other" / "scores.jsonl")
    (folder / "other" / "scores.jsonl").write_text(lines.replace('"DynaMath:', '"X:').replace('"WeMath:', '"X:'))
    with pytest.raises(ValueError, match="no item of .* is in"):
        compare_models(folder / "one" / "scores.jsonl", folder / "other" / "scores.jsonl")


# ---- a benchmark of one's own


def test_a_new_benchmark_is_one_entry(tmp_path, monkeypatch, capsys):
    def read(record, stem, index, finder, quirks):
        steps, labels = record["solution"], [1 if good else -1 for good in record["good"]]
        item = {"id": str(index), "images": [], "prompt": record["task"], "completions": steps, "labels": labels}
        return [item | {"source": stem, "group": record["task"]}]

    entry = BenchmarkEntry("Riddles", read, headlines=("auc", "brier"), files=("riddles.jsonl",))
    monkeypatch.setitem(BENCHMARKS, "riddles", entry)
    rows = [{"task": f"{number}?", "solution": ["good", "bad"], "good": [True, number > 0]} for number in range(4)]
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = read_benchmark(tmp_path, name="riddles")
    results = evaluate_model(MODEL, benchmark, benchmark.entry.threshold, output_dir=tmp_path / "out")
    assert (results["n_solutions"], results["n_incorrect"], results["threshold"]) == (4, 1, 0.5)
    markdown, page = (path.read_text() for path in write_report(tmp_path / "out", benchmark, "tiny"))
    assert "# tiny on Riddles" in markdown and "## Beside" not in markdown
    assert page.index("<dt>AUC</dt>") < page.index("<dt>Brier score</dt>") and "macro-F1, pooled" not in page
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "best-of-n,riddles}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
