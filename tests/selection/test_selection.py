import hashlib
import inspect
import json
import pickle
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields

import datasets
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from trl_mprm.cli import main
from trl_mprm.cli.arguments import print_table
from trl_mprm.cli.train import DataArguments
from trl_mprm.data.rollouts import FEATURES as FEATURES_OF_ROWS
from trl_mprm.data.rollouts import load_rollouts
from trl_mprm.selection.bis import add_bis
from trl_mprm.selection.comparison import compare_rules, comparison_table
from trl_mprm.selection.dataset_card import dataset_card
from trl_mprm.selection.datasets import Selection, select, top_fraction
from trl_mprm.selection.files import select_files
from trl_mprm.selection.report import report_table
from trl_mprm.selection.rules import RULES, STEP_RULES


FEATURES = Features({"rollout_id": Value("string"), "source": Value("string"), "mc_scores": List(Value("float64"))})

# Few different scores, so that most rows tie; broken rows among them
steps = st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0]), max_size=4)
broken = st.lists(st.sampled_from([float("nan"), 2.0, None]), min_size=1, max_size=2)
corpora = st.lists(st.tuples(st.sampled_from("abc"), st.one_of(steps, steps, steps, broken)), min_size=1, max_size=60)
fractions = st.one_of(st.sampled_from([0.05, 0.1, 0.25, 0.29, 0.3, 0.57, 0.7, 1.0]), st.floats(1e-6, 1.0))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset(corpus):
    rows = [{"rollout_id": f"r{i}", "source": source, "mc_scores": s} for i, (source, s) in enumerate(corpus)]
    return Dataset.from_list(rows, features=FEATURES)


def bis(scores, alpha):
    scores = [score for score in scores if score is not None]
    if not scores or any(not 0 <= score <= 1 for score in scores):
        return None
    positive = [score for score in scores if score > 0]
    p_pos = len(positive) / len(scores)
    return (p_pos * (1 - p_pos) + alpha) * (sum(positive) / len(positive) if positive else 1.0)


def naive_top(rows, fraction, key, by="source"):
    """A full stable sort of each source (or of all), best first, as the paper's script does it: ids in file order."""
    by_source = defaultdict(list)
    for row in rows:
        if key(row) is not None:
            by_source[row[by] if by else None].append(row)
    kept = set()
    for group in by_source.values():
        group.sort(key=key, reverse=True)  # Python keeps the order of equal rows here, reverse or not
        kept |= {row["rollout_id"] for row in group[: max(1, int(len(group) * fraction))]}
    return tuple(row["rollout_id"] for row in rows if row["rollout_id"] in kept)


@settings(deadline=None)
@given(corpora, fractions, st.sampled_from([0.05, 0.2]))
def test_kept_rows_equal_a_full_stable_sort(corpus, fraction, alpha):
    data = dataset(corpus)
    expected = naive_top(data.to_list(), fraction, lambda row: bis(row["mc_scores"], alpha))
    selection = select(data, "bis", fraction=fraction, alpha=alpha)
    scored = data.with_format("arrow").map(add_bis, batched=True, fn_kwargs={"alpha": alpha}).with_format(None)
    assert selection.kept == expected
    assert top_fraction(scored, fraction).kept == expected
    assert tuple(data.select(selection.indices)["rollout_id"]) == expected
    for name, row in selection.report["sources"].items():
        valid = [bis(s, alpha) for source, s in corpus if source == name and bis(s, alpha) is not None]
        kept = sorted(valid, reverse=True)[: max(1, int(len(valid) * fraction))]
        assert (row["valid"], row["kept"]) == (len(valid), len(kept))
        assert row["read"] == row["valid"] + sum(row["refused"].values()) == sum(name == s for s, _ in corpus)
        if kept:
            assert row["cut_score"] == kept[-1]
            assert (row["ties_at_cut"], row["ties_kept"]) == (valid.count(kept[-1]), kept.count(kept[-1]))


