"""Code that the HTML pages share. Each is one file that runs no script and loads nothing, rendered from a template."""

import base64
import io
import os
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .data.images import open_image
from .text import plain


MAX_NAME = 90


def render_page(template: str, **values: Any) -> str:
    """
    Render a template from `templates/`. All text is escaped; the templates mark none as safe.

    Filters: `name` (a name as plain text, cut where it is very long), `count` (1,234), `number` (4 digits), `score`
    (0.123), `percent` (12.3%) and `points` (12.3); the last four show `None` as a dash.
    """
    environment = Environment(
        loader=PackageLoader("trl_mprm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["name"] = lambda text: plain(text, MAX_NAME)
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["number"] = lambda value, digits=4: "–" if value is None else f"{value:.{digits}g}"
    environment.filters["score"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["percent"] = lambda value, digits=1: "–" if value is None else f"{value:.{digits}%}"
    environment.filters["points"] = lambda value, digits=1: "–" if value is None else f"{100 * value:.{digits}f}"
    return environment.get_template(template).render(**values)


def colour(score: float) -> str:
    """CSS colour of a score, from bad through middling to good; the browser mixes the two nearest of the three."""
    lower, upper, share = ("bad", "mid", 2 * score) if score < 0.5 else ("mid", "good", 2 * score - 1)
    return f"color-mix(in oklab, var(--{upper}) {100 * share:.0f}%, var(--{lower}))"


def thumbnail(image: str | os.PathLike | dict[str, Any], longest: int) -> dict[str, Any] | None:
    """
    Make a picture small enough to be part of a page.

    Args:
        image (`str`, path or `dict`):
            A picture, as [`open_image`] takes it.
        longest (`int`):
            Most pixels on the longer side. A smaller picture keeps its size.

    Returns:
        `dict` of `src` (a data URI of some ten kilobytes), `width` and `height` in pixels, or `None` if the file can no
        longer be read.

    Examples:
    ```python
    >>> from trl_mprm.demo import EXAMPLE
    >>> from trl_mprm.pages import thumbnail
    >>> small = thumbnail(EXAMPLE, 60)
    >>> small["src"][:23], small["width"], small["height"]
    ('data:image/jpeg;base64,', 60, 60)

    ```
    """
    try:
        canvas = open_image(image)
    except ValueError:
        return None
    canvas.thumbnail((longest, longest))
    data = io.BytesIO()
    canvas.save(data, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"src": source, "width": canvas.width, "height": canvas.height}
