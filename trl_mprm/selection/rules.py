"""
The rules of a selection, one entry each, and the request for a cut.

A rule ranks rollouts by a score, highest first; [`~trl_mprm.selection.threshold`] does the rest, whatever the rule. To
add a rule, add an entry to `RULES`: `select`, `select_files`, the command line, page, card and comparison read it.

    Rule("mixed", "rollouts with good and bad steps first, the rest at random", _mixed, by_hash=True)

`score` sees for each kind of rollout the number of measured steps, the number of positive ones, and the sum of the
scores. A rule that ranks by anything else names the fields of a row that it `reads`, and `value` turns them into one
number:

    Rule("column", "the highest value of a column", _value, reads=lambda spec: (spec.column,), value=_number_of_column)
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from .bis import ALPHA, check_alpha, score_of_sums


@dataclass(frozen=True)
class CutSpec:
    """
    The request for a cut; it travels whole from the command line to report and card.

    Attributes:
        rule (`str`): Name of an entry of `RULES`.
        fraction (`float`): Share to keep, above 0 and at most 1.
        alpha (`float`): The paper's alpha, at least 0; it matters only where the rule ranks by BIS.
        ties (`str`): `"first"` in the file, or by `"hash"`; a rule may insist on the hash.
        seed (`int`): Seed of the hash, at least 0.
        by (`str`, *optional*): The column whose values are cut separately: `source`, or any column of a dataset. None
            makes one cut over all rows.
        column (`str`, *optional*): The column that the rule ranks by, if it ranks by one.

    Examples:
    ```python
    >>> from trl_mprm.selection.rules import CutSpec
    >>> CutSpec("mixed", fraction=0.1).ties
    'hash'
    >>> CutSpec("bis", fraction=10)
    Traceback (most recent call last):
    ValueError: fraction must be above 0 and at most 1 (0.1 keeps a tenth), got 10

    ```
    """

    rule: str = "bis"
    _: KW_ONLY
    fraction: float
    alpha: float = ALPHA
    ties: str = "first"
    seed: int = 0
    by: str | None = "source"
    column: str | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1 (0.1 keeps a tenth), got {self.fraction!r}")
        if self.ties not in ("first", "hash"):
            raise ValueError(f'ties must be "first" (file order) or "hash" (seeded, any order), got {self.ties!r}')
        check_alpha(self.alpha)
        if not isinstance(self.seed, Integral) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        if (self.rule == "column") != (self.column is not None):
            raise ValueError(
                f"the rule column ranks by a column, and no other rule does: got rule {self.rule!r} and column "
                f"{self.column!r}"
            )
        if self.entry.by_hash:
            object.__setattr__(self, "ties", "hash")

    @property
    def entry(self) -> "Rule":
        return RULES[self.rule]

    def facts(self) -> dict[str, Any]:
        """The entries of report and card about this request. The name of a column stands for the rule `column`."""
        facts = {
            "rule": self.column or self.rule,
            "by": self.by or "corpus",
            "fraction": self.fraction,
            "alpha": self.alpha if self.entry.of_bis else None,
            "ties": self.ties,
            "seed": self.seed,
        }
        return facts | ({} if self.column is None else {"column": self.column})


class Kinds(NamedTuple):
    """The numbers of each kind of rollout, by which a rule may rank. `value` is 0 if the rule reads no fields."""

    n_steps: np.ndarray
    n_pos: np.ndarray
    mc_sum: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Rule:
    """
    One way to rank rollouts.

    Attributes:
        name (`str`): For `select(rollouts, name)` and `--rule`.
        words (`str`): The kept rollouts in words, for `--help`, page and card.
        score (`Callable`): Maps `(Kinds, CutSpec)` to the score of each kind; the highest are kept.
        by_hash (`bool`): Ties are always broken by the seeded hash.
        of_bis (`bool`): The score is BIS, so alpha matters, and the page draws the cut on the axis of BIS.
        lowest_reliability (`Callable`, *optional*): Maps `(mixture, cut, alpha)` to the lowest R that is kept at each
            mixture p (1 - p), for a rule that cuts in this plane; the page shades the region above.
        reads (`Callable`, *optional*): Maps a `CutSpec` to the names of the fields that `value` needs, beside the steps.
        value (`Callable`, *optional*): Maps `({name: list with an entry per row}, CutSpec)` to one number per row; NaN
            refuses the row as `no_score`.
    """

    name: str
    words: str
    score: Callable[[Kinds, CutSpec], np.ndarray]
    by_hash: bool = False
    of_bis: bool = False
    lowest_reliability: Callable[[np.ndarray, float, float], np.ndarray] | None = None
    reads: Callable[[CutSpec], tuple[str, ...]] | None = None
    value: Callable[[dict[str, list], CutSpec], np.ndarray] | None = None


def _bis(kinds: Kinds, spec: CutSpec) -> np.ndarray:
    return score_of_sums(kinds.n_steps, kinds.n_pos, kinds.mc_sum, spec.alpha)["bis"]


def _mixed(kinds: Kinds, spec: CutSpec) -> np.ndarray:
    return ((kinds.n_pos > 0) & (kinds.n_pos < kinds.n_steps)).astype(float)


def _reliable(kinds: Kinds, spec: CutSpec) -> np.ndarray:
    return np.where(kinds.n_pos > 0, kinds.mc_sum / np.maximum(kinds.n_pos, 1), 1.0)


def _low_mc(kinds: Kinds, spec: CutSpec) -> np.ndarray:
    return 0.0 - kinds.mc_sum / np.maximum(kinds.n_steps, 1)


def _numbers_of_column(fields: dict[str, list], spec: CutSpec) -> np.ndarray:
    return np.array([_number(value) for value in fields[spec.column]], np.float64)


def _agreeing(fields: dict[str, list], spec: CutSpec) -> np.ndarray:
    return np.array([_mean(steps) for steps in fields["agreement"]], np.float64)


def _mean(steps: object) -> float:
    known = [_number(step) for step in steps if step is not None] if isinstance(steps, list) else []
    return sum(known) / len(known) if known else np.nan


def _confident(fields: dict[str, list], spec: CutSpec) -> np.ndarray:
    return np.array([_number(value) for value in fields["self_confidence"]], np.float64)


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, Real) else np.nan
    except OverflowError:  # a whole number of more than 300 digits
        return np.nan


_ENTRIES = (
    Rule(
        "bis",
        "the highest Balanced-Information Score, (p_pos (1 - p_pos) + alpha) R",
        _bis,
        of_bis=True,
        lowest_reliability=lambda mixture, cut, alpha: np.minimum(cut / np.maximum(mixture + alpha, 1e-12), 1),
    ),
    Rule("random", "at random", lambda kinds, spec: np.zeros(len(kinds.n_steps)), by_hash=True),
    Rule(
        "mixed",  # the paper fills the rest of the quota at random
        "rollouts with good and bad steps first, the rest at random",
        _mixed,
        by_hash=True,
        lowest_reliability=lambda mixture, cut, alpha: np.where(mixture > 0, 0.0, cut),
    ),
    Rule(
        "reliable",
        "the highest mean score of the positive steps (R)",
        _reliable,
        lowest_reliability=lambda mixture, cut, alpha: np.full(len(mixture), cut),
    ),
    Rule("low_mc", "the lowest mean score", _low_mc),
    Rule(
        "column",
        "the highest value of a column",
        lambda kinds, spec: kinds.value,
        reads=lambda spec: (spec.column,),
        value=_numbers_of_column,
    ),
    Rule(  # consensus filtering; `trl-mprm annotate --second` writes the column
        "agreement",
        "where a second policy or judge agrees on most steps (column `agreement`)",
        lambda kinds, spec: kinds.value,
        reads=lambda spec: ("agreement",),
        value=_agreeing,
    ),
    Rule(  # as SCAN (arXiv 2509.16548) filters; `trl-mprm annotate` writes the column
        "self_confidence",
        "solutions without a bad step, of the questions that the policy solves most often (column `self_confidence`)",
        lambda kinds, spec: kinds.value - (kinds.n_pos < kinds.n_steps),
        reads=lambda spec: ("self_confidence",),
        value=_confident,
    ),
)

RULES = {rule.name: rule for rule in _ENTRIES}

# The rules that need only the step scores, and so apply to every corpus.
STEP_RULES = tuple(rule.name for rule in _ENTRIES if rule.reads is None)

# The rules that need a column that only some corpora have.
COLUMN_RULES = ("agreement", "self_confidence")


def rule_of_report(report: dict) -> Rule:
    """The rule that a report names, see [`CutSpec.facts`]."""
    return RULES["column" if "column" in report else report["rule"]]


def column_to_cut_by(by: str) -> str | None:
    """Convert the value of `--by` for [`CutSpec`]."""
    if by not in ("source", "corpus"):
        raise ValueError(f'by must be "source" (each is cut on its own) or "corpus" (all rows together), got {by!r}')
    return None if by == "corpus" else by


def score_of_kinds(spec: CutSpec, kinds: np.ndarray, value: np.ndarray | None) -> np.ndarray:
    """The score of each row of a table of [`~trl_mprm.selection.summary.KIND`]."""
    value = np.zeros(len(kinds)) if value is None else value
    sums = kinds["n_steps"].astype(np.int64), kinds["n_pos"].astype(np.int64), kinds["mc_sum"]
    return spec.entry.score(Kinds(*sums, value), spec)
