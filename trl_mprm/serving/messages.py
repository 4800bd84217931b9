"""
Convert a solution to a request to `/pooling` in vLLM's form, and back.

    {"images": [picture], "prompt": "How many?", "completions": ["A and C.", "So 2."]}

    {"model": "prm", "task": "token_classify", "add_generation_prompt": false, "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
                                     {"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": "A and C.<prm>\\n\\nSo 2.<prm>"}]}

The answer holds `[P(bad), P(good)]` of each step.
"""

import base64
import io
from typing import Any

from ..data.images import open_image
from ..data.rows import check_steps
from ..prompting.step_format import StepFormat
from ..prompting.tokens import images_of


TASK = "token_classify"
GOOD = 1  # index of P(good) in a pair


def pooling_request(row: dict[str, Any], step_format: StepFormat, model: str) -> dict[str, Any]:
    """
    Write the body of a request that scores one solution.

    Args:
        row (`dict`):
            Row with `prompt`, `completions` and optional `images`.
        step_format ([`StepFormat`]):
            Marker and joiner of the served model.
        model (`str`):
            Name under which the server offers the model.

    Raises:
        `ValueError`: a step is empty or contains the marker, or a picture cannot be read.

    Examples:
    ```python
    >>> from trl_mprm import StepFormat
    >>> from trl_mprm.serving.messages import pooling_request
    >>> body = pooling_request({"prompt": "1 + 1?", "completions": ["It is 2.", "So 2."]}, StepFormat(), "prm")
    >>> body["messages"][1]["content"]
    'It is 2.<prm>\\n\\nSo 2.<prm>'

    ```
    """
    steps, prompt = row["completions"], row["prompt"]
    check_steps(steps)
    for number, step in enumerate(steps):
        if step_format.marker in step:
            raise ValueError(f"step {number} contains the marker {step_format.marker!r}: remove it from the text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images_of(row)]
    if pictures:
        first = next(turn for turn in messages if turn["role"] == "user")
        content = first["content"]
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        first["content"] = pictures + [part for part in texts if part.get("type") == "text"]
    said = step_format.joiner.join(step + step_format.marker for step in steps)
    messages.append({"role": "assistant", "content": said})
    return {"model": model, "task": TASK, "add_generation_prompt": False, "messages": messages}


def data_url(image: Any) -> str:
    """Encode a picture losslessly as a data URL, so that the server sees the same pixels."""
    data = io.BytesIO()
    open_image(image).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def solution_of(messages: list[dict[str, Any]], step_format: StepFormat) -> tuple[list[str], list[Any], list[str]]:
    """
    Extract question turns, pictures (as the request names them) and steps from a request.

    Raises `ValueError` unless the messages are a user turn, then an assistant turn that ends with a marker.

    Examples:
    ```python
    >>> from trl_mprm import StepFormat
    >>> from trl_mprm.serving.messages import solution_of
    >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2.<prm>\\n\\nSo 2.<prm>"}]
    >>> solution_of(turns, StepFormat())
    ([{'role': 'user', 'content': '1 + 1?'}], [], ['It is 2.', 'So 2.'])

    ```
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("expected a user turn with the question, then an assistant turn with the steps")
    said = _text(messages[-1]["content"])
    *steps, rest = said.split(step_format.marker)
    if not steps or rest.strip():
        raise ValueError(
            f"expected the marker {step_format.marker!r} after every step, "
            + ("and the last step has none" if steps else "got an assistant turn without one")
        )
    steps = [steps[0], *(step.removeprefix(step_format.joiner) for step in steps[1:])]
    pictures, prompt = [], []
    for turn in messages[:-1]:
        content = turn["content"]
        if isinstance(content, list):
            pictures += [part["image_url"]["url"] for part in content if part.get("type") == "image_url"]
            content = _text(content)
        prompt.append({"role": turn["role"], "content": content})
    return prompt, pictures, steps


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    odd = next((part.get("type") for part in content if part.get("type") not in ("text", "image_url")), None)
    if odd is not None:
        raise ValueError(f"a part of a message has the type {odd!r}, expected 'text' or 'image_url'")
    return "".join(part["text"] for part in content if part.get("type") == "text")
