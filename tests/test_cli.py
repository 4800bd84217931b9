"""The commands on real files and a tiny trained model: select, train, evaluate, score; and how they fail."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_rows, picture

import trl_mprm
from trl_mprm import ProcessRewardConfig, ProcessRewardModel
from trl_mprm.cli import main
from trl_mprm.cli.fields import train_fields
from trl_mprm.cli.preflight import check_train
from trl_mprm.cli.train import DataArguments


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """A folder of annotated rollouts in the raw schema: two sources, pictures beside them."""
    folder = tmp_path_factory.mktemp("rollouts")
    (folder / "images").mkdir()
    for source in "ab":
        lines = []
        for index, row in enumerate(make_rows(images=True, n=12)):
            paths = []
            for number, image in enumerate(row["images"]):
                paths.append(f"VisualPRM400K-v1.1-Raw/{source}-{index}-{number}.png")
                image.save(folder / "images" / Path(paths[-1]).name)
            steps = zip(row["completions"], row["labels"], strict=True)
            raw = {
                "image": paths,
                "question": "<image>\nSolve. " + row["prompt"],
                "question_orig": row["prompt"],
                "answer": "1",
                "response": "\n\n".join(row["completions"]),
                "steps_with_score": [
                    {"step": step, "score": score, "num_mc_correct": int(16 * score), "num_mc_total": 16}
                    for step, score in steps
                ],
                "num_mc_sequences": 16,
            }
            lines.append(json.dumps(raw))
        (folder / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(rollouts, tiny_folders, tmp_path_factory) -> str:
    """`trl-mprm select`, then `trl-mprm train` on what it kept."""
    kept, output = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("model")
    assert (
        main(["select", str(rollouts), "--fraction", "0.5", "--output", str(kept), "--image-root", str(rollouts)]) == 0
    )
    argv = {"dataset_name": kept, "image_root": rollouts, "model_name_or_path": tiny_folders["qwen2_5_vl"]}
    argv |= {"output_dir": output, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    assert main(["train", *(word for name, value in argv.items() for word in (f"--{name}", str(value)))]) == 0
    return str(output)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Six items in VisualProcessBench's format, and one that cannot be used."""
    folder = tmp_path_factory.mktemp("benchmark")
    lines = []
    for index, row in enumerate(make_rows(images=True, n=6)):
        row["images"] = row["images"] or [picture("green")]
        names = [f"{index}-{number}.png" for number in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(folder / name)
        correctness = [(1, -1, 0)[(index + number) % 3] for number in range(len(row["completions"]))]
        item = {
            "image": names,
            "question": row["prompt"],
            "answer": "1",
            "policy_model": "tiny",
            "data_source": "ab"[index % 2],
        }
        lines.append({**item, "response": {"steps": row["completions"], "process_correctness": correctness}})
    lines.append({**lines[0], "image": ["missing.png"]})
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_train_quotes_the_selection_it_was_given(trained):
    card = open(f"{trained}/README.md").read()
    assert "rule `bis`, fraction 0.5" in card and "| b | 12 | 0 | 12 | 6 |" in card


def test_evaluate(trained, benchmark, tmp_path, capsys):
    with pytest.warns(UserWarning, match="1 lines refused"):
        assert main(["evaluate", trained, str(benchmark), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "held_out threshold" in printed and "refused: 1 image_missing" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["threshold_protocol"] == "held_out" and results["n_solutions"] == 6
    first = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    row = make_rows(images=True, n=1)[0]
    prm = ProcessRewardModel.from_pretrained(trained)
    assert first["scores"] == pytest.approx(prm.score(row["images"], row["prompt"], row["completions"]), abs=1e-5)
    for threshold in ("oracle", "0.5"):
        with pytest.warns(UserWarning):
            assert main(["evaluate", trained, str(benchmark), "--threshold", threshold]) == 0
        assert {"oracle": "oracle", "0.5": "fixed"}[threshold] + " threshold" in capsys.readouterr().out


def test_score(trained, benchmark, capsys):
    steps = ["the tile 1 is red", "so it is 1"]
    argv = ["--image", str(benchmark / "0-0.png"), "--question", "How many?", "--step", steps[0], "--step", steps[1]]
    assert main(["score", trained, *argv]) == 0
    expected = ProcessRewardModel.from_pretrained(trained).score([benchmark / "0-0.png"], "How many?", steps)
    printed = capsys.readouterr().out
    assert all(f"{score:.4g}" in printed for score in expected)


def test_score_ranks_candidates(trained, benchmark, capsys):
    texts = ["the tile 1 is red\n\nso it is 1", "the tile 2 is blue", "three"]
    argv = ["--image", str(benchmark / "0-0.png"), "--question", "How many?", "--aggregate", "min"]
    argv += [word for text in texts for word in ("--candidate", text)]
    assert main(["score", trained, *argv]) == 0
    table = capsys.readouterr().out.splitlines()
    prm = ProcessRewardModel.from_pretrained(trained)
    ranking = prm.best_of_n([benchmark / "0-0.png"], "How many?", texts, "min", split="blank_line")
    assert [line.split()[1] for line in table[2:]] == [str(candidate.index + 1) for candidate in ranking]
    assert main(["score", trained, *argv, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["rank"] for record in records] == [
        1 + [candidate.index for candidate in ranking].index(number) for number in range(3)
    ]
    assert [record["score"] for record in sorted(records, key=lambda record: record["rank"])] == pytest.approx(
        [candidate.score for candidate in ranking], abs=1e-6
    )


def test_score_reads_rows_of_any_format(trained, rollouts, tmp_path, capsys, monkeypatch):
    """Raw annotations, rows without labels, candidates; from a file and, the same, from standard input."""
    raw = json.loads((rollouts / "a.jsonl").read_text().splitlines()[0])
    lines = [
        raw,
        {"prompt": "q", "completions": ["a", "b"], "mine": 7},
        {"prompt": "q", "completions": [" "]},
        {"prompt": "q", "completions": ["x" * 600]},
        {"prompt": "p", "candidates": [["a"], "b\n\nc", 3]},
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(line) + "\n\n" for line in lines) + "{\n")
    assert main(["score", trained, str(file), "--image-root", str(rollouts), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(record["step_scores"]) for record in records] == [len(raw["steps_with_score"]), 2, 1, 2]
    assert records[0]["image"] == raw["image"] and records[1]["mine"] == 7
    assert [record["rank"] for record in records[:2]] == [1, 1] and {record["rank"] for record in records[2:]} == {
        1,
        2,
    }
    steps = [step["step"] for step in raw["steps_with_score"]]
    prm = ProcessRewardModel.from_pretrained(trained)
    images = [rollouts / "images" / Path(path).name for path in raw["image"]]
    assert records[0]["step_scores"] == pytest.approx(prm.score(images, raw["question_orig"], steps), abs=1e-5)
    refused = [line for line in printed.err.splitlines() if line.startswith("refused: ")]
    assert refused[0] == f"refused: 1 step_without_text, the first at {file}:5"
    assert len(refused) == 4 and "and this model reads N" in refused[1]
    assert refused[2].endswith("rows.jsonl:9, candidate 3") and refused[3].startswith("refused: 1 not_json")
    assert f"scores: {output}" in printed.out and "lowest P(good)" in printed.out
    with file.open("rb") as stream:
        monkeypatch.setattr("sys.stdin", type("Stream", (), {"buffer": stream}))
        assert main(["score", trained, "-", "--image-root", str(rollouts), "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records


def test_score_of_a_model_that_is_not_a_number(trained, tmp_path, capsys):
    prm = ProcessRewardModel.from_pretrained(trained)
    prm.model.lm_head.weight.data.fill_(float("nan"))
    prm.save_pretrained(tmp_path / "nan")
    argv = ["score", str(tmp_path / "nan"), "--question", "q", "--step", "a", "--output", str(tmp_path / "a.jsonl")]
    assert main(argv) == 2
    assert "error: the model's scores are not numbers (NaN)" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected solutions: either INPUT"),
        (["-", "--question", "q"], "expected solutions: either INPUT"),
        (["--question", "q"], "--question needs a solution"),
        (["--question", "q", "--step", "a", "--candidate", "b"], "--question needs a solution"),
        (["-", "--step", "a"], "belong to --question"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (["-", "--output", "a.txt"], "expected a name that ends in .jsonl"),
    ],
)
def test_score_is_told_what_to_score(argv, message, capsys):
    assert main(["score", "a-model-that-is-not-looked-for", *argv]) == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"trl-mprm {trl_mprm.__version__}\n"


def test_best_of_n(trained):
    prm = ProcessRewardModel.from_pretrained(trained)
    candidates = [["the tile 1 is red"], ["the tile 2 is blue", "so 3"], ["the tile 1 is red"]]
    image = picture("red")
    scores = [prm.score([image], "How many?", steps) for steps in candidates]
    for aggregate, value in (("mean", lambda s: sum(s) / len(s)), ("min", min), ("last", lambda s: s[-1])):
        ranking = prm.best_of_n([image], "How many?", candidates, aggregate)
        assert [c.score for c in ranking] == sorted((c.score for c in ranking), reverse=True)
        for candidate in ranking:
            assert candidate.step_scores == pytest.approx(scores[candidate.index], abs=1e-5)
            assert candidate.score == pytest.approx(value(scores[candidate.index]), abs=1e-5)
    with pytest.raises(ValueError, match="candidate 1 is one string, expected a list of steps"):
        prm.best_of_n([image], "How many?", [["a"], "b"])
    with pytest.raises(ValueError, match="aggregate is 'max', expected one of mean, min, product, last"):
        prm.best_of_n([image], "How many?", candidates, "max")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--question", "?", "--step", " "], "step 0 is ' ', expected text"),
        (["--question", "?<|image_pad|>", "--step", "a"], "special token '<|image_pad|>'"),
        (["--question", "?", "--step", "a", "--image", "none.png"], "cannot read image none.png"),
        (["--question", "?", "--step", "a\udcff"], "row 0: step 0 holds a lone surrogate ('\\udcff')"),
    ],
)
def test_bad_input_is_one_line(argv, message, trained, capsys):
    assert main(["score", trained, *argv]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


MISTAKES = [
    (["--learnin_rate", "1"], "--learnin_rate: no such field, did you mean learning_rate?"),
    (["--loss-tpye=soft"], "--loss-tpye: no such field, did you mean loss_type?"),
    (["--no_bf17"], "--no_bf17: no such field, did you mean bf16?"),
    (["--config", "typo.yaml"], "typo.yaml: lora_rr: no such field, did you mean lora_r?"),
    (["--config", "broken.yaml"], "broken.yaml is no YAML: "),
    (["--config", "list.yaml"], "list.yaml holds list, expected a YAML mapping of fields to values"),
    (["--config", "none.yaml"], "--config none.yaml: no such file"),
    ([], "no model to train: set model_name_or_path"),
    (["--model_name_or_path", "org/name"], "no rollouts to train on: set dataset_name"),
    (["--config", "good.yaml", "--dataset_name", "./none"], "dataset_name: no such file or folder: ./none"),
    (
        ["--config", "good.yaml", "--model_name_or_path", "/none/x"],
        "model_name_or_path: no such file or folder: /none/x",
    ),
    (["--config", "good.yaml", "--image_root", "pictures"], "image_root: no such file or folder: pictures"),
    (["--config", "good.yaml", "--report_to", "mlflow"], "report_to: mlflow is not installed: install it, or set"),
    (["--config", "good.yaml", "--resume_from_checkpoint", "none"], "resume_from_checkpoint: no folder none"),
    (["--loss_type", "hrad"], "loss_type is 'hrad', expected one of hard, soft, beta_binomial; did you mean hard?"),
    (
        ["--config", "choice.yaml"],
        "overlong is 'drop', expected one of error, drop_steps, drop_row; did you mean drop_row?",
    ),
    (
        ["--config", "no.yaml"],
        "save_strategy is False, expected one of no, steps, epoch, best; YAML reads no as false",
    ),
    (["--optim=adamw"], "optim is 'adamw', expected one of those that `trl-mprm train --help` lists; did you mean "),
    (["--lr_scheduler_type", "cosin"], "lr_scheduler_type is 'cosin', expected one of linear, cosine, "),
    (["--config", "good.yaml", "--rule", "bsi"], "rule must be one of bis, random, "),
    (["--config", "good.yaml", "--fraction", "10"], "fraction must be above 0 and at most 1"),
    (["--config", "good.yaml", "--fraction", "a tenth"], "fraction is 'a tenth', expected a number"),
    (["--config", "good.yaml", "--alpha", "0.1"], "alpha belongs to a selection: set rule (as bis) or fraction"),
]


def test_a_mistake_is_told_in_one_line_before_torch_is_imported(tmp_path):
    files = {
        "typo": "lora_rr: 8",
        "broken": "a: [1\nb: 2",
        "list": "- a",
        "choice": "overlong: drop",
        "no": "save_strategy: no",
        "good": "model_name_or_path: org/name\ndataset_name: org/rows",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    script = (
        "import json, sys\nfrom trl_mprm.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n    assert main(['train', *argv]) == 2\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & sys.modules.keys()"
    )
    argvs = json.dumps([argv for argv, _ in MISTAKES])
    path = os.pathsep.join([str(Path(trl_mprm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", script, argvs],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == len(MISTAKES)
    for line, (_, message) in zip(lines, MISTAKES, strict=True):
        assert line.startswith(f"error: {message}")


def test_the_fields_of_a_training_are_those_of_its_classes():
    from trl import ModelConfig, TrlParser

    classes = (DataArguments, ProcessRewardConfig, ModelConfig)
    fields = [field for one in classes for field in dataclasses.fields(one) if field.init]
    assert train_fields().keys() == {field.name for field in fields}
    for field in fields:
        ours = train_fields()[field.name]
        assert ours.help == field.metadata.get("help", "")
        assert ours.default in (None, field.default)
    for action in TrlParser(classes)._actions:
        if action.choices and not action.dest.startswith("log_level"):  # their names are made when transformers runs
            assert train_fields()[action.dest].choices == tuple(
                str(getattr(one, "value", one)) for one in action.choices
            )
    good = [
        "--no_bf16",
        "--learning-rate=1e-3",
        "--dataset_name",
        "org/rows",
        "--model_name",
        "org/name",
        "--fraction",
        "1",
    ]
    assert check_train(good)["learning_rate"] == "1e-3" and check_train(good)["model_name_or_path"] == "org/name"


def test_4_bit_without_bitsandbytes_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    for argv in (["--load_in_4bit"], ["--load_in_4bit", "true", "--smoke"]):
        assert main(["train", "--model_name_or_path", "org/name", "--dataset_name", "org/rows", *argv]) == 2
        assert capsys.readouterr().err == 'error: load_in_4bit needs bitsandbytes: pip install "trl-mprm[qlora]"\n'


def test_fraction_alone_selects_by_bis_and_the_log_says_what_was_kept(rollouts, tiny_folders, tmp_path, capsys):
    argv = {"dataset_name": rollouts, "image_root": rollouts, "model_name_or_path": tiny_folders["qwen2_5_vl"]}
    argv |= {"output_dir": tmp_path, "max_steps": 1, "report_to": "none", "use_cpu": True, "fraction": 0.25}
    argv |= {"push_to_hub": True, "hub_model_id": "org/name", "save_strategy": "no"}
    assert main(["train", *(word for name, value in argv.items() for word in (f"--{name}", str(value)))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rollouts: bis kept 6 of 24 rows of 2 sources" in lines
    assert lines[-1].endswith(f"when it can: hf upload org/name {tmp_path} . --exclude 'checkpoint-*'")
    assert "rule `bis`, fraction 0.25" in (tmp_path / "README.md").read_text()


def test_a_folder_that_is_missing_and_no_hub(tmp_path, capsys):
    assert main(["select", "runs/nothing", "--output", str(tmp_path / "kept")]) == 2
    assert "runs/nothing: no such file or folder here, and the Hub cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_a_checkpoint_that_is_no_process_reward_model(tiny_folders, capsys):
    assert main(["score", tiny_folders["qwen2"], "--question", "?", "--step", "a"]) == 2
    assert "has no process_reward_config.json: expected a checkpoint saved by" in capsys.readouterr().err
