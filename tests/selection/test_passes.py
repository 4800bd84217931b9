"""Two passes over shards: the narrow reader against the careful one, any division of the files against a full sort."""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from trl_mprm.cli import main
from trl_mprm.data.reading import Rollout, read_rollouts
from trl_mprm.data.shards import input_files, line_batches, lines_at, plan_shards
from trl_mprm.selection import engine, files, passes
from trl_mprm.selection.bis import add_bis
from trl_mprm.selection.files import select_files
from trl_mprm.selection.lines import LineReader, is_utf8
from trl_mprm.selection.passes import emit, score_shard
from trl_mprm.selection.report import build_report
from trl_mprm.selection.rules import STEP_RULES, CutSpec
from trl_mprm.selection.summary import MAX_GROUPS, merge, summarize
from trl_mprm.selection.threshold import find_cut, kept_rows, settle, tie_counts


def raw(scores, question="q", **fields):
    steps = [{"step": f"step {i}", "score": score, "num_mc_total": 16} for i, score in enumerate(scores)]
    return {"question": question, "steps_with_score": steps} | fields


# ---- narrow and careful

texts = st.one_of(
    st.sampled_from(
        ["a", "Final answer: 3", "\\frac{1}{2}", "é", "数学", "\u2003x", "\ud800", "“q”", '"', "\x7f", "×"]
    ),
    st.sampled_from(["", " ", "\n", "\u2003", "\xa0", "\u3000 "]),
    st.text(max_size=5),
)
numbers = st.one_of(
    st.sampled_from([0, 1, 0.0, -0.0, 0.5, 0.0625, 1.0, 1, 1]),
    st.sampled_from([float("nan"), float("inf"), -1, 1.5, "0.5", None, True, [], 1e-320, 10**30, "DIGITS"]),
)
totals = st.sampled_from([16, 16, 16, 16, 0, 0.0, 16.0, None, "16", "0", False, -1, 10**30, "DIGITS"])
step_records = st.fixed_dictionaries(
    {"step": texts, "score": numbers}, optional={"num_mc_total": totals, "num_mc_correct": st.just(3), "x": texts}
)
good_steps = st.fixed_dictionaries(
    {"step": st.sampled_from(["a", "b c", "数"]), "score": st.sampled_from([0, 0.5, 1.0])}
)
images = st.one_of(
    st.sampled_from(["1.png", "no.png", "../up.png", "", None, 7]),
    st.sampled_from(["gone/1.png", "gone/2.png", "gone/..", "gone/../..", "gone/", "gone/."]),
    st.lists(st.sampled_from(["1.png", "gone/1.png"]), max_size=2),
)
records = st.fixed_dictionaries(
    {"steps_with_score": st.one_of(st.lists(good_steps, min_size=1, max_size=4), st.lists(step_records, max_size=3))},
    optional={
        "question": st.one_of(st.just("q<image>\n"), texts, st.none()),
        "question_orig": texts,
        "prompt": st.one_of(texts, st.just([{"role": "user", "content": "q"}])),
        "image": images,
        "images": images,
        "source": st.one_of(texts, st.just(3)),
        "rollout_id": texts,
        "answer": st.one_of(texts, st.floats(), st.just([[1]]), st.just(["DIGITS"])),
    },
)
stepwise = st.fixed_dictionaries(
    {"prompt": texts, "completions": st.lists(texts, max_size=2), "labels": st.lists(numbers, max_size=2)}
)


def encoded(record, ascii_only, tight, twice):
    line = json.dumps(record, ensure_ascii=ascii_only, separators=(",", ":") if tight else None)
    if twice:  # a key that stands twice: the last one counts
        line = '{"steps_with_score": [{"step": "x", "score": 0.25}], "question": "twice", ' + line[1:]
    # A whole number that Python itself neither reads nor writes
    return line.replace('"DIGITS"', "1" * 5000).encode("utf-8", "surrogatepass")


