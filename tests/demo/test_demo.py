"""The miniature: the laws of its world, the two properties of its base, and the demo from end to end."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from trl_mprm import evaluate_model, load_rollouts, load_zero_shot, read_benchmark
from trl_mprm.demo.base import BASE_MODEL, draw_batch, draw_chains, logits_of, prompt_around, tile_pixels
from trl_mprm.demo.corpus import write_benchmark, write_corpus
from trl_mprm.demo.inference import interval
from trl_mprm.demo.run import make_trainer, run_demo, verdict
from trl_mprm.demo.settings import DEMO, QUICK
from trl_mprm.demo.world import (
    NAMES,
    READ,
    TILE,
    Policy,
    draw_tiles,
    make_problems,
    roll_out,
    step_texts,
)


TINY = replace(
    DEMO,
    problems=60,
    benchmark_problems=20,
    seeds={"zero-shot": (1, 2), "random10": (1, 2), "bis10": (1, 2), "full": (1,), "true10": (1,)},
)


drawn_tiles = cache(draw_tiles)


@cache
def read_grid(path):
    """Colour name -> digit, read off a picture by comparing each tile with all drawn ones."""
    tiles, pixels = drawn_tiles(), np.asarray(Image.open(path))
    grid = {}
    for row in range(3):
        for column in range(3):
            tile = pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            colour, digit = np.argwhere((tiles == tile).all(axis=(2, 3, 4)))[0]
            grid[NAMES[colour]] = int(digit)
    return grid


def truth_of(grid, question, steps):
    """What every step should be labelled, from picture, question and text alone."""
    words = question.split(" options ")[0].split()
    value, sign, path = (0, 1, words[1:]) if words[0] == "add" else (int(words[1]), -1, words[3:])
    after = {}
    for colour in path:
        value = (value + sign * grid[colour]) % 10
        after[colour] = value
    labels, reached = [], None
    for step in steps:
        words = step.removeprefix("wait ").split()
        if words[0] == "from":
            labels.append(-1)
        elif words[0] == "answer":
            labels.append(int(int(words[1]) == value))
        else:
            # A correction goes back to one tile, but states the value of all the tiles read so far.
            reached = reached if step.startswith("wait") else words[0]
            labels.append(int(grid[words[0]] == int(words[2]) and after[reached] == int(words[4])))
    return labels


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    noise = {"options": DEMO.options, "wrong_reference": DEMO.wrong_reference}
    statistics = write_corpus(folder, 200, DEMO.policy, np.random.default_rng(7), **noise)
    return folder, statistics


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark(folder, 150, DEMO.benchmark_policies, np.random.default_rng(8), options=DEMO.options)
    return folder


@pytest.mark.parametrize("options, luck", [(0, 0), (2, 8 / 9 * 1 / 2), (4, 6 / 9 * 1 / 4)])
def test_monte_carlo_scores_measure_the_chance_of_success(options, luck):
    # Step 0 opens, step 1 reads the first tile. One slip at most, of arithmetic: the wrong value is one of 9, of which
    # options - 1 are offered and taken as they are; from the others the policy guesses one of the options.
    policy = Policy((0.3,), (1.0,), 0.0, (0.0,), (1.0,), misread=0.0)
    rng = np.random.default_rng(options)
    problems = make_problems(4000, policy, rng, options=((options, 1.0),))
    steps = roll_out(problems, np.arange(4000), policy, rng, num_mc=16)
    ahead = problems.hard > 0  # the hard tile is still to come after the first step
    scores = steps.correct[ahead, 1] / 16
    assert scores.mean() == pytest.approx(0.7 + 0.3 * luck, abs=4 * 0.5 / np.sqrt(16 * ahead.sum()))
    behind = (problems.hard == 0) & ~steps.right[:, 1]
    expected = luck
    wrong = steps.correct[behind, 1] / 16
    # Continuations of one rollout share its wrong value: its spread is that of rollouts, not of continuations.
    assert wrong.mean() == pytest.approx(expected, abs=4 * wrong.std() / np.sqrt(behind.sum()) + 1e-12)


def test_a_policy_without_slips_is_always_right():
    policy = Policy((0.0,), (1.0,), 0.0, (0.0,), (1.0,))
    rng = np.random.default_rng(0)
    steps = roll_out(make_problems(100, policy, rng), np.arange(100), policy, rng)
    there = steps.kind >= 0
    assert steps.right[there].all() and (steps.correct[there] == 16).all()


def test_labels_are_true_of_the_pictures_and_texts(corpus):
    folder, _ = corpus
    truth = json.loads((folder / "true_labels.json").read_text())
    seen = set()
    for file in (folder / "annotations").glob("*.jsonl"):
        for line, text in enumerate(file.read_text().splitlines()):
            row = json.loads(text)
            steps = [step["step"] for step in row["steps_with_score"]]
            labels = truth[f"{file.stem}:{line}"]
            assert labels == truth_of(read_grid(folder / row["image"]), row["question_orig"], steps)
            seen |= set(labels)
    assert seen == {-1, 0, 1}


def test_corpus_reads_as_raw_annotations(corpus):
    folder, statistics = corpus
    rollouts = load_rollouts(folder / "annotations", image_root=folder)
    assert len(rollouts) == 800 == statistics["rollouts"]
    assert set(rollouts["source"]) == {"sum", "sum-2", "sum-4", "countdown", "countdown-2", "countdown-4"}
    assert set(json.loads((folder / "true_labels.json").read_text())) == set(rollouts["rollout_id"])
    assert all(n == 16 for n in rollouts["mc_total"])
    assert [[k / 16 for k in counts] for counts in rollouts["mc_counts"]] == list(rollouts["mc_scores"])
    scores = np.concatenate(rollouts["mc_scores"][:])
    assert statistics["error_steps"] == pytest.approx((scores == 0).mean())
    assert statistics["mean_mc"] == pytest.approx(scores.mean())
    assert rollouts[0]["images"][0].size == (84, 84)


def test_benchmark_reads_as_visual_process_bench(benchmark):
    items = read_benchmark(benchmark).items
    labels = np.concatenate([item["labels"] for item in items])
    assert len(items) == 150 * len(DEMO.benchmark_policies)
    assert set(labels) == {-1, 0, 1}
    assert 0.2 < (labels == -1).sum() / (labels != 0).sum() < 0.45
    for item in items[::10]:
        truth = truth_of(read_grid(item["images"][0]), item["prompt"], item["completions"])
        assert item["labels"] == [{1: 1, 0: -1, -1: 0}[label] for label in truth]


def test_same_seed_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_corpus(tmp_path / name, 20, DEMO.policy, np.random.default_rng(3), options=DEMO.options)
    files = [sorted(file for file in (tmp_path / name).rglob("*") if file.is_file()) for name in ("one", "two")]
    assert len(files[0]) == len(files[1]) > 5
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_steps_of_a_rollout_follow_the_question():
    rng = np.random.default_rng(5)
    problems = make_problems(50, DEMO.policy, rng, options=DEMO.options)
    steps = roll_out(problems, np.arange(50), DEMO.policy, rng, num_mc=0)
    for j in range(50):
        words = problems.question(j).split(" options ")[0].split()
        texts = step_texts(problems, steps, j)
        read = [text.split()[0] for text, kind in zip(texts, steps.kind[j], strict=False) if kind == READ]
        assert read == (words[1:] if words[0] == "add" else words[3:])
        assert texts[-1].startswith("answer ")


def test_base_judges_single_statements():
    prm = load_zero_shot(str(BASE_MODEL))
    processor, model = prm.processing_class, prm.model
    tokenizer, pixels = processor.tokenizer, tile_pixels(processor)
    batch = draw_batch(64, np.random.default_rng(9), tokenizer)
    with torch.inference_mode():
        logits = logits_of(model, pixels, batch, *prompt_around(processor, 64))
    for first, words in ((7, ["true", "false"]), (8, ["sound", "spoilt"])):  # behind each of the five statements
        one, other = tokenizer.convert_tokens_to_ids(words)
        judged = logits[:, first::6, one] > logits[:, first::6, other]
        assert (judged.numpy() == (batch["target"][:, first::6] == one)).mean() > 0.9


def test_base_follows_errors_and_answers_only_where_it_is_asked():
    prm = load_zero_shot(str(BASE_MODEL))
    processor, rng = prm.processing_class, np.random.default_rng(10)
    tokenizer, pixels = processor.tokenizer, tile_pixels(processor)
    yes, no, asks = tokenizer.convert_tokens_to_ids(["Yes", "No", "?"])
    head, tail = prompt_around(processor, 64)
    right, sure = [], []
    for _ in range(4):
        batch = draw_chains(64, rng, tokenizer)
        with torch.inference_mode():
            logits = logits_of(prm.model, pixels, batch, head[:, :-1], tail)[:, 2::3]  # behind each statement
        margin = (logits[..., yes] - logits[..., no]).numpy()
        asked = batch["text"][:, batch["asked"][2::3]] == asks
        right += ((margin > 0) == (batch["target"][:, 2::3] == yes))[asked].tolist()
        sure.append((np.abs(margin[asked]).mean(), np.abs(margin[~asked]).mean()))
    assert np.mean(right) > 0.9
    asked, idle = np.mean(sure, axis=0)
    assert idle < asked / 4


def test_base_is_near_chance_as_a_process_reward_model(benchmark):
    metrics = evaluate_model(load_zero_shot(str(BASE_MODEL)), benchmark, batch_size=64)
    assert 0.4 < metrics["macro_f1_step_weighted"] < 0.56
    assert 0.35 < metrics["auc"] < 0.65


def test_base_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in BASE_MODEL.iterdir()) < 4_000_000


def test_interval_is_students():
    # mean 2, sd 1, n 3: half width 4.303 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        {"mean": 2.0, "low": 2 - 2.4843, "high": 2 + 2.4843, "sd": 1.0, "seeds": 3}, abs=1e-3
    )


def run(subset, seed, f1):
    return {"subset": subset, "seed": seed, "macro_f1_step_weighted": f1, "macro_f1_pooled": f1, "auc": f1}


@pytest.mark.parametrize(
    "bis, better, as_good",
    [
        ((0.70, 0.71, 0.72), "shown", "not shown"),  # 5 points above both
        ((0.60, 0.73, 0.66), "not shown", "not shown"),  # anywhere
        ((0.655, 0.665, 0.662), "not shown", "shown"),  # within half a point of full
        ((0.5, 0.5, 0.5), "not shown", "not shown"),
    ],
)
def test_verdict_follows_the_paired_differences(bis, better, as_good):
    runs = [run("bis10", seed, value) for seed, value in enumerate(bis)]
    runs += [run(arm, seed, f1) for arm in ("random10", "full") for seed, f1 in enumerate((0.65, 0.66, 0.66))]
    found = verdict(runs)
    assert found["BIS-10% is better than a random 10%"]["answer"] == better
    assert found["BIS-10% is as good as all rollouts"]["answer"] == as_good
    assert verdict(runs[:4])["BIS-10% is as good as all rollouts"]["answer"] == "not run"


def check_results(results, folder):
    assert json.loads((folder / "results.json").read_text()) == results
    for row in results["runs"]:
        assert row["threshold_protocol"] == "held_out"
        for name in ("macro_f1_step_weighted", "macro_f1_pooled", "auc"):
            assert 0 <= row[name] <= 1
        if row["subset"] != "zero-shot":
            assert row["optimizer_steps"] == -(-row["rollouts"] // DEMO.batch_size)
            model = folder / f"seed-{row['seed']}" / row["subset"]
            assert (model / "README.md").is_file() and (model / "process_reward_config.json").is_file()
    for picture in ("f1_by_subset.png", "corpus.png", "solution.png", "corpus-dark.png"):
        assert Image.open(folder / picture).size[0] > 500


def test_demo_from_end_to_end(tmp_path, capsys):
    results = run_demo(tmp_path, settings=TINY)
    check_results(results, tmp_path)
    assert [(row["subset"], row["seed"]) for row in results["runs"]] == [
        *((subset, 1) for subset in TINY.seeds), ("zero-shot", 2), ("random10", 2), ("bis10", 2),
    ]  # fmt: skip
    rows = {(row["subset"], row["seed"]): row["rollouts"] for row in results["runs"]}
    assert rows["full", 1] == 240 and rows["bis10", 1] == rows["random10", 1] == rows["true10", 1] < 30
    assert (tmp_path / "seed-1" / "bis10" / "adapter_model.safetensors").is_file()
    assert results["summary"]["paired_differences"]["bis10 - random10"]["auc"]["seeds"] == 2
    assert "BIS-10% is better than a random 10%" in capsys.readouterr().out


def test_demo_trains_all_weights(tmp_path):
    settings = replace(TINY, problems=40, seeds={"bis10": (1,)})
    check_results(run_demo(tmp_path, full=True, settings=settings), tmp_path)
    assert (tmp_path / "seed-1" / "bis10" / "model.safetensors").is_file()


def test_adapter_of_the_demo_trains_decoder_projector_and_marker(tmp_path):
    write_corpus(tmp_path / "corpus", 10, DEMO.policy, np.random.default_rng(3), options=DEMO.options)
    rows = load_rollouts(tmp_path / "corpus" / "annotations", image_root=tmp_path / "corpus")
    trainer = make_trainer(rows, None, tmp_path / "out", DEMO, seed=1)
    trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    kinds = {"lora_": 0, "visual.merger": 0, "trainable_tokens": 0}
    for name in trained:
        (kind,) = [kind for kind in kinds if kind in name]
        kinds[kind] += 1
    assert kinds["lora_"] == 2 * 4 * 7 and kinds["visual.merger"] and kinds["trainable_tokens"] == 1
    quantised = [m for m in trainer.model.modules() if type(m).__name__ == "Linear4bit"]
    assert quantised and all(m.weight.quant_state.nested for m in quantised)


def test_quick_differs_in_size_only():
    assert replace(QUICK, problems=DEMO.problems, benchmark_problems=DEMO.benchmark_problems, seeds=DEMO.seeds) == DEMO
