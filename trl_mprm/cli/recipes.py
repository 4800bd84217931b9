"""`trl-mprm recipes`: the recipes that come with the package, listed or copied."""

import argparse
import ast
import difflib
import json
import shutil
from pathlib import Path
from textwrap import shorten

from ..files import atomic_output
from .arguments import WIDTH, add_command, say


PACKAGE = Path(__file__).parents[1]

# What ships of the folder `recipes/` of a clone; in an installed package there is nothing else (see setup.py).
PATTERNS = ("*.md", "*.yaml", "train_mprm.py", "accelerate/*", "notebooks/*.ipynb")


EXAMPLES = [
    ("List the recipes, with what each is for", "trl-mprm recipes"),
    ("Copy one here, to change it", "trl-mprm recipes qwen2_5_vl_7b_bis10_qlora.yaml --output my-recipe.yaml"),
]


def add_parser(commands: argparse._SubParsersAction) -> None:
    command = add_command(
        commands,
        "recipes",
        recipes,
        "list the recipes, guides and notebooks, or copy one here",
        "The package comes with recipes (YAML files for trl-mprm train), guides and notebooks. List them, or copy one here.",
        EXAMPLES,
    )
    command.add_argument("name", nargs="?", help="recipe to copy, as the list names it; default: list them all")
    command.add_argument("--output", metavar="PATH", help="copy it to this file or folder; default: recipes/NAME")


def recipes(args: argparse.Namespace) -> int:
    found = find_recipes()
    if args.name is None:
        width = max(map(len, found))
        for name, path in found.items():
            say(f"{name:{width}}  {shorten(title(path), WIDTH - width - 2, placeholder=' …')}")
        say("", "copy one: trl-mprm recipes NAME")
        return 0
    if args.name not in found:
        near = difflib.get_close_matches(args.name, found, n=1)
        hint = f"did you mean {near[0]}?" if near else "`trl-mprm recipes` lists all"
        raise ValueError(f"no recipe is named {args.name}: {hint}")
    output = Path(args.output or Path("recipes", args.name))
    if output.is_dir():
        output /= Path(args.name).name
    if output.exists():
        raise FileExistsError(f"{output} exists already: delete it, or name another file with --output")
    with atomic_output(output) as part:
        shutil.copyfile(found[args.name], part)
    say(f"copied: {output}")
    return 0


def find_recipes() -> dict[str, Path]:
    """
    Find the recipes, by name: those of the installed package, or of the clone that the package is imported from.

    Examples:
    ```python
    >>> from trl_mprm.cli.recipes import find_recipes, title
    >>> title(find_recipes()["qwen2_5_vl_7b_bis10_qlora.yaml"])
    'BIS-10% of VisualPRM400K-v1.1-Raw, Qwen2.5-VL-7B, QLoRA on one 24 GB GPU.'

    ```
    """
    installed = PACKAGE / "recipes"
    folder = installed if installed.is_dir() else PACKAGE.parent / "recipes"
    found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    if not found:
        raise FileNotFoundError(f"{folder} holds no recipes: install the package again")
    return {path.relative_to(folder).as_posix(): path for path in found}


def title(path: Path) -> str:
    """The first line of a recipe that says what it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return text.lstrip("# ").partition("\n")[0]