lines = st.one_of(
    *[st.builds(encoded, records, st.booleans(), st.booleans(), st.sampled_from([False] * 5 + [True]))] * 4,
    st.builds(encoded, stepwise, st.booleans(), st.booleans(), st.just(False)),
    st.sampled_from(
        [b"", b" \t", b"{", b"[1]", b"null", b'{"question": "q", "steps_with_score": null}', b"\xef\xbb\xbf{}"]
    ),
    st.just(json.dumps(raw([0.5], x="long " * 100_000)).encode()),
    st.builds(lambda line: line.replace(b'"a"', b'"\xff"'), st.builds(encoded, records, *[st.just(False)] * 3)),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    PILImage.new("RGB", (3, 2)).save(folder / "1.png")
    return folder


def seen(scores):
    """What is remembered of each line, without the numbers that stand for sources and kinds."""
    kinds = [(scores.sources[kind["source"]], *kind.tolist()[1:]) for kind in scores.kinds]
    ids = [None] * len(scores.kind) if scores.ids is None else scores.ids.to_pylist()
    rows = zip(scores.kind, scores.group, scores.length, scores.check, ids, scores.words, strict=True)
    return [(None if kind < 0 else kinds[kind], *(str(value) for value in row)) for kind, *row in rows]


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.lists(lines, min_size=1, max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_narrow_way_sees_what_the_careful_way_sees(root, corpus, end, final, drop, words):
    file = root / "corpus.jsonl"
    file.write_bytes(end.join(corpus) + (end if final else b""))
    (shard,) = plan_shards(file, shard_bytes=2**30)
    narrow, summary = score_shard(shard, drop_answer_step=drop, words=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineReader, "_narrow", lambda self, lines: False)
        careful, expected = score_shard(shard, drop_answer_step=drop, words=True)
    assert seen(narrow) == seen(careful)
    for name in ("sources", "lines", "first", "halved"):
        assert getattr(summary, name) == getattr(expected, name)
    assert summary.kinds.tolist() == expected.kinds.tolist() and summary.count.tolist() == expected.count.tolist()
    # and both see what load_rollouts sees
    items = list(read_rollouts(file, drop_answer_step=drop))
    assert [row[0][1] < 0 for row in seen(narrow) if row[0]] == [isinstance(item, Rollout) for item in items]


def test_the_narrow_way_is_taken(root, monkeypatch):
    file = root / "usual.jsonl"
    rows = [
        raw([0.5, 0], image="1.png"),
        raw([1], image=["1.png"] * 2),
        raw([1], question_orig="数", answer=float("1e5")),
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    monkeypatch.setattr(LineReader, "_careful", lambda self, line: pytest.fail(f"careful: {line}"))
    scores, _ = score_shard(plan_shards(file)[0])
    assert len(scores.kind) == 3
    # one odd line among many costs a few more looks, not all of them
    careful = []
    monkeypatch.setattr(
        LineReader, "_careful", lambda self, line: careful.append(line) or self._append([line], [0], [0], [0], [])
    )
    file.write_text("".join(json.dumps(raw(["0.5"] if i == 40 else [0.5])) + "\n" for i in range(100)))
    score_shard(plan_shards(file)[0])
    assert len(careful) == 1


@given(st.binary(max_size=20) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_utf8_is_what_python_says(data):
    try:
        data.decode()
        expected = True
    except UnicodeDecodeError:
        expected = False
    assert is_utf8(data) == expected


# ---- any division of the files


def write_corpus(folder, corpus):
    for source in {source for source, _ in corpus}:
        rows = [raw(scores, f"{source} {i % 3}") for i, (name, scores) in enumerate(corpus) if name == source]
        for number, row in enumerate(rows):
            row["answer"] = "long " * 20_000 if number % 10 == 9 else "数学 \u2028 🙂"
            for step in row["steps_with_score"]:
                if step["score"] == "missing":
                    del step["score"]
        text = "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows)
        (folder / f"{source}.jsonl").write_text(text[: -1 if len(text) % 2 else None], "utf-8")


def by_a_full_sort(files, fraction, rule, alpha, ties="first", seed=0, by="source"):
    """Kept lines of each file: all rows scored one by one and sorted, stable, in file order or by a hash of their name."""
    parts, best = defaultdict(list), {file.stem: [] for file in files}
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").split("\n")):
            values = [step.get("score") for step in json.loads(line)["steps_with_score"]] if line else []
            if values and all(type(value) in (int, float) and 0 <= value <= 1 for value in values):
                columns = add_bis({"mc_scores": values}, alpha)
                score = {
                    "bis": columns["bis"],
                    "reliable": columns["bis_reliability"],
                    "low_mc": -sum(value for value in values) / len(values),
                }[rule]
                name = f"{seed}:{file.stem}:{number}".encode()
                tie = hashlib.blake2b(name, digest_size=8).digest() if ties == "hash" else b""
                parts[file.stem if by == "source" else None].append((-score, tie, file.stem, number))
    for scored in parts.values():
        for *_, name, number in sorted(scored, key=lambda row: row[:2])[: max(1, int(len(scored) * fraction))]:
            best[name].append(number)
    return {name: sorted(numbers) for name, numbers in best.items()}


def select_shards(shards, rule, order=None, **parameters):
    """The core, without files to write: kept lines by source, and the summaries before and after."""
    scored = [score_shard(shard) for shard in shards]
    order = order or list(range(len(shards)))
    summary = merge(pickle.loads(pickle.dumps(scored[index][1])) for index in order)
    cut = find_cut(summary, CutSpec(rule, **parameters))
    while not cut.settled:
        cut = settle(cut, [tie_counts(scored[index][0], cut) for index in order])
    kept = defaultdict(list)
    for shard, (scores, _) in zip(shards, scored, strict=True):
        kept[shard.source] += (kept_rows(scores, cut) + cut.first_line[shard.index]).tolist()
    after = merge(summarize(scored[index][0], kept_rows(scored[index][0], cut)) for index in order)
    return dict(kept), build_report(cut, summary, after)


some_scores = [0.0, 0.5, 1.0, 1.0, 1.0, 0.3]
odd_scores = ["0.5", float("nan"), None, "missing", 2, True]
scores_of_rows = st.one_of(
    *[st.lists(st.sampled_from(some_scores), min_size=1, max_size=4)] * 3,
    st.lists(st.sampled_from([0.5, *odd_scores]), max_size=2),
)
corpora = st.lists(st.tuples(st.sampled_from(["a", "é数"]), scores_of_rows), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    corpora,
    st.sampled_from([0.05, 0.25, 0.29, 0.5, 1.0]),
    st.sampled_from(STEP_RULES),
    st.sampled_from(["first", "hash"]),
    st.sampled_from(["source", None]),
    st.sampled_from([1, 300, 100_000, 2**30]),
    st.randoms(use_true_random=False),
)
def test_any_division_in_any_order_keeps_what_a_full_sort_keeps(
    tmp_path_factory, corpus, fraction, rule, ties, by, size, shuffler
):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, corpus)
    shards = plan_shards(folder, shard_bytes=size)
    order = list(range(len(shards)))
    shuffler.shuffle(order)
    options = {"fraction": fraction, "alpha": 0.2, "ties": ties, "seed": 3, "by": by}
    whole = select_shards(plan_shards(folder), rule, **options)
    assert select_shards(shards, rule, order, **options) == whole
    if rule in ("bis", "reliable", "low_mc"):
        files = sorted(folder.glob("*.jsonl"))
        assert whole[0] == by_a_full_sort(files, fraction, rule, 0.2, ties, 3, by)


def test_ties_of_a_large_block_are_found_through_a_window(tmp_path):
    # 5,000 ties: the first look is at a window of hashes, not at all of them
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(raw([1.0])) + "\n" for _ in range(5000)))
    shards = plan_shards(tmp_path, shard_bytes=50_000)
    scored = [score_shard(shard) for shard in shards]
    cut = find_cut(merge(summary for _, summary in scored), CutSpec("random", fraction=0.3, seed=1))
    ties = [tie_counts(scores, cut) for scores, _ in scored]
    assert sum(len(values) for part in ties for values, _ in part.inside.values()) < 1000
    cut = settle(cut, ties)
    assert cut.settled
    assert sum(len(kept_rows(scores, cut)) for scores, _ in scored) == 1500


def test_ids_that_repeat_still_give_the_exact_number(tmp_path):
    # one hash for all: the window misses, the second look finds them, and file order decides
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(raw([1.0], rollout_id="same")) + "\n" for _ in range(3000)))
    kept, _ = select_shards(plan_shards(tmp_path, shard_bytes=10_000), "random", fraction=0.1)
    assert kept == {"a": list(range(300))}