@settings(deadline=None, max_examples=40)
@given(corpora, fractions, st.sampled_from(["first", "hash"]), st.integers(0, 3))
def test_the_whole_corpus_is_cut_as_a_full_stable_sort_cuts_it(corpus, fraction, ties, seed):
    data = dataset(corpus)
    rows = data.to_list()

    def by_hash(row):
        return hashlib.blake2b(f"{seed}:{row['rollout_id']}".encode(), digest_size=8).digest()

    order = sorted(rows, key=by_hash) if ties == "hash" else rows
    expected = naive_top(order, fraction, lambda row: bis(row["mc_scores"], 0.2), by=None)
    selection = select(data, fraction=fraction, ties=ties, seed=seed, by=None)
    assert sorted(selection.kept) == sorted(expected)
    scored = data.map(add_bis, batched=True).remove_columns("source")
    assert top_fraction(scored, fraction, by=None, ties=ties, seed=seed).kept == selection.kept
    # the evidence stays by source
    report, kept = selection.report, [row for row in rows if row["rollout_id"] in selection.kept]
    assert report["by"] == "corpus"
    lowest = min((bis(row["mc_scores"], 0.2) for row in kept), default=None)
    assert report["total"]["cut_score"] == lowest
    for name, row in report["sources"].items():
        values = [bis(s, 0.2) for source, s in corpus if source == name]
        kept_values = [bis(r["mc_scores"], 0.2) for r in kept if r["source"] == name]
        assert (row["read"], row["valid"]) == (len(values), len(values) - values.count(None))
        assert row["kept"] == len(kept_values) == row["valid"] - row["dropped"]
        if row["valid"]:
            assert row["cut_score"] == lowest
            assert (row["ties_at_cut"], row["ties_kept"]) == (values.count(lowest), kept_values.count(lowest))


@settings(deadline=None)
@given(corpora, fractions, st.sampled_from(STEP_RULES), st.integers(0, 3), st.randoms(use_true_random=False))
def test_seeded_ties_do_not_see_the_order_of_rows(corpus, fraction, rule, seed, shuffler):
    data = dataset(corpus)
    order = list(range(len(data)))
    shuffler.shuffle(order)
    one = select(data, rule, fraction=fraction, ties="hash", seed=seed)
    other = select(data.select(order), rule, fraction=fraction, ties="hash", seed=seed)
    assert set(one.kept) == set(other.kept)


@settings(deadline=None)
@given(corpora, fractions, st.sampled_from(STEP_RULES))
def test_every_rule_keeps_its_best(corpus, fraction, rule):
    data = dataset(corpus)
    scores = {row["rollout_id"]: [s for s in row["mc_scores"] if s is not None] for row in data}

    def mixed(row):
        return bool(0 < sum(s > 0 for s in scores[row]) < len(scores[row]))

    value = {
        "bis": lambda row: bis(scores[row], 0.2),
        "random": lambda row: 0,
        "mixed": mixed,
        "reliable": lambda row: bis(scores[row], 0.2) / (bis([s > 0 for s in scores[row]], 0.2)),
        "low_mc": lambda row: -sum(scores[row]) / len(scores[row]),
    }[rule]
    kept = set(select(data, rule, fraction=fraction).kept)
    for name in {source for source, _ in corpus}:
        ids = [row["rollout_id"] for row in data if row["source"] == name and bis(row["mc_scores"], 0.2) is not None]
        inside, outside = [value(i) for i in ids if i in kept], [value(i) for i in ids if i not in kept]
        assert len(inside) == (max(1, int(len(ids) * fraction)) if ids else 0)
        if outside:
            assert min(inside) >= max(outside) - 1e-12


def test_int_of_the_float_product_as_in_the_paper():
    assert 100 * 0.29 < 29
    assert len(select(dataset([("a", [0.5])] * 100), fraction=0.29).kept) == 28
    assert len(select(dataset([("a", [0.5])] * 3), fraction=0.1).kept) == 1


def test_random_rules_depend_on_the_seed():
    data = dataset([("a", [0.5])] * 200)
    for rule in ("random", "mixed"):
        kept = [select(data, rule, fraction=0.5, seed=seed).kept for seed in (0, 0, 1)]
        assert kept[0] == kept[1] != kept[2]
        assert kept[0] != tuple(f"r{i}" for i in range(100))  # and not file order


def test_each_rule_on_six_rollouts():
    data = dataset([("a", s) for s in ([1.0, 1.0], [0.9, 0.0], [0.2, 0.0], [0.0, 0.0], [0.5, 0.5], [0.1, 0.1])])
    # BIS (alpha 0.05): .05, .27, .06, .05, .025, .005.  R: 1, .9, .2, 1, .5, .1.  Mean: 1, .45, .1, 0, .5, .1
    kept = {
        rule: select(data, rule, fraction=0.34, alpha=0.05).kept for rule in ("bis", "mixed", "reliable", "low_mc")
    }
    assert kept == {"bis": ("r1", "r2"), "mixed": ("r1", "r2"), "reliable": ("r0", "r3"), "low_mc": ("r2", "r3")}


