"""The wheel and the source distribution are built, checked, unpacked and used away from the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]


def run(*argv, cwd=ROOT, **env):
    done = subprocess.run(
        [sys.executable, *argv], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, the wheel that was built from it, and `wheel/`, the wheel unpacked."""
    folder = tmp_path_factory.mktemp("dist")
    # A copy: a build writes into the folder of its sources, and what an earlier one has left there would go in.
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    sources = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in sources:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run("-m", "build", "--no-isolation", "--outdir", folder, folder / "source")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "wheel")
    return folder


def test_the_index_would_take_both(built):
    files = [*built.glob("*.whl"), *built.glob("*.tar.gz")]
    assert len(files) == 2
    assert run("-m", "twine", "--no-color", "check", "--strict", *files).count("PASSED") == 2


def test_the_wheel_holds_the_package_and_the_recipes(built):
    there = {path.relative_to(built / "wheel").as_posix() for path in (built / "wheel").rglob("*") if path.is_file()}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_mprm").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert package - there == set()
    recipes = {name.removeprefix("trl_mprm/") for name in there - package if ".dist-info/" not in name}
    assert recipes >= {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes >= {"recipes/train_mprm.py", "recipes/accelerate/zero3.yaml"}
    assert all(name.startswith("recipes/") and (ROOT / name).is_file() for name in recipes)
    assert sum((ROOT / name).stat().st_size for name in recipes) < 500_000
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        assert not any("/tests/" in name or "/model_cards/" in name for name in source.getnames())


def test_the_extras_that_pages_name_exist(built):
    metadata = next((built / "wheel").glob("*.dist-info/METADATA")).read_text()
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    pages = [*ROOT.glob("*.md"), *ROOT.glob("recipes/**/*.md"), *ROOT.glob("recipes/*.py"),
             *ROOT.glob("recipes/**/*.ipynb"), *ROOT.glob("trl_mprm/**/*.py")]  # fmt: skip
    text = "\n".join(page.read_text() for page in pages)
    named = {extra for names in text.split("trl-mprm[")[1:] for extra in names.split("]")[0].split(",")}
    assert named and named <= extras


def test_the_wheel_runs_away_from_the_repository(built, tmp_path):
    from trl_mprm import __version__
    from trl_mprm.cli.recipes import find_recipes

    away = {"cwd": tmp_path, "PYTHONPATH": str(built / "wheel"), "HF_HUB_OFFLINE": "1"}
    assert run("-m", "trl_mprm.cli", "--version", **away).split() == ["trl-mprm", __version__]
    score = (
        "import trl_mprm\n"
        "from trl_mprm import ProcessRewardModel\n"
        "from trl_mprm.demo import EXAMPLE, MINIATURE\n"
        "prm = ProcessRewardModel.from_pretrained(MINIATURE)\n"
        "print(trl_mprm.__file__, *prm.score([str(EXAMPLE)], 'add red blue', ['from 0', 'red is 7 total 7']))\n"
    )
    place, *scores = run("-c", score, **away).split()
    assert Path(place).is_relative_to(built / "wheel")
    assert len(scores) == 2 and all(0 < float(score) < 1 for score in scores)
    listed = run("-m", "trl_mprm.cli", "recipes", **away).split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == list(find_recipes())  # of the clone
    assert all(len(line) <= 100 for line in listed)
    run("-m", "trl_mprm.cli", "recipes", "qwen2_5_vl_7b_bis10_qlora.yaml", **away)
    copy = tmp_path / "recipes" / "qwen2_5_vl_7b_bis10_qlora.yaml"
    assert copy.read_bytes() == (ROOT / "recipes" / copy.name).read_bytes()


def test_the_citation_names_the_version():
    from trl_mprm import __version__

    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_ends(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60 and job["steps"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_the_release_publishes_what_was_built_and_tried():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release["permissions"] == {"contents": "read"}
    assert release[True] == {"release": {"types": ["published"]}}  # the key `on` is True in YAML
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    commands = [step.get("run", "") for step in build["steps"]]
    for word in ("-m build", "twine check --strict dist/*", "pip install dist/*.whl", "trl-mprm score"):
        assert any(word in command for command in commands), f"nothing runs {word}"
    assert publish["needs"] == "build" and publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"}
    download, upload = publish["steps"]  # nothing of the repository runs where the token is
    assert upload["uses"].startswith("pypa/gh-action-pypi-publish@") and "with" not in upload
    (kept,) = (step for step in build["steps"] if step.get("uses", "").startswith("actions/upload-artifact@"))
    assert download["with"]["name"] == kept["with"]["name"]
