"""
The fields of `trl-mprm train`, read off the source of their classes in the installed libraries.

Importing these libraries takes seconds, and a typo should be reported at once; so the source is parsed and never run:

    lora_r: int = field(default=16, metadata={"help": "LoRA R value."})     in trl/trainer/model_config.py
    Field("lora_r", "ModelConfig", "int", 16, "LoRA R value.", ())
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple


# File in its package, class. A field of two classes is the first one's, with the choices of either.
CLASSES = (
    ("trl_mprm", "cli/train.py", "DataArguments"),
    ("trl_mprm", "training/config.py", "ProcessRewardConfig"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)


class Field(NamedTuple):
    """
    A field of a configuration class.

    Attributes:
        name (`str`): Name, as in `--name` and in a YAML file.
        owners (`tuple[str, ...]`): Classes of `CLASSES` that have it, the one that decides first.
        type (`str`): Its annotation, as it is written.
        default: Its default; None also where the source does not spell it out.
        help (`str`): Its line in `--help`.
        choices (`tuple[str, ...]`): The only values that it may have; empty if there are others.
    """

    name: str
    owners: tuple[str, ...]
    type: str
    default: Any
    help: str
    choices: tuple[str, ...]


@functools.cache
def train_fields() -> dict[str, Field]:
    """
    All fields of `trl-mprm train` by name; empty, so that nothing is checked, if a class is no longer in its file.

    Examples:
    ```python
    >>> from trl_mprm.cli.fields import train_fields
    >>> fields = train_fields()
    >>> fields["loss_type"].choices, fields["learning_rate"].default, "learning_rat" in fields
    (('hard', 'soft', 'beta_binomial'), 1e-05, False)

    ```
    """
    fields: dict[str, Field] = {}
    for package, file, name in CLASSES:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin if spec and spec.origin else "").parent / file
        found = _definition(name, path) if path.is_file() else None
        if found is None or not isinstance(found[0], ast.ClassDef):
            return {}
        for node in found[0].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_argument(node):
                one = _field(node, node.target.id, name, path)
                first = fields.get(one.name, one._replace(owners=()))
                fields[one.name] = first._replace(
                    owners=(*first.owners, name), choices=first.choices or one.choices, help=first.help or one.help
                )
    return fields


def _is_argument(node: ast.AnnAssign) -> bool:
    """Whether a field of a dataclass is one of its arguments, i.e. not a class variable and not `init=False`."""
    return "ClassVar" not in ast.unparse(node.annotation) and _literal(_keywords(node).get("init")) is not False


def _field(node: ast.AnnAssign, name: str, owner: str, path: Path) -> Field:
    keywords = _keywords(node)
    metadata = keywords.get("metadata")
    about = (
        {_literal(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}
        if isinstance(metadata, ast.Dict)
        else {}
    )
    choices = _values(about["choices"], path) if "choices" in about else _enumerated(node.annotation, path)
    default = _literal(keywords.get("default", node.value))
    return Field(name, (owner,), ast.unparse(node.annotation), default, _literal(about.get("help")) or "", choices)


def _keywords(node: ast.AnnAssign) -> dict[str | None, ast.expr]:
    """The arguments of `field(...)`."""
    return {word.arg: word.value for word in node.value.keywords} if isinstance(node.value, ast.Call) else {}


def _literal(node: ast.expr | None) -> Any:
    """The value of an expression, or None if it has to be run."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _definition(name: str, path: Path) -> tuple[ast.AST, Path] | None:
    """What a name stands for at the top of a module, in the file where it is defined."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, path
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return node.value, path
        if isinstance(node, ast.ImportFrom) and node.level and name in [alias.name for alias in node.names]:
            file = path.parents[node.level - 1] / f"{(node.module or '__init__').replace('.', '/')}.py"
            return _definition(name, file) if file.is_file() else None
    return None


def _values(node: ast.AST, path: Path) -> tuple[str, ...]:
    """The texts in a list, a tuple, the keys of a dictionary, or an enumeration, also one that is imported."""
    if isinstance(node, ast.Call) and len(node.args) == 1:  # tuple(LOSSES)
        return _values(node.args[0], path)
    if isinstance(node, ast.Name):
        found = _definition(node.id, path)
        return _values(*found) if found else ()
    items: list[Any] = []
    if isinstance(node, ast.Dict):
        items = node.keys
    elif isinstance(node, ast.List | ast.Tuple):
        items = node.elts
    elif isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Enum") for base in node.bases):
        items = [line.value for line in node.body if isinstance(line, ast.Assign)]
    values = tuple(map(_literal, items))
    return values if all(isinstance(value, str) for value in values) else ()


def _enumerated(annotation: ast.expr, path: Path) -> tuple[str, ...]:
    """The values of an enumeration that an annotation names, as in `IntervalStrategy | str`."""
    names = [node for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    if any(name.id == "list" for name in names):
        return ()
    return next((values for name in names if (values := _values(name, path))), ())
