"""Make text from elsewhere, such as names, questions and steps, safe to show."""

import re


# Invisible marks that change the direction of writing, and can make one name read as another.
_DIRECTION = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")

# Control characters other than tab and line feed, among them the escape that terminals obey; and lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(text: str, longest: int | None = None) -> str:
    """
    Remove direction marks from a text, replace each control character and lone surrogate by `\\ufffd`, and cut it at
    `longest` characters.

    Examples:
    ```python
    >>> from trl_mprm.text import plain
    >>> plain("red \\u202eevil\\x1b[2J", longest=9)
    'red evil\\ufffd … (3 more characters)'

    ```
    """
    text = _UNSEEN.sub("\ufffd", _DIRECTION.sub("", text.replace("\r\n", "\n")))
    if longest is None or len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def one_line(text: str) -> str:
    """Return a name as plain text on one line, for a terminal and for tables."""
    return " ".join(plain(str(text)).split())


def markdown(text: str) -> str:
    """
    Escape a name for Markdown and its tables, so that it starts no link, picture, HTML, code, emphasis or heading.

    Examples:
    ```python
    >>> from trl_mprm.text import markdown
    >>> markdown("a|b\\n# [c](javascript:d) <img>")
    'a&#124;b # &#91;c&#93;(javascript:d) &lt;img&gt;'

    ```
    """
    text = re.sub(r"[&<>\[\]`*|\\]", lambda found: _ENTITIES.get(found[0], f"&#{ord(found[0])};"), one_line(text))
    return re.sub(r"^([#=]|[-+](?= )|-(?=--))", lambda found: f"&#{ord(found[0])};", text)


def code(text: str) -> str:
    """Return a name for a code span of Markdown, without the backtick that would end the span."""
    return one_line(text).replace("`", "'")


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
