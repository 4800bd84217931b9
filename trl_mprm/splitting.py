"""
Split the text of a solution into steps.

    "Tiles A and C are red.\\n\\nSo there are two.\\nFinal answer: 2"
    -> ["Tiles A and C are red.", "So there are two.", "Final answer: 2"]

How a solution is split changes every score after it, so nothing is split unless a rule is named: the rule should be the
one that the training data followed. VisualPRM400K, and so the paper, split at blank lines.
"""

import re


BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
# "Step 1:", "**Step 2.**", "### Step 3", "4. ", "5) " at the beginning of a line.
NUMBERED = re.compile(r"\n(?=[^\S\n]*(?:#+ *|\*\*)?(?:step +\d+\b|\d+[.)] ))", re.IGNORECASE)
# The last line, where it states the answer: "Final answer: 2", "**Answer:** B", "†Answer: 3", "The final answer is 7."
FINAL_ANSWER = re.compile(r"\n(?=[*#†\t ]*+(?:the +)?(?:final +)?answer\b[^\n]*\s*\Z)", re.IGNORECASE)
SPLITS = {"blank_line": BLANK_LINE, "numbered": NUMBERED}


def split_steps(text: str, by: str = "blank_line") -> list[str]:
    """
    Split the text of a solution into steps, white space around them removed.

    Args:
        text (`str`):
            Text of a solution.
        by (`str`, *optional*, defaults to `"blank_line"`):
            `"blank_line"`: a step is a paragraph, as in VisualPRM400K. `"numbered"`: a step begins with a line such as
            `Step 2:` or `2.`; text before the first belongs to the first. Either way a last line that states the answer
            (`Final answer: 2`) is a step of its own.

    Returns:
        `list[str]`: the steps; empty for a text without any.

    Examples:
    ```python
    >>> from trl_mprm.splitting import split_steps
    >>> split_steps("A is red.\\n\\nSo one.\\nFinal answer: 1")
    ['A is red.', 'So one.', 'Final answer: 1']
    >>> split_steps("Count.\\nStep 1: A is red.\\n\\nC too.\\nStep 2: So two.", by="numbered")
    ['Count.\\nStep 1: A is red.\\n\\nC too.', 'Step 2: So two.']

    ```
    """
    if by not in SPLITS:
        raise ValueError(f"by is {by!r}, expected one of {', '.join(SPLITS)}")
    text = "\n" + text.replace("\r\n", "\n").strip()
    body, *answer = FINAL_ANSWER.split(text, maxsplit=1)
    steps = [step.strip() for step in SPLITS[by].split(body)]
    if by == "numbered" and len(steps) > 1 and not NUMBERED.match("\n" + steps[0]):
        steps[:2] = ["\n".join(steps[:2]).strip()]
    return [step for step in [*steps, *map(str.strip, answer)] if step]