def test_a_summary_is_small_and_groups_are_counted_by_sample_beyond_a_limit(tmp_path):
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w") as file:
        for index in range(90_000):
            values = (rng.integers(0, 17, rng.integers(1, 6)) / 16).tolist()
            file.write(json.dumps(raw(values, f"q{index // 2}" if index < 20_000 else f"q{index}")) + "\n")
    summaries = [score_shard(shard)[1] for shard in plan_shards(tmp_path, shard_bytes=2**22)]
    summary = merge(summaries)
    assert len(pickle.dumps(summary)) < 1_000_000
    assert summary.halved == 1 and sum(map(len, summary.groups.values())) <= MAX_GROUPS
    kept, report = select_shards(plan_shards(tmp_path), "bis", fraction=0.1)
    assert report["groups_counted"] == "1 in 2, by hash"
    assert report["total"]["before"]["mean_group_size"] == pytest.approx(90_000 / 80_000, rel=0.01)
    again = merge([merge(summaries[2:]), merge(summaries[:2])])
    assert again.kinds.tolist() == summary.kinds.tolist() and again.halved == summary.halved
    assert all((again.groups[key] == summary.groups[key]).all() for key in summary.groups)


def test_processes_and_shards_write_the_same_bytes(tmp_path, monkeypatch):
    rng = random.Random(0)
    corpus = [
        (rng.choice("abc"), [rng.choice([0.0, 0.5, 1.0, "1"]) for _ in range(rng.randint(1, 4))]) for _ in range(400)
    ]
    (tmp_path / "raw").mkdir()
    write_corpus(tmp_path / "raw", corpus)
    select_files(tmp_path / "raw", tmp_path / "one", fraction=0.3, ties="hash")
    monkeypatch.setattr(engine, "POOL_BYTES", 0)
    monkeypatch.setattr(files, "plan_shards", partial(plan_shards, shard_bytes=1000))
    parents = []
    monkeypatch.setattr(engine, "emit", lambda *args: parents.append(os.getpid()) or emit(*args))
    select_files(tmp_path / "raw", tmp_path / "many", fraction=0.3, ties="hash")
    assert not parents  # the work was done by other processes
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


