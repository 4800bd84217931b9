"""Texts into steps: every rule spelled out."""

import pytest

from trl_mprm.data.splitting import split_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("one", ["one"]),
        ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("one\r\n\r\n \t\n\ntwo\n\n", ["one", "two"]),
        ("", []),
        (" \n\n ", []),
        ("one\nFinal answer: 2", ["one", "Final answer: 2"]),
        ("one\n\n**Answer:** B\n", ["one", "**Answer:** B"]),
        ("one\n†Answer: 3", ["one", "†Answer: 3"]),
        ("one\nThe final answer is 7.", ["one", "The final answer is 7."]),
        ("Final answer: 2", ["Final answer: 2"]),
        ("The answer depends on x.\n\nSo x = 2.", ["The answer depends on x.", "So x = 2."]),
        ("Answers differ.", ["Answers differ."]),
        ("one\n\ntwo\n**Final Answer**\n\\boxed{2}", ["one", "two", "**Final Answer**\n\\boxed{2}"]),
        ("The answer is near.\nAnswer: 2\n\nAs said.", ["The answer is near.\nAnswer: 2", "As said."]),
    ],
)
def test_blank_lines(text, steps):
    assert split_steps(text) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Step 1: a\nb\n\nStep 2: c", ["Step 1: a\nb", "Step 2: c"]),
        ("Look.\nStep 1: a\nstep 2. b", ["Look.\nStep 1: a", "step 2. b"]),
        ("1. a\n2. b\n3) c", ["1. a", "2. b", "3) c"]),
        ("### Step 1\na\n**Step 2:** b\nAnswer: 4", ["### Step 1\na", "**Step 2:** b", "Answer: 4"]),
        ("1.5 is less than\n2.5 which is a number", ["1.5 is less than\n2.5 which is a number"]),
        ("no number at all\n\nnone", ["no number at all\n\nnone"]),
        # The answer begins a step wherever it stands in the last one, and keeps what comes after it.
        ("Step 1: a\nFinal answer: 2\nI hope it helps.", ["Step 1: a", "Final answer: 2\nI hope it helps."]),
        ("Step 1: a\n\n**Final Answer**\n\\boxed{3}", ["Step 1: a", "**Final Answer**\n\\boxed{3}"]),
        ("1. a\n### Answer\n3\n\nDone.", ["1. a", "### Answer\n3\n\nDone."]),
        ("Step 1: a\nThe final answer is 7.\nDone.", ["Step 1: a", "The final answer is 7.\nDone."]),
        ("Step 1: a\nThe answer depends on x.\nb", ["Step 1: a\nThe answer depends on x.\nb"]),
        ("Answer: let us see.\nStep 1: a\nStep 2: b", ["Answer: let us see.\nStep 1: a", "Step 2: b"]),
        ("Step1: a\nSTEP2: b", ["Step1: a", "STEP2: b"]),
        ("Step 1: a\n1. b\n2. c\nStep 2: d", ["Step 1: a\n1. b\n2. c", "Step 2: d"]),
        ("Known:\n1. b\n2. c\nStep 1: a", ["Known:\n1. b\n2. c\nStep 1: a"]),
    ],
)
def test_numbered(text, steps):
    assert split_steps(text, by="numbered") == steps


def test_unknown_rule():
    with pytest.raises(ValueError, match="by is 'words', expected one of blank_line, numbered"):
        split_steps("a", by="words")


def test_many_empty_lines_take_no_time():
    """Linear in the length: 200,000 line ends would take hours where each were tried against each."""
    assert split_steps("a" + "\n" * 200_000 + "b") == ["a", "b"]
