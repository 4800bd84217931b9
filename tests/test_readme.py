"""The front page: short, true to its sources, and its recipe is the YAML's. Its blocks are run by tests/docs."""

import ast
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_mprm import ProcessRewardConfig, add_bis, load_rollouts
from trl_mprm.cli.train import DataArguments
from trl_mprm.demo.corpus import write_corpus
from trl_mprm.demo.settings import DEMO


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(beginning: str) -> str:
    """The text of the one fenced block that holds some words."""
    (found,) = [
        text for text in re.findall(r"^```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if beginning in text
    ]
    return found


def test_the_front_page_is_short():
    assert len(README.split()) <= 1200


def test_badges_and_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"badge/license-{project['license']}-" in README
    assert f"badge/python-{project['requires-python'].removeprefix('>=')}%2B-" in README
    table = README.split("| extra | for |\n|---|---|\n")[1].split("\n\n")[0]
    assert set(project["optional-dependencies"]) == {*re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE), "dev"}


def test_the_row_is_one_that_select_reads(tmp_path):
    row = json.loads(block('"mc_scores"'))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = load_rollouts(tmp_path / "rows.jsonl", image_root=ROOT)
    assert len(read["images"]) == 1 and read["completions"] == row["completions"]
    assert read["mc_scores"] == pytest.approx(row["mc_scores"]) and read["source"] == row["source"]


@pytest.mark.slow
def test_the_recipe_is_the_yaml(tiny_folders, tmp_path, monkeypatch):
    """The recipe runs on a tiny model and a small corpus, and every setting is that of the YAML file."""
    recipe = ROOT / "recipes" / "qwen2_5_vl_7b_bis10_qlora.yaml"
    write_corpus(tmp_path / "data", 12, DEMO.policy, np.random.default_rng(0))
    monkeypatch.chdir(tmp_path)
    parser = TrlParser((DataArguments, ProcessRewardConfig, ModelConfig))
    data, args, model = parser.parse_args_and_config(["--config", str(recipe), "--use_cpu"])
    text = block("Qwen2.5-VL-7B-Instruct")
    for theirs, ours in {
        f'"{data.dataset_name}"': repr(str(tmp_path / "data" / "annotations")),
        f'"{data.image_root}"': repr(str(tmp_path / "data")),
        f'"{model.model_name_or_path}"': repr(tiny_folders["qwen2_5_vl"]),
        "ProcessRewardConfig(\n": "ProcessRewardConfig(\n        use_cpu=True,\n",
        "trainer.push_to_hub()\n": "",
    }.items():
        assert text.count(theirs) == 1, theirs
        text = text.replace(theirs, ours)
    names: dict = {}
    exec(compile(text, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 1

    def made(function: str):
        """What the recipe passes to the trainer, before the trainer fills it in."""
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        (call,) = [call for call in calls if ast.unparse(call.func) == function]
        return eval(ast.unparse(call), names)

    args.model_init_kwargs = {"dtype": model.dtype}
    ours = made("ProcessRewardConfig")
    for field in fields(ProcessRewardConfig):
        assert getattr(ours, field.name) == getattr(args, field.name), field.name
    theirs = get_quantization_config(model).to_dict()
    theirs.pop("bnb_4bit_quant_storage")  # how the bytes are kept, for FSDP
    assert made("BitsAndBytesConfig").to_dict().items() >= theirs.items()
    ours, theirs = (vars(config) for config in (made("LoraConfig"), get_peft_config(model)))
    assert {name for name in ours if str(ours[name]) != str(theirs[name])} <= {"task_type"}  # the trainer sets it
    report = names["best"].report
    assert all(report[name] == getattr(data, name) for name in ("rule", "fraction", "ties"))
    assert names["scored"][0]["bis"] == add_bis(names["scored"][0], alpha=data.alpha)["bis"]
    assert names["scored"].num_rows == report["total"]["valid"]


# A difference and its interval: "+5.4 (+1.3 to +9.4)", "+5.4 points of F1, 95% interval +1.3 to +9.4", "+5.4, +1.3 to +9.4".
INTERVAL = re.compile(r"([+-][\d.]+)(?: points of F1)?,? \(?(?:95% interval )?([+-][\d.]+) to ([+-][\d.]+)")


def test_the_evidence_is_quoted_as_it_was_kept():
    section = README.split("<!-- evidence -->")[1].split("<!-- /evidence -->")[0]
    study = ROOT / "recipes" / "study"
    kept = (study / "table.md").read_text() + (study / "README.md").read_text()
    kept += (ROOT / "recipes" / "demo" / "results.json").read_text()
    quoted = set(INTERVAL.findall(section))
    assert len(quoted) >= 2 and "Not run" in section
    assert quoted <= set(INTERVAL.findall(kept))


def test_figures_of_the_demo_are_those_of_the_kept_run():
    results = json.loads((ROOT / "recipes" / "demo" / "results.json").read_text())
    page = (ROOT / "recipes" / "demo" / "README.md").read_text()
    lines = [line.split() for line in page.splitlines()]
    for subset, metrics in results["summary"]["subsets"].items():
        row = next(line for line in lines if line[:1] == [subset])
        for name in ("macro_f1_step_weighted", "auc"):
            assert f"{100 * metrics[name]['mean']:.1f}" in row
    for answer in results["verdict"].values():
        if isinstance(answer, dict):
            assert answer["words"] in page
    assert not results["quick"] and not results["full_fine_tuning"]


def test_the_tree_names_every_wing_and_only_files_that_exist():
    tree, wing, named = (ROOT / ".github" / "CONTRIBUTING.md").read_text().split("### The tree")[1], None, set()
    for line in tree.split("trl_mprm/\n")[1].split("recipes/")[0].splitlines():
        names = re.match(r" *((?:[\w/.]+, )*[\w/.]+)", line)[1].split(", ")
        wing = names[0] if line[2] != " " else wing
        for name in names:
            path = ROOT / "trl_mprm" / (name if line[2] != " " else wing + name)
            assert path.exists(), f"the tree names {path}"
            named.add(path.relative_to(ROOT / "trl_mprm").parts[0])
    top = {path.name for path in (ROOT / "trl_mprm").glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    assert named | {"templates"} == top  # templates belong to the pages and cards


def test_pages_name_files_that_exist():
    pages = [
        *ROOT.glob("*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("recipes/**/*.md"),
        *ROOT.glob("model_cards/README.md"),
    ]
    assert len(pages) >= 9
    for page in pages:
        text = page.read_text()
        for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / link).exists(), f"{page} links to {link}"
        for picture in re.findall(r'src(?:set)?="([\w./-]+)"', text):
            assert (page.parent / picture).exists(), f"{page} shows {picture}"
        for name in re.findall(r"`((?:tests|trl_mprm|recipes)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert any((ROOT / part / name).exists() for part in ("", "trl_mprm")), f"CONTRIBUTING names {name}"
