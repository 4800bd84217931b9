"""The commands on real files and a tiny trained model: select, train, evaluate, score; and how they fail."""

import json
from pathlib import Path

import pytest
from helpers import make_rows, picture

from trl_mprm import ProcessRewardModel
from trl_mprm.cli import main


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


def test_a_folder_that_is_missing_and_no_hub(tmp_path, capsys):
    assert main(["select", "runs/nothing", "--output", str(tmp_path / "kept")]) == 2
    assert "runs/nothing: no such file or folder here, and the Hub cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_a_checkpoint_that_is_no_process_reward_model(tiny_folders, capsys):
    assert main(["score", tiny_folders["qwen2"], "--question", "?", "--step", "a"]) == 2
    assert "has no process_reward_config.json: expected a checkpoint saved by" in capsys.readouterr().err
