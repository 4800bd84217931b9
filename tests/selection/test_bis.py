import pickle
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from trl_mprm.selection.bis import BIS_VERSION, _AddBIS, add_bis, balanced_information


COLUMNS = ["bis", "bis_p_pos", "bis_reliability", "bis_n_steps"]

# Scores of a row, broken ones among them; null means "not measured"
broken = st.sampled_from([float("nan"), -0.5, 1.5, float("inf")])
steps = st.lists(st.one_of(st.integers(0, 16).map(lambda k: k / 16), st.floats(0, 1), st.none(), broken), max_size=12)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def by_the_book(scores, alpha):
    """The formula of the paper, in plain Python over the measured steps of one rollout."""
    scores = [score for score in scores if score is not None]
    if not scores or any(not 0 <= score <= 1 for score in scores):
        return None, None, None, len(scores)
    positive = [score for score in scores if score > 0]
    total = 0.0
    for score in positive:
        total += score
    p_pos = len(positive) / len(scores)
    reliability = total / len(positive) if positive else 1.0
    return (p_pos * (1 - p_pos) + alpha) * reliability, p_pos, reliability, len(scores)


@pytest.mark.parametrize(
    ("scores", "p_pos", "reliability", "bis"),
    [  # Appendix I of the paper, alpha = 0.05
        ([0.875, 0.875, 0.9375, 0.875, 0, 0, 0, 0, 0, 0], 0.4, 0.890625, 0.25828125),
        ([0.5625, 0.6875, 0.6875, 0.0625, 0, 0, 0, 0], 0.5, 0.5, 0.15),
        ([0.0625] * 4 + [0] + [0.0625] * 2 + [0, 0], 2 / 3, 0.0625, 0.0170138889),
    ],
)
def test_worked_examples_of_the_paper(scores, p_pos, reliability, bis):
    row = add_bis({"mc_scores": scores}, alpha=0.05)
    assert row["bis_p_pos"] == p_pos
    assert row["bis_reliability"] == reliability
    assert row["bis"] == pytest.approx(bis, abs=5e-11)
    assert row["bis_n_steps"] == len(scores)


def test_pure_rollouts_score_alpha_times_reliability():
    # no positive step: p_pos = 0 and R = 1; all positive: p_pos = 1 and R is their mean
    rows = add_bis({"mc_scores": [[0.0, 0.0], [1.0, 1.0], [0.5, 0.25]]}, alpha=0.2)
    assert rows["bis"] == [0.2, 0.2, pytest.approx(0.2 * 0.375)]
    assert rows["bis_reliability"] == [1.0, 1.0, 0.375]


@given(st.lists(steps, min_size=1, max_size=8), st.sampled_from([0.0, 0.05, 0.2]))
def test_row_batch_and_arrow_follow_the_formula_to_the_last_bit(rows, alpha):
    expected = [by_the_book(scores, alpha) for scores in rows]
    ids = [str(i) for i in range(len(rows))]
    by_row = [add_bis({"mc_scores": scores, "rollout_id": "0"}, alpha) for scores in rows]
    batch = add_bis({"mc_scores": rows, "rollout_id": ids}, alpha)
    table = add_bis(pa.table({"mc_scores": pa.array(rows, pa.list_(pa.float64())), "rollout_id": ids}), alpha)
    assert [tuple(row[name] for name in COLUMNS) for row in by_row] == expected
    assert list(zip(*(batch[name] for name in COLUMNS), strict=True)) == expected
    assert list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True)) == expected


@pytest.mark.parametrize("as_table", [False, True])
def test_raw_steps_give_the_same_columns_as_their_scores(as_table):
    raw = [
        [{"score": 0.5, "num_mc_total": 16}, {"score": 0.0, "num_mc_total": 0}],  # the second is not measured
        [{"score": 0.5, "num_mc_total": None}, {"score": 0.0, "num_mc_total": 16}],
        [{"score": None, "num_mc_total": 16}],  # measured, and yet no score: broken
        [],
        None,
    ]
    plain = [[0.5, None], [0.5, 0.0], [float("nan")], [], None]
    batch = {"steps_with_score": raw, "source": ["x"] * 5}
    if as_table:
        batch = pa.table(batch)
        assert add_bis(batch).select(COLUMNS).to_pydict() == add_bis({"mc_scores": plain})
    else:
        assert add_bis(batch) == add_bis({"mc_scores": plain})
        assert add_bis({"steps_with_score": raw[0]})["bis_n_steps"] == 1


@pytest.mark.parametrize("total", ["0", False, 0.0, 0])
def test_a_step_that_was_never_tried_is_no_negative_however_0_is_written(total):
    raw = [[{"score": 0.5, "num_mc_total": None}, {"score": 0.0, "num_mc_total": total}]]
    for row in ({"steps_with_score": raw}, pa.table({"steps_with_score": raw})):
        columns = add_bis(row)
        columns = columns.to_pydict() if isinstance(row, pa.Table) else columns
        assert (columns["bis_n_steps"], columns["bis_p_pos"]) == ([1], [1.0])


def test_a_score_that_is_no_number_makes_the_row_invalid():
    for scores in (["0.5", "1"], [True, False]):
        raw = [{"score": score} for score in scores]
        for row in ({"mc_scores": scores}, {"steps_with_score": raw}):
            assert add_bis(row)["bis"] is None
        for column in ({"mc_scores": [scores]}, {"steps_with_score": [raw]}):
            assert add_bis(pa.table(column))["bis"].to_pylist() == [None]


