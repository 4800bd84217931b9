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