SELECT_AND_LIST_MODULES = """
import sys
from trl_mprm.cli import main
assert main(["select", *sys.argv[1:]]) == 0
print("imported:", *sys.modules)
"""


def test_a_selection_of_files_imports_no_large_library(tmp_path):
    """A thousand rows take as long as the imports: what makes a data set or opens a picture is loaded by who does so."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(raw([1.0, 0.0], image=f"{i}.png")) + "\n" for i in range(20)))
    command = [sys.executable, "-c", SELECT_AND_LIST_MODULES, tmp_path / "a.jsonl", "--output", tmp_path / "kept"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "trl_mprm.selection.writer" in modules
    large = {
        "torch",
        "pandas",
        "datasets",
        "huggingface_hub",
        "PIL",
        "pyarrow.compute",
        "jinja2",
        "asyncio",
        "ssl",
        "yaml",
    }
    assert not modules & large


def test_shards_end_at_line_ends(tmp_path):
    file = tmp_path / "a.jsonl"
    for text in (b"", b"a", b"a\n", b"\n\n\n", b"aaa\nb\n" * 7 + b"last", b"x" * 500 + b"\ny\n"):
        file.write_bytes(text)
        for size in (1, 3, 4, 100, 10**6):
            shards = plan_shards(file, shard_bytes=size)
            parts = [b"".join(line for _, lines in line_batches(shard) for line in lines) for shard in shards]
            assert b"".join(parts) == text and all(part.endswith(b"\n") for part in parts[:-1])
            assert [shard.index for shard in shards] == list(range(len(shards)))


# ---- containers


def containers(folder, name, data):
    """One file of lines, in each form that can be read."""
    (folder / "plain").mkdir()
    (folder / "plain" / f"{name}.jsonl").write_bytes(data)
    (folder / "gz").mkdir()
    (folder / "gz" / f"{name}.jsonl.gz").write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    (folder / "zst").mkdir()
    with pa.output_stream(str(folder / "zst" / f"{name}.jsonl.zst"), compression="zstd") as file:
        file.write(data)
    with zipfile.ZipFile(folder / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/", "")
        archive.writestr(f"annotations/{name}.jsonl", data)
    forms = [
        folder / "plain",
        str(folder / "plain" / "*.jsonl"),
        folder / "gz",
        folder / "zst",
        folder / "annotations.zip",
    ]
    return dict(zip(("folder", "glob", "gz", "zst", "zip"), forms, strict=True))


@pytest.fixture
def forms(tmp_path):
    rng = random.Random(2)
    rows = [raw([rng.choice([0.0, 0.5, 1.0, 1.0, "x"]) for _ in range(3)], f"q{i // 3}") for i in range(3000)]
    return containers(tmp_path, "AI2D", "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_every_container_gives_the_same_selection(forms, tmp_path):
    outputs = {}
    for form, place in forms.items():
        report = select_files(place, tmp_path / "out" / form, fraction=0.2, ties="hash")
        outputs[form] = (tmp_path / "out" / form / "AI2D.jsonl").read_bytes(), report["sources"]
        assert [path.name for path in input_files(place)]
    assert len(outputs["folder"][0].splitlines()) == outputs["folder"][1]["AI2D"]["kept"] > 100
    assert all(output == outputs["folder"] for output in outputs.values())
    # Parquet, as select wrote it: its rows are another text, and the same rows
    select_files(forms["folder"], tmp_path / "all" / "AI2D.parquet", fraction=1.0)
    select_files(tmp_path / "all" / "AI2D.parquet", tmp_path / "some" / "AI2D.parquet", fraction=0.2, ties="hash")
    ids = [item.row["rollout_id"] for item in read_rollouts(tmp_path / "some" / "AI2D.parquet")]
    numbers = {
        f"AI2D:{i}"
        for i, line in enumerate((tmp_path / "plain" / "AI2D.jsonl").read_bytes().splitlines(True))
        if line in outputs["folder"][0].splitlines(True)
    }
    assert set(ids) <= numbers and len(ids) == outputs["folder"][1]["AI2D"]["kept"]


def test_a_folder_with_an_archive_of_a_mac(forms, tmp_path):
    """`annotations.zip` is what a folder holds that has no rows of its own; what macOS adds to an archive is no row."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    forms["zip"].rename(folder / "annotations.zip")
    with zipfile.ZipFile(folder / "annotations.zip", "a") as archive:
        archive.writestr("__MACOSX/annotations/._AI2D.jsonl", b"\0\5\x16\7")
        archive.writestr("annotations/._AI2D.jsonl", b"\0\5\x16\7")
    assert len(list(read_rollouts(folder))) == 3000
    (folder / "own.jsonl").write_text("{\n")
    assert len(list(read_rollouts(folder))) == 1


