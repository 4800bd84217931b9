"""
The picture of the README, .github/readme.svg: what the model that ships in the package makes of a solution with a slip.

`python tests/docs/pages.py --update README.md` draws it anew.
"""

import base64
from pathlib import Path


PICTURE = Path(__file__).resolve().parents[2] / ".github" / "readme.svg"
QUESTION = "add brown green grey"
STEPS = ["from 0", "brown is 4 total 4", "green is 2 total 6", "grey is 2 total 8", "answer 8"]

STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1b1f24 } .step { font-family: ui-monospace, monospace }
  .small { font-size: 12px; fill: #57606a } .rail { fill: #d0d7de } .good { fill: #0072b2 } .bad { fill: #e69f00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #8b949e } .rail { fill: #30363d } .good { fill: #2f93d8 }
  }
"""


def draw_picture() -> str:
    """The picture as SVG, in the colours of the reader's theme."""
    from trl_mprm import ProcessRewardModel
    from trl_mprm.demo import EXAMPLE, MINIATURE

    scores = ProcessRewardModel.from_pretrained(MINIATURE).score([EXAMPLE], QUESTION, STEPS)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 236" width="760" height="236" role="img">',
        f"<title>{QUESTION}: {'; '.join(f'{step}, {s:.2f}' for step, s in zip(STEPS, scores, strict=True))}</title>",
        f"<style>{STYLE}</style>",
        '<image x="8" y="16" width="200" height="200" style="image-rendering: pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(EXAMPLE.read_bytes()).decode()}"/>',
        f'<text x="240" y="32">Question: <tspan class="step">{QUESTION}</tspan></text>',
        '<text class="small" x="240" y="58">step</text><text class="small" x="500" y="58">P(step is good)</text>',
    ]
    for number, (step, score) in enumerate(zip(STEPS, scores, strict=True)):
        y, kind = 84 + 32 * number, "good" if score >= 0.5 else "bad"
        lines += [
            f'<text class="step" x="240" y="{y}">{"✓" if kind == "good" else "✗"} {step}</text>',
            f'<rect class="rail" x="500" y="{y - 12}" width="190" height="14" rx="3"/>',
            f'<rect class="{kind}" x="500" y="{y - 12}" width="{max(190 * score, 4):.1f}" height="14" rx="3"/>',
            f'<text x="702" y="{y}">{score:.2f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
