"""Metric modules loaded by the real `evaluate` library from the installed package, and combined."""

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

from trl_mprm import evaluate_modules
from trl_mprm.evaluation.metrics import best_of_n_metrics, step_metrics


evaluate = pytest.importorskip("evaluate")

STEP_MODULES = ("step_f1", "step_auc", "step_calibration", "first_error")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """`evaluate` copies a module into its cache before it imports it, as part of a package that is imported once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield


def solutions(n=40):
    generator = np.random.default_rng(0)
    references = [generator.choice([1, 0, -1], generator.integers(1, 6)).tolist() for _ in range(n)]
    predictions = [generator.random(len(labels)).round(3).tolist() for labels in references]
    return predictions, references, ["ab"[index % 2] for index in range(n)]


@pytest.mark.parametrize("name", STEP_MODULES)
def test_a_module_says_what_the_metric_says(name):
    predictions, references, sources = solutions()
    module = evaluate.load(evaluate_modules.path(name))
    expected = step_metrics(references, predictions, threshold=0.5, n_resamples=0)
    computed = module.compute(predictions=predictions, references=references)
    assert computed and computed == {key: pytest.approx(expected[key]) for key in computed}
    # Added one by one, and in batches.
    for labels, scores in zip(references[:5], predictions[:5], strict=True):
        module.add(predictions=scores, references=labels)
    module.add_batch(predictions=predictions[5:], references=references[5:])
    assert module.compute() == computed
    if "sources" in module.inputs_description:
        expected = step_metrics(references, predictions, sources, threshold="oracle", n_resamples=0)
        computed = module.compute(predictions=predictions, references=references, sources=sources, threshold="oracle")
        assert computed == {key: pytest.approx(expected[key]) for key in computed}


def test_modules_combine():
    predictions, references, _ = solutions()
    both = evaluate.combine([evaluate_modules.path(name) for name in STEP_MODULES])
    computed = both.compute(predictions=predictions, references=references)
    expected = step_metrics(references, predictions, threshold=0.5, n_resamples=0)
    assert {"macro_f1_pooled", "auc", "brier", "processbench_f1"} < set(computed)
    assert computed == {key: pytest.approx(expected[key]) for key in computed}


def test_modules_combine_with_a_threshold_and_sources():
    predictions, references, sources = solutions()
    both = evaluate.combine([evaluate_modules.path(name) for name in STEP_MODULES])
    given = {"sources": sources, "groups": list(range(len(sources))), "threshold": "oracle"}
    computed = both.compute(predictions=predictions, references=references, **given)
    expected = step_metrics(references, predictions, **given, n_resamples=0)
    assert len(computed) > 10 and computed == {key: pytest.approx(expected[key]) for key in computed}


@pytest.mark.parametrize("name", STEP_MODULES)
@pytest.mark.parametrize(
    ("references", "predictions"),
    [
        ([[True, False]], [[0.9, 0.2]]),
        ([[1, 0.7]], [[0.9, 0.2]]),
        ([[1, "-1"]], [[0.9, 0.2]]),
        ([[1, None]], [[0.9, 0.2]]),
        ([[1, 2]], [[0.9, 0.2]]),
        ([[1, -1]], [[0.9, float("nan")]]),
        ([[1, -1]], [["0.9", "0.2"]]),
        ([[1, -1]], [[0.9, 1.5]]),
        ([[1, -1]], [[0.9]]),
        ([[1, -1], [1]], [[0.9, 0.2]]),
        ([], []),
    ],
)
def test_a_module_refuses_what_the_metric_refuses(name, references, predictions):
    with pytest.raises(ValueError) as refused:
        step_metrics(references, predictions, threshold=0.5, n_resamples=0)
    module = evaluate.load(evaluate_modules.path(name))
    with pytest.raises(ValueError) as told:
        module.compute(predictions=predictions, references=references)
    assert str(told.value) == str(refused.value)
    if len(references) == len(predictions) == 1:
        with pytest.raises(ValueError):
            module.add(predictions=predictions[0], references=references[0])


@pytest.mark.parametrize("cast", [list, np.array, lambda labels: [float(label) for label in labels], tuple])
def test_a_module_accepts_what_the_metric_accepts(cast):
    predictions, references, _ = solutions()
    references, predictions = [cast(labels) for labels in references], [np.float32(scores) for scores in predictions]
    expected = step_metrics(references, predictions, threshold=0.5, n_resamples=0)
    computed = evaluate.load(evaluate_modules.path("step_f1")).compute(predictions=predictions, references=references)
    assert computed == {key: expected[key] for key in computed} and len(computed) == 3


@pytest.mark.parametrize("correct", ["no", None, 0.5, 2])
def test_best_of_n_refuses_what_is_neither_right_nor_wrong(correct):
    told = "candidate 1: correct is .*, expected True or False"
    given = {"predictions": [[0.9], [0.5]], "groups": ["q", "q"]}
    with pytest.raises(ValueError, match=told):
        best_of_n_metrics([True, correct], given["predictions"], given["groups"])
    with pytest.raises(ValueError, match=told):
        evaluate.load(evaluate_modules.path("best_of_n")).compute(references=[True, correct], **given)


def test_best_of_n():
    predictions, references, _ = solutions()
    correct, groups = [labels[0] == 1 for labels in references], [str(index // 4) for index in range(len(references))]
    computed = evaluate.load(evaluate_modules.path("best_of_n")).compute(
        predictions=predictions, references=correct, groups=groups
    )
    expected = best_of_n_metrics(correct, predictions, groups, n_resamples=0)
    assert computed == {key: expected[key] for key in computed} and len(computed) == 6


def test_every_folder_is_laid_out_as_a_space():
    root = Path(evaluate_modules.__file__).parent
    folders = {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(evaluate_modules.NAMES)
    for name in evaluate_modules.NAMES:
        files = {path.name for path in (root / name).iterdir()} - {"__pycache__"}
        assert files == {f"{name}.py", "__init__.py", "README.md", "app.py", "requirements.txt"}
        card = (root / name / "README.md").read_text()
        assert card.startswith("---\ntitle: ") and "sdk: gradio" in card and "- evaluate\n- metric\n" in card
        code = (root / name / f"{name}.py").read_text()
        # The import scanner of `evaluate` is a regular expression: several names on one line break it.
        assert not re.search(r"^import .*,", code, flags=re.MULTILINE)
        # The example of the card gives what it says.
        example = doctest.DocTestParser().get_doctest(card.split("```python\n")[1].split("```")[0], {}, name, name, 0)
        assert len(example.examples) == 4 and doctest.DocTestRunner().run(example).failed == 0
    with pytest.raises(ValueError, match="there is no metric module 'f1', expected one of step_f1, step_auc"):
        evaluate_modules.path("f1")