def test_a_glob_takes_no_refusals_for_rows(tmp_path):
    for name in ("a", "refused"):
        (tmp_path / f"{name}.jsonl").write_text("{\n")
    assert input_files(tmp_path / "*.jsonl") == input_files(tmp_path) == [tmp_path / "a.jsonl"]


# ---- Parquet


def write_parquet(path, rows, groups=7):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=groups)
    return path


def test_parquet_is_divided_by_row_groups(tmp_path):
    rng = random.Random(3)
    rows = [
        raw([rng.choice([0.0, 0.5, 1.0]) for _ in range(3)], f"q{i}", answer=f"{i} " * 50, when=datetime(2024, 1, 1))
        for i in range(100)
    ]
    file = write_parquet(tmp_path / "in" / "a.parquet", rows)
    shards = plan_shards(file, shard_bytes=1)
    assert len(shards) == 15 and len(plan_shards(file)) == 1
    assert {len(plan_shards(file, shard_bytes=size)) for size in (3000, 10_000)} <= set(range(2, 15))
    # the first pass reads what rows are made of, the second one all
    first = [json.loads(line) for shard in shards for _, lines in line_batches(shard) for line in lines]
    assert first == [{key: row[key] for key in ("question", "steps_with_score")} for row in rows]
    (seen, line), (_, last) = lines_at(shards[2], np.array([1, 6]), None)
    assert json.loads(seen) == first[15] and json.loads(line) == rows[15] | {"when": "2024-01-01 00:00:00"}
    assert json.loads(last)["question"] == "q20"
    for ties in ("first", "hash"):
        options = {"fraction": 0.3, "ties": ties}
        assert select_shards(shards, "bis", **options) == select_shards(plan_shards(file), "bis", **options)
    select_files(file, tmp_path / "kept.parquet", fraction=1.0)
    assert pq.read_table(tmp_path / "kept.parquet")["rollout_id"].to_pylist() == [f"a:{i}" for i in range(100)]