def test_report_of_a_small_corpus():
    rows = {
        "rollout_id": list("abcdef"),
        "source": ["x", "x", "x", "x", "y", "y"],
        "prompt": ["q1", "q1", "q1", "q2", "q1", "q1"],
        "mc_scores": [[0.5, 0.0], [0.5, 0.0], [0.5, 0.0], [1.0, 1.0], [1.0], [None]],
    }
    report = select(Dataset.from_dict(rows), fraction=0.5, alpha=0.05).report
    assert report["sources"]["x"] == {
        "read": 4,
        "refused": {},
        "valid": 4,
        "kept": 2,
        "dropped": 2,
        "cut_score": 0.15,
        "ties_at_cut": 3,
        "ties_kept": 2,
        "all_wrong": 0,
        "mixed_share": 1.0,
        "error_step_share": 0.5,
        "mean_mc": 0.25,
        "mean_group_size": 2.0,
        "before": {"all_wrong": 0, "mixed_share": 0.75, "error_step_share": 3 / 8}
        | {"mean_mc": 3.5 / 8, "mean_group_size": 2.0},
    }
    assert report["sources"]["y"]["refused"] == {"no_score": 1}
    total = report["total"]
    assert (total["read"], total["refused"], total["valid"], total["kept"]) == (6, {"no_score": 1}, 5, 3)
    assert total["mean_group_size"] == 1.5  # the same question in two sources makes two groups
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = report_table(report)
    assert table[0][:3] == ["source", "read", "refused"] and [row[0] for row in table[1:]] == ["x", "y", "total"]
    assert {len(row) for row in table} == {9}
    assert table[-1][1:5] == [6, 1, 5, 3]


@pytest.mark.parametrize("n_wrong, many", [(1, False), (2, True)])
def test_rollouts_without_a_positive_step_are_counted_and_many_are_told(tmp_path, caplog, n_wrong, many):
    """Two sources, ten kept of ten; R is 1 where no step is positive, so that these tie with the perfect ones."""
    corpus = [("a", [0.0, 0.0])] * n_wrong + [("a", [1.0, 1.0])] * (5 - n_wrong) + [("b", [0.5, 0.0])] * 5
    report = select(dataset(corpus), fraction=1.0).report
    assert [report["sources"][name]["all_wrong"] for name in "ab"] == [n_wrong, 0]
    assert report["total"]["all_wrong"] == report["total"]["before"]["all_wrong"] == n_wrong
    words = f"{n_wrong} of 10 kept rollouts ({n_wrong}0%) have no positive step"
    assert any(words in message for message in caplog.messages) == many
    for source in "ab":
        rows = [{"prompt": "q", "completions": ["x", "y"], "labels": s} for name, s in corpus if name == source]
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.clear()
    page, files = tmp_path / "page.html", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    report = select_files(files, tmp_path / "out", fraction=1.0, page=page)
    assert any(words in message for message in caplog.messages) == many == (words in page.read_text("utf-8"))
    assert f'<td>{n_wrong}</td><td id="all-wrong">{n_wrong}</td>' in page.read_text("utf-8")
    card = dataset_card("you/kept", report).text
    assert f"| rollouts without a positive step | {n_wrong} | {n_wrong} |" in card and (words in card) == many
    # a column of scores alone does not tell
    data = Dataset.from_dict({"rollout_id": ["r"], "source": ["a"], "bis": [0.2]})
    assert top_fraction(data, 1.0).report["total"]["all_wrong"] is None


