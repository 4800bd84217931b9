"""The README quotes the kept run, word by word."""

import json
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]


def test_figures_are_those_of_the_kept_run():
    results = json.loads((ROOT / "recipes" / "demo" / "results.json").read_text())
    for readme in (ROOT / "README.md", ROOT / "recipes" / "demo" / "README.md"):
        lines = [line.split() for line in readme.read_text().splitlines()]
        for subset, metrics in results["summary"]["subsets"].items():
            row = next(line for line in lines if line[:1] == [subset])
            for name in ("macro_f1_step_weighted", "auc"):
                assert f"{100 * metrics[name]['mean']:.1f}" in row
        for answer in results["verdict"].values():
            if isinstance(answer, dict):
                assert answer["words"] in readme.read_text()
    assert not results["quick"] and not results["qlora"]


def test_the_second_run_of_the_demo_is_told_as_it_came_out():
    results = json.loads((ROOT / "recipes" / "demo" / "results_again.json").read_text())
    told = (ROOT / "recipes" / "demo" / "README.md").read_text().split("results_again.json")[-1].split("\n\n")[0]
    for subset in ("random10", "bis10", "full", "true10", "bis10-lora"):
        assert f"{100 * results['summary']['subsets'][subset]['macro_f1_step_weighted']['mean']:.1f} for" in told
    assert "BIS-10% against random-10%: ahead, +14.2 points F1 (95% interval +6.6 to +21.8, 5 seeds)" in json.dumps(
        results["verdict"]
    )


def test_the_tree_names_every_wing_and_only_files_that_exist():
    tree, wing, named = (ROOT / "README.md").read_text().split("## The tree")[1], None, set()
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
        for name in re.findall(r"`((?:tests|trl_mprm|recipes)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert any((ROOT / part / name).exists() for part in ("", "trl_mprm")), f"CONTRIBUTING names {name}"


def test_the_study_is_quoted_as_its_table_says():
    section = (ROOT / "README.md").read_text().split("### The study")[1].split("\n## ")[0]
    table = (ROOT / "recipes" / "study" / "table.md").read_text()
    quoted = re.findall(r"([+-][\d.]+)(?: points F1 | AUC | )\(([+-][\d.]+) to ([+-][\d.]+)\)", section)
    assert len(quoted) == 5
    assert all(f"{mean} ({low} to {high})" in table for mean, low, high in quoted)