def test_all_forms_of_map_give_equal_columns(tmp_path):
    picture = tmp_path / "a.png"
    PILImage.new("RGB", (3, 2)).save(picture)
    features = Features({"images": List(Image()), "mc_scores": List(Value("float64")), "source": Value("string")})
    rows = [
        {"images": [{"path": str(picture), "bytes": None}], "mc_scores": [0.1, 0.2, 0.7, 0.0][: i % 5], "source": "x"}
        for i in range(25)
    ]
    data, alpha = Dataset.from_list(rows, features=features), {"alpha": 0.2}
    by_row = data.map(add_bis, fn_kwargs=alpha)
    arrow = data.with_format("arrow").map(add_bis, batched=True, batch_size=7, fn_kwargs=alpha).with_format(None)
    batched = data.map(add_bis, batched=True, batch_size=7, fn_kwargs=alpha)
    parallel = data.map(add_bis, batched=True, num_proc=2, fn_kwargs=alpha)
    stream = data.to_iterable_dataset()
    arrow_stream = stream.with_format("arrow").map(add_bis, batched=True, fn_kwargs=alpha).with_format(None)
    expected = {name: by_row[name][:] for name in COLUMNS}
    assert expected["bis"][4] == by_the_book([0.1, 0.2, 0.7, 0.0], 0.2)[0]
    for other in (arrow, batched, parallel):
        assert {name: other[name][:] for name in COLUMNS} == expected
        assert other.features == by_row.features
        assert other[3]["images"][0].size == (3, 2)
    for other in (stream.map(add_bis, fn_kwargs=alpha), stream.map(add_bis, batched=True, fn_kwargs=alpha)):
        assert {name: [row[name] for row in other] for name in COLUMNS} == expected
    assert {name: [row[name] for row in arrow_stream] for name in COLUMNS} == expected


def formatted(form, stream):
    if form == "polars":
        pytest.importorskip("polars")
    data = Dataset.from_dict({"mc_scores": [[1.0, None], [0.5, 0.0], [0.0, 1.0]], "source": ["x"] * 3})
    return (data.to_iterable_dataset() if stream else data).with_format(form)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "polars"])
def test_a_format_that_loses_what_was_not_measured_is_refused_with_the_call_that_helps(form, batched, stream):
    data = formatted(form, stream)
    with pytest.raises(ValueError, match=r"call dataset.with_format\(None\) first"):
        list(data.map(add_bis, batched=batched))
    expected = list(formatted(None, stream).map(add_bis))
    assert list(data.with_format(None).map(add_bis, batched=batched)) == expected
    arrow = data.with_format("arrow").map(add_bis, batched=batched).with_format(None)
    assert list(arrow) == expected and expected[0]["bis_n_steps"] == 1


@pytest.mark.parametrize("steps", [["0.5"], [None, 0.5], [[0.5]], [3]])
def test_a_raw_step_that_is_none_makes_the_row_invalid(steps):
    for row in ({"steps_with_score": steps}, {"steps_with_score": [steps], "source": ["x"]}):
        if not isinstance(steps[0], list) or "source" in row:
            assert add_bis(row)["bis"] in (None, [None])


def test_an_arrow_column_that_holds_no_lists():
    for column in ({"mc_scores": [0.5]}, {"steps_with_score": ["text"]}, {"mc_scores": [{"a": 1}]}):
        with pytest.raises(ValueError, match="expected a column of lists, one score"):
            add_bis(pa.table(column))
    assert add_bis(pa.table({"mc_scores": pa.array([[0.5, 0.0]], pa.large_list(pa.float32()))}))["bis"][0].as_py() > 0
    assert (
        add_bis(pa.table({"mc_scores": [None]}))["bis"].to_pylist() == [add_bis({"mc_scores": None})["bis"]] == [None]
    )
    raw = pa.table({"steps_with_score": [["0.5"]]})  # lists of text: no step has a score
    assert add_bis(raw)["bis"].to_pylist() == [None]


def test_mapping_twice_replaces_the_columns():
    data = Dataset.from_dict({"mc_scores": [[0.5, 0.0]]}).with_format("arrow")
    twice = data.map(add_bis, batched=True, fn_kwargs={"alpha": 0.05}).map(add_bis, batched=True)
    assert twice.column_names == ["mc_scores", *COLUMNS]
    assert twice.with_format(None)["bis"][:] == [(0.25 + 0.2) * 0.5]


def test_a_sliced_table_is_scored_by_its_own_rows():
    table = pa.table({"mc_scores": [[1.0], [0.5, 0.0], None, [0.25]]})
    assert add_bis(table.slice(1, 3))["bis_n_steps"].to_pylist() == [2, 0, 1]
    assert add_bis(table.slice(0, 0)).num_rows == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_bis({"scores": [0.5]}), "expected a column `mc_scores` or `steps_with_score`"),
        (lambda: add_bis({"mc_scores": [0.5]}, alpha=-1), "alpha must be a number of at least 0"),
        (lambda: add_bis({"mc_scores": [0.5]}, alpha=float("nan")), "alpha must be a number of at least 0"),
        (lambda: add_bis({"mc_scores": np.array([0.5])}), "with_format"),
        (lambda: add_bis([0.5]), "with_format"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_version_is_part_of_the_fingerprint():
    assert add_bis == _AddBIS(BIS_VERSION)
    assert Hasher.hash(_AddBIS("other")) != Hasher.hash(add_bis)
    assert pickle.loads(pickle.dumps(add_bis)) == add_bis
    code = "from datasets.fingerprint import Hasher; from trl_mprm import add_bis; print(Hasher.hash(add_bis))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert done.stdout.strip() == Hasher.hash(add_bis)


def test_core_takes_rollouts_without_steps():
    parts = balanced_information(np.array([]), np.array([0, 0, 0]))
    assert np.isnan(parts["bis"]).all() and parts["bis_n_steps"].tolist() == [0, 0]