def test_tables_fit_a_terminal_of_100_columns(tmp_path, capsys):
    name = "a name that is longer than any table wants it to be"
    row = {"prompt": "q", "completions": ["x", "y", "z"], "labels": [1 / 3, 0, 1]}
    (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 1000 + "{\n")
    assert main(["select", str(tmp_path / f"{name}.jsonl"), "--compare", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    tables = printed[: printed.index("kept rollouts:")]
    assert max(map(len, tables.splitlines())) <= 100 and "a name that is lo…" in tables
    for large in (report_table, comparison_table):  # and those of ten million rollouts
        report = json.loads((tmp_path / "out" / "selection.json").read_text())
        for facts in (report["total"], *report["sources"].values()):
            facts |= {"read": 98_765_432, "valid": 98_765_431, "kept": 9_876_543, "all_wrong": 1_234_567}
            facts |= {"refused": {"not_json": 1_234_567}, "cut_score": 0.123456789}
        numbers = {"rollouts": 98_765_432, "steps": 123_456_789, "steps_per_rollout": 12.3, "words_per_step": 123.4}
        shares = dict.fromkeys(
            ("error_step_share", "mean_mc", "mixed_share", "all_wrong_share", "mean_group_size"), 0.5
        )
        compared = {rule: numbers | shares for rule in ("full data", *STEP_RULES)}
        table = large(report if large is report_table else compared)
        print_table(
            [
                [str(cell)[:18] if number == 0 and large is report_table else cell for number, cell in enumerate(row)]
                for row in table
            ]
        )
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_predicate_filters_datasets_in_every_form(tmp_path):
    PILImage.new("RGB", (3, 2)).save(tmp_path / "a.png")
    rng = random.Random(0)
    corpus = [(rng.choice("ab"), [rng.choice([0.0, 0.5, 1.0]) for _ in range(3)]) for _ in range(50)]
    data = dataset(corpus).add_column("images", [[{"path": str(tmp_path / "a.png"), "bytes": None}]] * 50)
    data = data.cast_column("images", List(Image())).map(add_bis)
    best = top_fraction(data, 0.3)
    assert best.report == top_fraction(data.with_format("arrow"), 0.3).report
    assert best == top_fraction(data.with_format("numpy"), 0.3)
    for form in (None, "numpy", "pandas", "torch"):
        for batched in (False, True):
            kept = data.with_format(form).filter(best, batched=batched, load_from_cache_file=False)
            assert tuple(kept.with_format(None)["rollout_id"]) == best.kept
    assert tuple(data.with_format("arrow").filter(best, batched=True).with_format(None)["rollout_id"]) == best.kept
    assert tuple(data.filter(best, num_proc=2)["rollout_id"]) == best.kept

    stream = data.remove_columns([name for name in data.column_names if "bis" in name]).to_iterable_dataset()
    assert select(stream, fraction=0.3).kept == best.kept
    arrow = stream.with_format("arrow").map(add_bis, batched=True)
    for scored in (stream.map(add_bis), stream.map(add_bis, batched=True), arrow, arrow.with_format(None)):
        assert top_fraction(scored, 0.3) == best
        assert tuple(row["rollout_id"] for row in scored.with_format(None).filter(best)) == best.kept


def test_a_batched_filter_opens_no_picture(tmp_path):
    path = {"path": str(tmp_path / "missing.png"), "bytes": None}
    data = dataset([("a", [0.5, 0.0])] * 40).add_column("images", [[path]] * 40)
    data = data.cast_column("images", List(Image())).map(add_bis, batched=True)
    best = top_fraction(data, 0.1)
    assert len(data.filter(best, batched=True)) == 4
    with pytest.raises(FileNotFoundError):
        data.filter(best)


def test_shards_give_the_whole_with_hashed_ties():
    data = dataset([("a", [0.5, 0.0])] * 40 + [("b", [1.0])] * 40)
    shards = [data.shard(4, index) for index in (2, 0, 3, 1)]
    whole, parts = (select(d, fraction=0.2, ties="hash") for d in (data, concatenate_datasets(shards)))
    assert set(whole.kept) == set(parts.kept)


def test_pickle_and_fingerprint_are_stable():
    best = select(dataset([("a", [i / 100, 0.0]) for i in range(100)]), fraction=0.5)
    copy = pickle.loads(pickle.dumps(best))
    assert copy == best and isinstance(copy, Selection)
    assert copy({"rollout_id": "r99"}) is True and copy({"rollout_id": ["r0", "r99"]}) == [False, True]
    code = (
        "from datasets import Dataset; from datasets.fingerprint import Hasher; from trl_mprm import select\n"
        "rows = [{'rollout_id': f'r{i}', 'source': 'a', 'mc_scores': [i / 100, 0.0]} for i in range(100)]\n"
        "print(Hasher.hash(select(Dataset.from_list(rows), fraction=0.5)))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert done.stdout.strip() == Hasher.hash(best)


def test_hash_ties_are_the_same_on_every_machine():
    # blake2b("0:r<i>"), 8 bytes, big-endian, smallest first; worked out once with `b2sum -l 64`
    assert select(dataset([("a", [0.5])] * 8), fraction=0.25, ties="hash").kept == ("r2", "r4")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: top_fraction(d, 0.5), "expected a column 'bis'.*map add_bis"),
        (lambda d: top_fraction(d.remove_columns("rollout_id"), 0.5, score="x"), "expected a column 'rollout_id'"),
        (lambda d: select(d, fraction=0.5, by="file"), "expected a column 'file'"),
        (lambda d: select(d.remove_columns("mc_scores"), fraction=0.5), "expected a column `mc_scores`"),
        (lambda d: select(d, fraction=0), "fraction must be above 0"),
        (lambda d: select(d, fraction=10), "fraction must be above 0"),
        (lambda d: select(d, fraction=float("nan")), "fraction must be above 0"),
        (lambda d: select(d, "best", fraction=0.5), "rule must be one of bis, random"),
        (lambda d: select(d, fraction=0.5, ties="last"), "ties must be"),
        (lambda d: select(d, fraction=0.5, alpha=-1), "alpha must be"),
        (lambda d: select(d.select([]), fraction=0.5), "got no rows"),
        (lambda d: select(concatenate_datasets([d, d]), fraction=0.5), "row 3 has the rollout_id 'r0', as row 0 has"),
        (lambda d: select(d.map(lambda row: {"rollout_id": None}), fraction=0.5), "None, which is no text"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(dataset([("a", [0.5])] * 3))
    assert "\n" not in str(caught.value)


# ---- files


def corpus_folder(folder, images=True):
    """Raw annotations of three sources with ties, broken rows and pictures, some of them missing."""
    rng = random.Random(1)
    (folder / "images").mkdir(parents=True)
    if images:
        for number in range(4):
            PILImage.new("RGB", (3, 2)).save(folder / "images" / f"{number}.png")
    for source, n in (("AI2D", 40), ("DVQA", 25), ("GEOS", 3)):
        lines = []
        for index in range(n):
            scores = [rng.choice([0, 0.5, 1.0, 1.0]) for _ in range(rng.randint(1, 5))]
            steps = [
                {"step": f"é {i}", "score": s, "num_mc_correct": int(16 * s), "num_mc_total": 16}
                for i, s in enumerate(scores)
            ]
            row = {"question": f"<image>\nq{index % 7}", "steps_with_score": steps, "answer": rng.choice([3, "x"])}
            paths = [f"VisualPRM400K-v1.1-Raw/{rng.randrange(5 if source == 'DVQA' else 4)}.png"] * rng.randint(1, 2)
            row["image"] = paths if len(paths) > 1 else paths[0]
            if index % 11 == 5:
                steps[0]["score"] = str(steps[0]["score"])
            lines.append("{" if index % 17 == 9 else json.dumps(row, ensure_ascii=index % 2 == 0))
        (folder / f"{source}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def content(data):
    return [json.dumps(row, sort_keys=True) for row in data.remove_columns(["rollout_id", "images"]).to_list()]


@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("name, by", [("kept", "source"), ("kept.jsonl", "corpus"), ("kept.parquet", "source")])
def test_files_and_python_keep_the_same_rows(tmp_path, rule, name, by):
    folder, output = corpus_folder(tmp_path / "raw"), tmp_path / "out" / name
    report = select_files(folder, output, rule, fraction=0.3, alpha=0.2, ties="hash", seed=3, by=by)
    rollouts = load_rollouts(folder)
    by = None if by == "corpus" else by
    selection = select(rollouts, rule, fraction=0.3, alpha=0.2, ties="hash", seed=3, by=by)
    again = load_rollouts(output, image_root=folder)
    kept = rollouts.filter(selection)
    assert content(again) == content(kept)
    assert [[i["path"] for i in row] for row in again.cast_column("images", List(Image(decode=False)))["images"]] == [
        [i["path"] for i in row] for row in kept.cast_column("images", List(Image(decode=False)))["images"]
    ]
    if name == "kept.parquet":
        assert tuple(again["rollout_id"]) == selection.kept
    for source, row in selection.report["sources"].items():
        for key, value in row.items():
            assert key in ("read", "refused") or report["sources"][source][key] == value
    assert {source: row["refused"] for source, row in report["sources"].items()} == {
        "AI2D": {"score_not_a_number": 4, "not_json": 2},
        "DVQA": report["sources"]["DVQA"]["refused"],
        "GEOS": {},
    }
    assert report["sources"]["DVQA"]["refused"]["image_missing"] > 0
    place = {"kept": "kept/", "kept.jsonl": "kept.", "kept.parquet": "kept.parquet."}[name]
    assert json.loads((tmp_path / "out" / f"{place}selection.json").read_text()) == report


def test_kept_lines_are_copied_byte_by_byte(tmp_path):
    folder = corpus_folder(tmp_path / "raw")
    report = select_files(folder, tmp_path / "out", fraction=0.5)
    select_files(folder, tmp_path / "one" / "all.jsonl", fraction=0.5)
    selection = select(load_rollouts(folder), fraction=0.5)
    expected = {}
    for file in sorted(folder.glob("*.jsonl")):
        numbers = [int(i.split(":")[1]) for i in selection.kept if i.startswith(f"{file.stem}:")]
        lines = file.read_bytes().split(b"\n")
        expected[file.name] = b"".join(lines[number] + b"\n" for number in numbers)
        assert (tmp_path / "out" / file.name).read_bytes() == expected[file.name]
    assert (tmp_path / "one" / "all.jsonl").read_bytes() == b"".join(expected.values())
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert len(refused) == sum(report["total"]["refused"].values())
    assert refused[0] == {"file": str(folder / "AI2D.jsonl"), "line": 6, "reason": "score_not_a_number"}
    assert report["total"]["read"] == 68 == report["total"]["valid"] + len(refused)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["AI2D.jsonl", "DVQA.jsonl", "GEOS.jsonl", "refused.jsonl", "selection.json"]

    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    select_files(folder, tmp_path / "out", fraction=0.5)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_selection_can_be_selected_again(tmp_path):
    folder = corpus_folder(tmp_path / "raw")
    for name in ("one/all.jsonl", "one/all.parquet"):
        first, second = tmp_path / name, tmp_path / "two" / name
        select_files(folder, first, fraction=0.5)
        report = select_files(first, second, fraction=0.5, image_root=folder)
        assert list(report["sources"]) == ["AI2D", "DVQA", "GEOS"]
        assert set(load_rollouts(second, image_root=folder)["source"]) == {"AI2D", "DVQA", "GEOS"}
    select_files(folder, tmp_path / "one" / "all.jsonl", fraction=0.5)
    with open(tmp_path / "one" / "all.jsonl", "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(ValueError, match="select again, or delete all.selection.json"):
        load_rollouts(tmp_path / "one" / "all.jsonl", image_root=folder)


def test_parquet_keeps_every_field(tmp_path):
    folder = corpus_folder(tmp_path / "raw")
    select_files(folder, tmp_path / "kept.parquet", fraction=1.0)
    table = pq.read_table(tmp_path / "kept.parquet")
    assert set(table.column_names) == {*FEATURES_OF_ROWS, "answer"}
    assert set(table["answer"].to_pylist()) == {"3", "x"}


def test_stepwise_rows_of_several_sources_in_one_file(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "completions": ["a", "b"], "labels": [True, i % 3 == 0]}
        | {"source": "xy"[i % 2]}
        for i in range(20)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("out", "out.jsonl", "out.parquet"):
        report = select_files(file, tmp_path / name.replace(".", "_") / name, fraction=0.5)
        assert {source: row["kept"] for source, row in report["sources"].items()} == {"x": 5, "y": 5}
        expected = load_rollouts(file).filter(select(load_rollouts(file), fraction=0.5))
        assert content(load_rollouts(tmp_path / name.replace(".", "_") / name)) == content(expected)


def test_annotations_without_their_images(tmp_path):
    folder = corpus_folder(tmp_path / "raw", images=False)
    report = select_files(folder, tmp_path / "out", fraction=0.5)
    assert report["images"] == "not checked"
    assert report["total"]["refused"] == {"score_not_a_number": 6, "not_json": 3}
    assert report["total"]["kept"] == sum(row["kept"] for row in report["sources"].values()) > 20
    with pytest.raises(ValueError, match="no row can be used.*image_missing"):
        select_files(folder, tmp_path / "other", fraction=0.5, image_root=folder)
    assert not (tmp_path / "other").exists()


def test_refusals_of_an_earlier_run_are_removed(tmp_path):
    file = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "q", "completions": ["a"], "labels": [1]})
    file.write_text(f"{{\n{good}\n")
    select_files(file, tmp_path / "out", fraction=1)
    assert (tmp_path / "out" / "refused.jsonl").exists()
    file.write_text(f"{good}\n")
    select_files(file, tmp_path / "out", fraction=1)
    assert not (tmp_path / "out" / "refused.jsonl").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: select_files(p / "raw", p / "raw", fraction=0.5), "is an input and would be overwritten"),
        (lambda p: select_files(p / "raw", p / "raw" / "k.jsonl", fraction=0.5), "lies in the input folder"),
        (lambda p: select_files(p / "raw" / "AI2D.jsonl", p / "raw", fraction=0.5), "would be overwritten"),
        (lambda p: select_files(p / "raw", p / "full", fraction=0.5), "already holds other.jsonl"),
        (
            lambda p: select_files(p / "raw", p / "full" / "other.jsonl" / "x", fraction=0.5),
            "other.jsonl to be a folder, got a file",
        ),
        (lambda p: select_files(p / "raw", p / "dir.jsonl", fraction=0.5), "other kind"),
        (lambda p: select_files(p / "raw", p / "plain", fraction=0.5), "other kind"),
        (lambda p: select_files(p / "raw", p / "new", fraction=2), "fraction must be above 0"),
        (lambda p: select_files(p / "raw", p / "new", "best", fraction=0.5), "rule must be one of"),
        (lambda p: select_files(p / "raw", p / "new", fraction=0.5, alpha=-1), "alpha must be"),
        (lambda p: select_files(p / "none", p / "new", fraction=0.5), "no such file or folder"),
        (lambda p: select_files(p / "raw", p / "new", fraction=0.5, image_root=p / "none"), "no row can be used"),
        (lambda p: select_files(p / "raw", p / "new", fraction=0.5, seed=-1), "seed must be a whole number"),
        (lambda p: select_files(p / "raw", p / "new", fraction=0.5, by="file"), 'by must be "source"'),
        (lambda p: select_files(p / "raw", p / "k.jsonl.gz", fraction=0.5), "expected .*or a folder, got .* in .gz"),
        (lambda p: select_files(p / "raw", p / "k.json", fraction=0.5), "got a name ending in .json"),
        (lambda p: select_files(p / "raw", p / "k.csv", fraction=0.5), "got a name ending in .csv"),
        (lambda p: select_files([p / "raw", p / "raw" / "AI2D.jsonl"], p / "new", fraction=0.5), "is the same file"),
        (lambda p: select_files([p / "raw", p / "link.jsonl"], p / "new", fraction=0.5), "each file once"),
        # evidence is written too
        (lambda p: select_files(p / "rows" / "k.refused.jsonl", p / "rows" / "k.jsonl", fraction=0.5), "is an input"),
        (lambda p: select_files(p / "rows" / "refused.jsonl", p / "rows", fraction=0.5), "is an input"),
        (lambda p: select_files(p / "rows" / "refused.jsonl", p / "new", fraction=0.5), "is where refused rows go"),
        (lambda p: select_files(p / "raw", p / "refused.jsonl", fraction=0.5), "is where refused rows go"),
        (lambda p: select_files(p / "raw" / "AI2D.jsonl", p / "raw", fraction=0.5, save_to_disk=True), "no dataset"),
        # a glob that would find the output the next time
        (
            lambda p: select_files(f"{p}/raw/*.jsonl", p / "raw" / "k.jsonl", fraction=0.5),
            "the next run would read it",
        ),
        (lambda p: select_files(f"{p}/ra*/**/*.jsonl", p / "raw" / "new", fraction=0.5), "the next run would read it"),
        # the page has a place of its own
        *[
            (
                lambda p, page=page: select_files(p / "raw", p / "new", fraction=0.5, page=p / page),
                "expected a place for the page",
            )
            for page in ("raw/AI2D.jsonl", "new/GEOS.jsonl", "new/selection.json", "new/refused.jsonl", "full")
        ],
        (
            lambda p: select_files(p / "raw", p / "n", fraction=0.5, save_to_disk=True, page=p / "n" / "page.html"),
            "expected a place for the page",
        ),
    ],
)
def test_file_errors_leave_everything_as_it_was(tmp_path, make, message):
    corpus_folder(tmp_path / "raw")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.jsonl").write_text("{}\n")
    (tmp_path / "dir.jsonl").mkdir()
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "raw" / "AI2D.jsonl")
    (tmp_path / "rows").mkdir()
    for name in ("refused.jsonl", "k.refused.jsonl"):
        (tmp_path / "rows" / name).write_bytes((tmp_path / "raw" / "AI2D.jsonl").read_bytes())
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        make(tmp_path)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpus=corpora, fraction=fractions, rule=st.sampled_from(STEP_RULES), ties=st.sampled_from(["first", "hash"]))
def test_files_and_python_agree_on_any_corpus(tmp_path_factory, corpus, fraction, rule, ties):
    folder = tmp_path_factory.mktemp("any")
    for source in {source for source, _ in corpus}:
        rows = [
            {"question": "q", "steps_with_score": [{"step": "s", "score": s, "num_mc_total": 16} for s in scores]}
            for name, scores in corpus
            if name == source
        ]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if all(bis([s if s is not None else float("nan") for s in scores], 0.2) is None for _, scores in corpus):
        with pytest.raises(ValueError, match="no row can be used"):
            select_files(folder, folder / "out", rule, fraction=fraction, ties=ties)
        return
    report = select_files(folder, folder / "out", rule, fraction=fraction, ties=ties)
    selection = select(load_rollouts(folder), rule, fraction=fraction, ties=ties)
    assert report["total"]["kept"] == len(selection.kept)
    for name, row in selection.report["sources"].items():
        assert (report["sources"][name]["kept"], report["sources"][name]["cut_score"]) == (
            row["kept"],
            row["cut_score"],
        )
        lines = (folder / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        numbers = [int(i.split(":")[1]) for i in selection.kept if i.startswith(f"{name}:")]
        assert (folder / "out" / f"{name}.jsonl").read_bytes() == b"".join(lines[number] for number in numbers)


# ---- a rule that ranks by a field of its own


def write_hops(folder) -> list[dict]:
    """Rows with a number of their own, `hops & co`; some have none, or no number."""
    rng = random.Random(2)
    (folder / "raw").mkdir(parents=True)
    rows = []
    for source, n in (("AI2D", 30), ("GEOS", 11)):
        for index in range(n):
            hops = [index % 5, 2.5, "3", None, True, 10**400][index % 6] if index % 3 else rng.randint(0, 4)
            steps = [{"step": "a", "score": 0.5, "num_mc_total": 16}, {"step": "b", "score": 0.0, "num_mc_total": 16}]
            row = {"question": f"q{index}", "steps_with_score": steps, "rollout_id": f"{source}:{index}"}
            rows.append(row | {"source": source} | ({} if index % 7 == 3 else {"hops & co": hops}))
        text = "\n\n".join(json.dumps(row) for row in rows if row["source"] == source)
        (folder / "raw" / f"{source}.jsonl").write_text(f"{text}\n<no json>\n")
    return rows


def number(row) -> float | None:
    value = row.get("hops & co")
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


@pytest.mark.parametrize("ties", ["first", "hash"])
def test_the_rule_column_ranks_by_any_number_of_a_row(tmp_path, ties):
    rows = write_hops(tmp_path)
    options = {"fraction": 0.4, "column": "hops & co", "ties": ties, "seed": 2}
    report = select_files(tmp_path / "raw", tmp_path / "out", "column", **options)
    kept = [json.loads(line) for name in ("AI2D", "GEOS") for line in open(tmp_path / "out" / f"{name}.jsonl")]
    ids = {row["rollout_id"] for row in kept}
    for name, facts in report["sources"].items():
        mine = [row for row in rows if row["source"] == name]
        values = sorted((number(row) for row in mine if number(row) is not None), reverse=True)
        quota = max(1, int(len(values) * 0.4))
        inside = sorted((number(row) for row in mine if row["rollout_id"] in ids), reverse=True)
        assert inside == values[:quota] and facts["cut_score"] == values[quota - 1]
        assert facts["refused"] == {"no_score": len(mine) - len(values), "not_json": 1}
    if ties == "first":
        assert tuple(row["rollout_id"] for row in kept) == naive_top(rows, 0.4, number)
    assert (report["rule"], report["column"], report["alpha"]) == ("hops & co", "hops & co", None)
    # a dataset with that column, in Python: the same rows, and `top_fraction` is the same rule
    data = Dataset.from_list(
        [
            {
                "rollout_id": row["rollout_id"],
                "source": row["source"],
                "hops & co": number(row),
                "mc_scores": [0.5, 0.0],
            }
            for row in rows
        ]
    )
    assert set(select(data, "column", **options).kept) == ids
    assert select(data, "column", **options) == top_fraction(data, 0.4, score="hops & co", ties=ties, seed=2)
    # a Parquet file keeps fields of its own as text: numbers in a column of their own are read
    data.remove_columns("mc_scores").add_column("labels", [[0.5, 0.0]] * len(data)).add_column(
        "prompt", ["?"] * len(data)
    ).add_column("completions", [["a", "b"]] * len(data)).to_parquet(tmp_path / "rows.parquet")
    select_files(tmp_path / "rows.parquet", tmp_path / "again" / "kept.parquet", "column", **options)
    assert set(pq.read_table(tmp_path / "again" / "kept.parquet")["rollout_id"].to_pylist()) == ids


def test_the_rule_column_from_the_command_line_to_page_and_card(tmp_path, capsys):
    write_hops(tmp_path)
    argv = ["select", str(tmp_path / "raw"), "--rule", "column", "--fraction", "0.3", "--output"]
    assert main([*argv, str(tmp_path / "out")]) == 2
    assert "the rule column ranks by a column" in capsys.readouterr().err
    argv += [str(tmp_path / "out"), "--column", "hops & co", "--report", str(tmp_path / "page.html")]
    assert main(argv) == 0
    assert "refused: " in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "rollouts kept by hops &amp; co" in page and "the highest value of a column" in page
    assert "does not cut in this plane" in page
    card = dataset_card("you/kept", json.loads((tmp_path / "out" / "selection.json").read_text())).text
    assert "| rule | `hops & co`: the highest value of a column |" in card
    assert "--rule column --fraction 0.3 --column 'hops & co' --by" not in card
    assert "--rule column --fraction 0.3 --column 'hops & co' --ties first" in card


def test_every_rule_is_in_the_help_and_only_one_takes_a_column(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for rule in RULES.values():
        assert f"{rule.name}: {rule.words}" in text
    with pytest.raises(ValueError, match="the rule column ranks by a column, and no other rule does"):
        select(dataset([("a", [0.5])]), "bis", fraction=0.5, column="x")


def test_alpha_is_0_2_wherever_nobody_says_otherwise(tmp_path, capsys):
    scores = [[0.5, 0.0], [1.0, 1.0]]  # BIS .15 and .05 at alpha 0.05; .225 and .2 at 0.2
    assert add_bis({"mc_scores": scores})["bis"] == [(0.25 + 0.2) * 0.5, 0.2]
    data = dataset([("a", s) for s in scores])
    rows = [{"prompt": "q", "completions": ["x", "y"], "labels": s} for s in scores]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reports = [
        select(data, fraction=0.5).report,
        select_files(tmp_path / "a.jsonl", tmp_path / "b.jsonl", fraction=0.5),
    ]
    assert main(["select", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--fraction", "0.5"]) == 0
    reports.append(json.loads((tmp_path / "out" / "selection.json").read_text()))
    assert [report["alpha"] for report in reports] == [0.2] * 3
    assert [report["sources"]["a"]["cut_score"] for report in reports] == [0.225] * 3
    assert {f.name: f.default for f in fields(DataArguments)}["alpha"] == 0.2
    assert inspect.signature(compare_rules).parameters["alpha"].default == 0.2
