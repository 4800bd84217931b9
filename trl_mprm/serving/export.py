"""
Export a process reward model as a folder that a stock server loads without a plugin.

vLLM turns a language model into a classifier by itself when `config.json` says which tokens are its classes: it cuts two
rows out of the LM head, and its STEP pooling reads them at each marker. The folder holds:

    model.safetensors, tokenizer, processor    merged weights, as they were trained
    config.json                                + classifier_from_token, method, num_labels
    chat_template.jinja                        user turn -> [pictures][question], assistant turn -> the steps, unchanged
    SERVE.md                                   the command and a request for this model
    check.py, parity.json                      a few solutions with their scores, to compare with those of a server

How vLLM reads these keys: `vllm/model_executor/models/adapters.py`, `load_weights_no_post_processing`, and
`vllm/model_executor/layers/pooler`, STEP pooling (as of 0.32).
"""

import json
import os
import shlex
import shutil
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from jinja2 import Environment, StrictUndefined
from peft import PeftModel
from PIL import Image, ImageDraw

from ..files import write_json
from ..models.vllm import why_not_in_vllm
from ..prompting.tokens import tokenizer_of
from ..scoring import ProcessRewardModel
from . import check
from .messages import GOOD, TASK, pooling_request


def export_for_vllm(prm: ProcessRewardModel, folder: str | os.PathLike, name: str = "prm") -> dict[str, str]:
    """
    Write a model that `vllm serve` loads without changes.

    Args:
        prm ([`ProcessRewardModel`]):
            A full model, or an adapter, which is merged (4-bit weights are dequantised first).
        folder (`str` or path):
            Folder to write; it must be new or empty.
        name (`str`, *optional*, defaults to `"prm"`):
            Name under which the server offers the model.

    Returns:
        `dict[str, str]`: the contents of the export, for a table.

    Raises:
        `ValueError`: a classification head, a layout without a marker of its own, or an architecture that vLLM does not
        convert.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: name a new folder")
    merged = prm.merge_and_unload() if isinstance(prm.model, PeftModel) else prm
    check_exportable(merged)
    step_format, ids = merged.step_format, merged.step_ids
    rows = example_rows(merged.reads_images)
    scores = merged.score_batch(rows)
    requests = [pooling_request(row, step_format, name) for row in rows]
    cases = [{"request": body, "scores": own} for body, own in zip(requests, scores, strict=True)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = serve_command(folder, name, ids.marker[0])
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
        part = Path(part, "export")
        merged.save_pretrained(part)
        _set_classes(part / "config.json", merged)
        _set_template(part, merged)
        write_json({"model": name, "good": GOOD, "cases": cases}, part / check.PARITY)
        shutil.copyfile(check.__file__, part / "check.py")
        (part / "SERVE.md").write_text(_serve_page(name, command, requests[0], scores[0]), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    return {
        "architecture": type(merged.model).__name__,
        "step marker": f"{step_format.marker} (token {ids.marker[0]})",
        "classes": " ".join(reversed(step_format.reward_tokens)),
        "solutions to compare": str(len(cases)),
    }


def check_exportable(prm: ProcessRewardModel) -> None:
    """Raise `ValueError`, with the reason, if vLLM cannot read the rewards of this model."""
    why = why_not_in_vllm(prm.model, prm.processing_class, prm.step_format)
    if why is not None:
        raise ValueError(why)


def chat_template_of_steps(template: str) -> str:
    """
    Change a chat template so that a final assistant turn stays open: its steps follow the generation prompt unchanged.

    Examples:
    ```python
    >>> from jinja2 import Template
    >>> from trl_mprm.serving.export import chat_template_of_steps
    >>> own = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content | trim }} {% endfor %}"
    >>> own += "{% if add_generation_prompt %}[assistant] {% endif %}"
    >>> turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2.<prm>"}]
    >>> Template(chat_template_of_steps(own)).render(messages=turns, add_generation_prompt=False)
    '[user] 1 + 1? [assistant] 2.<prm>'

    ```
    """
    return (
        "{%- set solution = messages[-1].content if messages[-1].role == 'assistant' else none -%}"
        "{%- if solution is not none -%}"
        "{%- set messages = messages[:-1] -%}{%- set add_generation_prompt = true -%}"
        "{%- endif -%}" + template + "{%- if solution is string -%}{{- solution -}}"
        "{%- elif solution is not none -%}{%- for part in solution -%}{{- part.text -}}{%- endfor -%}{%- endif -%}"
    )


def serve_command(folder: str | os.PathLike, name: str, marker: int) -> str:
    """The shell command that serves an exported folder."""
    pooler = json.dumps({"task": TASK, "tok_pooling_type": "STEP", "step_tag_id": marker}, separators=(",", ":"))
    return (
        f"vllm serve {shlex.quote(str(folder))} --served-model-name {shlex.quote(name)} --runner pooling "
        f"--convert classify --pooler-config {shlex.quote(pooler)}"
    )


def example_rows(images: bool) -> list[dict]:
    """Four solutions of two questions for comparing servers, with pictures of two sizes if the model reads them."""
    pictures = []
    for size, colours in (((112, 84), ("red", "blue")), ((224, 168), ("green", "orange"))):
        picture = Image.new("RGB", size, "white")
        for number, colour in enumerate(colours):
            left = 8 + number * size[0] // 2
            ImageDraw.Draw(picture).rectangle([left, 8, left + size[0] // 3, size[1] - 8], fill=colour)
        pictures.append(picture)
    rows = []
    for picture, prompt, solutions in zip(
        pictures,
        ("How many rectangles are there?", "Is the first one green? Answer yes or no."),
        ((["There is one on the left.", "There is one on the right.", "So 2."], ["I see three of them.", "So 3."]),
         (["The first one is green.", "yes"], ["The first one is orange.", "It is not green.", "no", "Final answer: no"])),
        strict=True,
    ):  # fmt: skip
        rows += [
            {"images": [picture] if images else [], "prompt": prompt, "completions": steps} for steps in solutions
        ]
    return rows


def _set_classes(file: Path, prm: ProcessRewardModel) -> None:
    """Name the two classes at top level and, for vision-language models, in `text_config`, where vLLM looks for them."""
    config = json.loads(file.read_text(encoding="utf-8"))
    tokens = tokenizer_of(prm.processing_class).convert_ids_to_tokens([prm.step_ids.bad, prm.step_ids.good])
    keys = {"classifier_from_token": tokens, "method": "no_post_processing", "num_labels": 2}
    config |= keys
    if "text_config" in config:  # its loader asks the decoder's own configuration whether the head is tied
        tied = bool(getattr(prm.model.config, "tie_word_embeddings", False))
        config["text_config"] = {"tie_word_embeddings": tied} | config["text_config"] | keys
    write_json(config, file)


def _set_template(folder: Path, prm: ProcessRewardModel) -> None:
    template = chat_template_of_steps(prm.processing_class.chat_template)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _serve_page(name: str, command: str, request: dict, scores: list[float]) -> str:
    template = resources.files("trl_mprm").joinpath("templates", "serve.md").read_text(encoding="utf-8")
    texts_only = json.loads(json.dumps(request))
    for turn in texts_only["messages"]:
        for part in turn["content"] if isinstance(turn["content"], list) else []:
            if part["type"] == "image_url":
                part["image_url"]["url"] = "data:image/png;base64,..."
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(
            name=name,
            command=command,
            request=json.dumps(texts_only, indent=2, ensure_ascii=False),
            scores=", ".join(f"[{1 - score:.4f}, {score:.4f}]" for score in scores),
            version=version("trl-mprm"),
        )
    )
