"""`trl-mprm recipes` lists the recipes and copies one, and overwrites nothing."""

from trl_mprm.cli import main
from trl_mprm.cli.recipes import find_recipes


def test_recipes_are_listed_with_what_they_are(capsys):
    assert main(["recipes"]) == 0
    *listed, empty, hint = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(find_recipes()) and len(set(listed)) == len(listed)
    assert all(len(line.split(maxsplit=1)[1]) > 5 and len(line) <= 100 for line in listed)
    assert not any(line.startswith(("bench", "study", "demo")) for line in listed)


def test_a_recipe_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "accelerate/zero3.yaml"]) == 0
    copy = tmp_path / "recipes" / "accelerate" / "zero3.yaml"
    assert copy.read_bytes() == find_recipes()["accelerate/zero3.yaml"].read_bytes()
    assert "copied: recipes/accelerate/zero3.yaml" in capsys.readouterr().out
    copy.write_text("mine")
    assert main(["recipes", "accelerate/zero3.yaml"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "recipes/accelerate/zero3.yaml exists already" in error and copy.read_text() == "mine"
    assert main(["recipes", "accelerate/zero3.yaml", "--output", "other.yaml"]) == 0
    assert main(["recipes", "accelerate/zero3.yaml", "--output", str(tmp_path)]) == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"recipes/accelerate/zero3.yaml", "other.yaml", "zero3.yaml"}


def test_a_recipe_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "qwen2_5_vl_7b_bis10_qlora"]) == 2
    assert capsys.readouterr().err.endswith("did you mean qwen2_5_vl_7b_bis10_qlora.yaml?\n")
    assert main(["recipes", "../pyproject.toml"]) == 2 and not list(tmp_path.iterdir())