def test_parquet_without_rows_or_without_rollouts(tmp_path):
    empty = pa.table({"prompt": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    assert list(read_rollouts(tmp_path / "empty.parquet")) == []
    items = list(read_rollouts(write_parquet(tmp_path / "other.parquet", [{"text": "x"}] * 3)))
    assert [item.reason for item in items] == ["unknown_format"] * 3


@pytest.mark.parametrize("harm", ["cut", "bits", "text"])
def test_damaged_parquet_is_one_clear_error(tmp_path, harm, capsys):
    file = write_parquet(tmp_path / "a.parquet", [raw([1.0, 0.0])] * 20)
    if harm == "text":
        question = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
        pq.write_table(pa.table({"question": question}), file)
    else:
        data = bytearray(file.read_bytes())
        data[20:200] = b"\xff" * 180
        file.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    assert main(["select", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {file}: expected a whole file, and it is damaged")
    assert not (tmp_path / "out").exists()


def test_a_parquet_file_that_changes_between_the_passes(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", [raw([1.0, 0.0])] * 20)
    (shard,) = plan_shards(file)
    scores, summary = score_shard(shard)
    write_parquet(file, [raw([0.0, 1.0])] * 20)
    os.utime(file, ns=(0, shard.stamp[1]))
    shard = shard._replace(stamp=(file.stat().st_size, shard.stamp[1]))
    with pytest.raises(ValueError, match="a.parquet changed while it was read"):
        emit(shard, scores, find_cut(summary, CutSpec("bis", fraction=1.0)), io.BytesIO(), io.BytesIO())


def test_pictures_inside_parquet(tmp_path):
    PILImage.new("RGB", (3, 2)).save(picture := io.BytesIO(), "PNG")
    broken = {"bytes": b"no picture", "path": None}
    rows = [
        {"images": [{"bytes": picture.getvalue(), "path": "1.png"} if i else broken], "prompt": f"q{i % 2}"}
        | {"completions": ["a", "b"], "labels": [1.0, 0.0]}
        for i in range(5)
    ]
    write_parquet(tmp_path / "in" / "a.parquet", rows, groups=2)
    report = select_files(tmp_path / "in", tmp_path / "out", fraction=0.5)
    assert report["total"]["refused"] == {"image_unreadable": 1} and report["total"]["before"]["mean_group_size"] == 2
    items = list(read_rollouts(tmp_path / "out" / "a.jsonl"))
    assert [item.row["images"] for item in items] == [[{"path": None, "bytes": picture.getvalue()}]] * 2
    bare = [row | {"images": [image["bytes"] for image in row["images"]]} for row in rows]  # a column of list<binary>
    write_parquet(tmp_path / "bare" / "a.parquet", bare)
    report = select_files(tmp_path / "bare", tmp_path / "bare-out", fraction=0.5)
    assert report["total"]["refused"] == {"image_unreadable": 1} and report["images"] == "checked"
    items = list(read_rollouts(tmp_path / "bare-out" / "a.jsonl"))
    assert [item.row["images"] for item in items] == [[{"path": None, "bytes": picture.getvalue()}]] * 2
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1] | {"images": [{"bytes": "no base64"}]}) + "\n")
    assert [item.reason for item in read_rollouts(tmp_path / "b.jsonl")] == ["image_unreadable"]


def test_nothing_is_unpacked(forms, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert len(list(read_rollouts(forms["zip"]))) == 3000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["gz", "zst", "zip"])
@pytest.mark.parametrize("harm", ["cut", "bits"])
def test_a_damaged_archive_is_one_clear_error(forms, tmp_path, form, harm, capsys):
    (file,) = input_files(forms[form])
    data = bytearray(file.read_bytes())
    if harm == "cut":
        data = data[: len(data) * 2 // 3]
    elif form == "zst":
        data[:4] = b"\0\0\0\0"
    else:
        data[len(data) // 2 : len(data) // 2 + 50] = b"\0" * 50
    file.write_bytes(data)
    assert main(["select", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and file.name in error and "damaged" in error
    assert not (tmp_path / "out").exists()


def test_two_members_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a/x.jsonl", "{}")
        archive.writestr("b/x.jsonl", "{}")
    with pytest.raises(ValueError, match="have one name, and the name is the source"):
        plan_shards(tmp_path / "z.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(FileNotFoundError, match="expected .*jsonl members"):
        plan_shards(tmp_path / "empty.zip")


# ---- what is no file of rollouts


@pytest.mark.parametrize("kind", ["a folder", "a pipe or a device", "a link to nothing"])
def test_what_is_no_file_is_named(tmp_path, kind, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(raw([1.0])) + "\n")
    if kind == "a folder":
        (folder / "b.jsonl").mkdir()
    elif kind == "a link to nothing":
        (folder / "b.jsonl").symlink_to("nowhere")
    else:
        os.mkfifo(folder / "b.jsonl")
    names = [folder, folder / "*.jsonl"] + ([folder / "b.jsonl"] if kind.startswith("a pipe") else [])
    for name in names:
        assert main(["select", str(name), "--output", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.startswith(
            f"error: {folder}/b.jsonl: expected a file with rollouts, and it is {kind}"
        )
    assert not (tmp_path / "out").exists()


def test_a_line_without_end_is_one_clear_error(tmp_path, monkeypatch, capsys):
    """A bomb: few bytes that unpack to more than the memory holds, without one line end."""
    monkeypatch.setattr("trl_mprm.data.shards.LINE_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b"0" * 2**22)
    (tmp_path / "b.jsonl").write_bytes(b"0" * 2**22)
    for name, place in (("annotations.zip", "annotations.zip/a.jsonl"), ("b.jsonl", "b.jsonl")):
        assert main(["select", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}/{place}: expected one rollout per line, got a line of more than")


def test_memory_that_is_full_is_one_clear_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text((json.dumps(raw([1.0])) + "\n") * 3)

    def full(self):
        raise MemoryError

    monkeypatch.setattr(LineReader, "to_arrays", full)
    monkeypatch.setattr(passes, "LINES_AS_NUMBERS", 1)
    assert main(["select", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path}/a.jsonl: expected lines that fit into memory, and after 3 of them" in capsys.readouterr().err


def test_what_the_first_pass_takes_the_writer_can_read(tmp_path):
    """How deep a value may be nested depends on the stack, which is deeper where the kept rows are written."""
    depths = range(600, 1001)
    rows = [
        json.dumps(raw([1.0, 0.0], f"q{depth}", x="X")).replace('"X"', "[" * depth + "]" * depth) for depth in depths
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    report = select_files(tmp_path / "a.jsonl", tmp_path / "kept.parquet", fraction=1.0)
    assert (
        report["total"]["read"] == len(rows) == report["total"]["kept"] + report["total"]["refused"].get("not_json", 0)
    )
    assert pq.read_table(tmp_path / "kept.parquet").num_rows == report["total"]["kept"]


# ---- every row is accounted for


def test_read_is_kept_and_dropped_and_refused(tmp_path):
    rows = [raw([1.0, 0.0]), raw([1.0]), raw(["1"]), raw([0.5]), raw([]), raw([1.0], source="other"), {"x": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n{\n")
    report = select_files(tmp_path / "a.jsonl", tmp_path / "out", fraction=0.5)
    for row in (*report["sources"].values(), report["total"]):
        assert row["read"] == row["kept"] + row["dropped"] + sum(row["refused"].values())
    reasons = {"not_json": 1, "unknown_format": 1, "empty_steps": 1, "score_not_a_number": 1}
    assert report["total"]["refused"] == reasons == report["sources"]["a"]["refused"]
    assert (report["total"]["read"], report["total"]["kept"], report["total"]["dropped"]) == (8, 2, 2)
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in refused] == [
        (3, "score_not_a_number"), (5, "empty_steps"), (7, "unknown_format"), (9, "not_json"),
    ]  # fmt: skip


def test_strict_stops_at_the_first(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [raw([1.0]), raw([2]), {}])) + "\n")
    (tmp_path / "b.jsonl").write_text("{\n")
    argv = [
        "select",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--output",
        str(tmp_path / "out"),
        "--strict",
    ]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert (
        f"score_out_of_range: refused 1 rows (a 1), the first at {tmp_path}/a.jsonl:2" in error and "strict" in error
    )
    assert not (tmp_path / "out").exists()
    assert main(argv[:-1]) == 0


def test_a_score_of_0_that_nobody_measured_is_no_negative(tmp_path):
    early_stop = raw([0.5, 0.0, 0.0])
    for step in early_stop["steps_with_score"][1:]:
        step["num_mc_total"] = 0
    (tmp_path / "a.jsonl").write_text(json.dumps(early_stop) + "\n")
    report = select_files(tmp_path / "a.jsonl", tmp_path / "out", fraction=1)
    assert (report["total"]["error_step_share"], report["total"]["mixed_share"]) == (0.0, 0.0)


# ---- a file that changes, a full disk, a kill


def test_a_file_that_changes_between_the_passes(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(raw([1.0, 0.0])) + "\n" for _ in range(10)))
    (shard,) = plan_shards(file)
    scores, summary = score_shard(shard)
    cut = find_cut(summary, CutSpec("bis", fraction=1.0))
    out = tmp_path / "out"

    def second_pass():
        with open(out, "wb") as kept, open(tmp_path / "refused", "wb") as refused:
            emit(shard, scores, cut, kept, refused)

    second_pass()
    assert out.read_bytes() == file.read_bytes()
    text, state = file.read_bytes(), file.stat()
    file.write_bytes(text.replace(b"step 1", b"step 9", 1))  # same size; and the old time of change
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match="a.jsonl changed while it was read"):
        second_pass()
    file.write_bytes(text)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="changed while it was read"):
        second_pass()
    file.write_bytes(text[:-50])
    for again in (
        second_pass,
        lambda: score_shard(shard),
        lambda: list(lines_at(shard, np.arange(10), scores.length)),
    ):
        with pytest.raises(ValueError, match="changed while it was read"):
            again()


# with a process for each of the two files
RUN = """
import sys
from trl_mprm.selection import engine
from trl_mprm.cli import main
engine.POOL_BYTES = 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 8 MB in two files, and what a whole run makes of them."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "raw").mkdir()
    rng = random.Random(5)
    for name in ("a", "b"):
        rows = (raw([rng.choice([0.0, 0.5, 1.0]) for _ in range(4)], "q" * 3000) for _ in range(1200))
        (folder / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    select_files(folder / "raw", folder / "whole", fraction=0.9)
    return folder / "raw", {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}


def test_a_full_disk_is_one_clear_error_and_nothing_half_written(large, tmp_path):
    import resource

    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    argv = [sys.executable, "-c", RUN, "select", large[0], "--fraction", "0.9", "--output", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert (
        error.startswith(f"error: {tmp_path}/out: expected room for the kept rows")
        and "no output was touched" in error
    )
    assert not list((tmp_path / "out").iterdir())


FULL_DISK = """
import errno, sys, time
from pathlib import Path
from trl_mprm.selection import engine
from trl_mprm.cli import main

def emit(shard, scores, cut, kept, refused):
    if shard.index == 0:
        time.sleep(0.3)
        raise OSError(errno.ENOSPC, "No space left on device")
    end, folder, n = time.monotonic() + 1, Path(kept.name).parent, 0
    while time.monotonic() < end:
        (folder / f"{(n := n + 1)}.more").touch()

engine.POOL_BYTES, engine.emit = 0, emit
sys.exit(main(sys.argv[1:]))
"""


def test_a_worker_that_still_writes_when_the_disk_is_full(large, tmp_path):
    argv = [sys.executable, "-c", FULL_DISK, "select", large[0], "--fraction", "0.9", "--output", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out: expected room for the kept rows")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("workers_first", [False, True])
def test_ctrl_c_is_one_line(large, tmp_path, workers_first):
    argv = ["select", str(large[0]), "--fraction", "0.9", "--output", str(tmp_path / "out")]
    slow = FULL_DISK.replace("shard.index == 0", "False").replace("+ 1,", "+ 60,")  # workers that are at it
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job of `&` ignores it
    run = subprocess.Popen(
        [sys.executable, "-c", heard + slow, *argv], stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    while run.poll() is None and not list(tmp_path.glob("out/.select.*.part/*.more")):
        time.sleep(0.01)
    if workers_first:  # the terminal reaches all of them, in any order
        for worker in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            os.kill(int(worker), signal.SIGINT)
        time.sleep(0.1)  # the parent notices
        os.kill(run.pid, signal.SIGINT)
    else:
        os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130 and errors.splitlines()[1:] == ["error: interrupted"]  # the first one: rows refused
    assert not list((tmp_path / "out").iterdir())


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


READY = ".select.*.part/ready"


@pytest.mark.parametrize("sign", [".select.*.part/0.kept", f"{READY}/refused.jsonl", f"{READY}/a.jsonl", "a.jsonl"])
def test_killed_at_any_point_and_run_again(large, tmp_path, sign):
    out, whole = tmp_path / "out", large[1]
    argv = ["select", str(large[0]), "--fraction", "0.9", "--output", str(out)]
    run = subprocess.Popen([sys.executable, "-c", RUN, *argv], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while run.poll() is None and not any(out.glob(sign)):
        time.sleep(0.0005)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if run.poll() is None else []
    run.send_signal(signal.SIGKILL)
    run.wait()
    end = time.monotonic() + 10
    while any(_is_alive(worker) for worker in workers):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.01)
    there = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
    for name, data in there.items():
        assert data == whole[name], f"half of {name}"
    if "selection.json" in there:
        assert there.keys() == whole.keys()
    assert main(argv) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole  # and what was left is gone
