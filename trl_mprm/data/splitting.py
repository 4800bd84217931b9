"""
Split the text of a solution into steps.

    "Tiles A and C are red.\\n\\nSo there are two.\\nFinal answer: 2"
    -> ["Tiles A and C are red.", "So there are two.", "Final answer: 2"]

How a solution is split affects every score, so nothing is split unless a rule is named, which should be the rule that the
training data followed. VisualPRM400K, and hence the paper, split at blank lines.
"""

import re


BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")

# "Step 1:", "**Step 2.**", "### Step3" at the beginning of a line.
STEP = re.compile(r"\n(?=[^\S\n]*(?:#+ *|\*\*)?step *\d+\b)", re.IGNORECASE)

# "4. ", "5) " at the beginning of a line.
ITEM = re.compile(r"\n(?=[^\S\n]*(?:#+ *|\*\*)?\d+[.)] )")

# A line in the last step that states the answer: "Final answer: 2", "**Answer:** B", "†Answer: 3", "The final answer is
# 7.", or "**Final Answer**" above it; or the last line, where it begins with "answer" in any way.
FINAL_ANSWER = re.compile(
    r"\n(?=[*#†\t ]*+(?:the +)?(?:(?:final +)?answer(?:[*\t ]*[:\n]|\b[^\n]*\s*\Z)|final +answer +is\b))",
    re.IGNORECASE,
)

# The first pattern that occurs in a text applies, so that a numbered list within "Step 1:" stays whole.
SPLITS = {"blank_line": (BLANK_LINE,), "numbered": (STEP, ITEM)}


def split_steps(text: str, by: str = "blank_line") -> list[str]:
    """
    Split the text of a solution into steps, stripped of surrounding white space.

    Args:
        text (`str`):
            Text of a solution.
        by (`str`, *optional*, defaults to `"blank_line"`):
            `"blank_line"`: a step is a paragraph, as in VisualPRM400K. `"numbered"`: a step begins with a line such as
            `Step 2:` or, in a text without those, `2.`; text before the first such line belongs to the first step. In
            both cases a line of the last step that states the answer (`Final answer: 2`) begins a separate step.

    Returns:
        `list[str]`: the steps; empty for a blank text.

    Examples:
    ```python
    >>> from trl_mprm.data.splitting import split_steps
    >>> split_steps("A is red.\\n\\nSo one.\\nFinal answer: 1")
    ['A is red.', 'So one.', 'Final answer: 1']
    >>> split_steps("Count.\\nStep 1: A is red.\\n\\nC too.\\nStep 2: So two.", by="numbered")
    ['Count.\\nStep 1: A is red.\\n\\nC too.', 'Step 2: So two.']

    ```
    """
    if by not in SPLITS:
        raise ValueError(f"by is {by!r}, expected one of {', '.join(SPLITS)}")
    text = "\n" + text.replace("\r\n", "\n").strip()
    rule = next((rule for rule in SPLITS[by] if rule.search(text)), SPLITS[by][0])
    steps = [step.strip() for step in rule.split(text)]
    if by == "numbered" and len(steps) > 1 and not rule.match("\n" + steps[0]):
        steps[:2] = ["\n".join(steps[:2]).strip()]
    steps[-1:] = map(str.strip, FINAL_ANSWER.split(steps[-1], maxsplit=1))
    return [step for step in steps if step]
