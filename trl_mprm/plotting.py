"""
Pictures in a light and a dark version, in colours that readers with any form of colour blindness can tell apart.

In a README both versions stand in one `<picture>` element, and the browser takes the one that goes with its theme:

    <picture>
      <source media="(prefers-color-scheme: dark)" srcset="f1-dark.png">
      <img alt="F1 by subset" src="f1.png">
    </picture>

matplotlib comes with the `demo` extra. Colours after Okabe and Ito (https://jfly.uni-koeln.de/color), with lighter
ones on dark ground. Each series also has a marker of its own, so that no reading depends on colour alone.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from .files import atomic_output


# In the order of "C0", "C1", ...: blue, orange, sky blue, ink, grey, vermilion, purple.
_LIGHT_COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#1b1f24", "#8a9199", "#d55e00", "#a0568a")
_DARK_COLOURS = ("#2f93d8", "#e69f00", "#9ad4fa", "#e6edf3", "#7d8590", "#f0743e", "#cc79a7")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# What a subset looks like in every picture: keyword arguments of `plot` and `scatter`.
SUBSETS = {
    name: {"color": f"C{number}", "marker": _MARKERS[number]}
    for number, name in enumerate(("bis", "random", "true", "full", "base"))
}


def _style(colours: tuple[str, ...], ground: str, ink: str, line: str) -> dict[str, Any]:
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    lined = ("axes.edgecolor", "xtick.color", "ytick.color", "legend.edgecolor")
    grounded = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(lined, line),
        **dict.fromkeys(grounded, ground),
        "axes.prop_cycle": cycler(color=colours, marker=_MARKERS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "font.size": 10,
    }


LIGHT = _style(_LIGHT_COLOURS, ground="#ffffff", ink="#1b1f24", line="#8a9199")
DARK = _style(_DARK_COLOURS, ground="#0d1117", ink="#e6edf3", line="#7d8590")


def save_light_and_dark(
    draw: Callable[[Figure], None], path: str | os.PathLike, size: tuple[float, float] = (7, 3.6), dpi: int = 150
) -> tuple[Path, Path]:
    """
    Draw a picture twice, and write `name.png` for light and `name-dark.png` for dark ground.

    Args:
        draw (`Callable`):
            Function that draws into an empty `matplotlib.figure.Figure`. It is called once under each style and should
            take every colour from the style: `"C0"` to `"C6"`, `**SUBSETS["bis"]` for a subset (also `random`, `true`,
            `full`, `base`), or none, which is the ink of the style.
        path (`str` or `os.PathLike`):
            File of the light version, whose suffix is the format.
        size (`tuple[float, float]`, *optional*, defaults to `(7, 3.6)`):
            Width and height in inches.
        dpi (`int`, *optional*, defaults to `150`):
            Pixels per inch.

    Returns:
        `tuple[Path, Path]`: Files of the light and of the dark version.

    Examples:
    ```python
    >>> import tempfile
    >>> from trl_mprm.plotting import SUBSETS, save_light_and_dark
    >>> def draw(figure):
    ...     axes = figure.subplots()
    ...     for name, f1 in {"full": [71, 73], "random": [66, 69], "bis": [75, 77]}.items():
    ...         axes.plot([10, 25], f1, **SUBSETS[name], label=name)
    ...     axes.set(xlabel="% of the rollouts kept", ylabel="macro-F1", title="More F1 from the same share")
    ...     axes.legend()
    >>> [path.name for path in save_light_and_dark(draw, f"{tempfile.mkdtemp()}/f1.png")]
    ['f1.png', 'f1-dark.png']

    ```
    """
    light = Path(path)
    dark = light.with_stem(f"{light.stem}-dark")
    for style, target in ((LIGHT, light), (DARK, dark)):
        with matplotlib.rc_context(style):
            figure = Figure(figsize=size)
            draw(figure)
            with atomic_output(target) as part:
                figure.savefig(part, dpi=dpi, format=light.suffix.removeprefix("."))
    return light, dark
