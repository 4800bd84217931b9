"""
A step format fixes the layout of question and steps, the position at which a step is read, and the two tokens that tell
good from bad.

It is saved beside the weights as `process_reward_config.json`:

    {"marker": "<prm>", "reward_tokens": ["Yes", "No"], "joiner": "\\n\\n", "messages": null, "answer": null, "head": null}
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..files import write_json
from .tokens import special_tokens


class StepIds(NamedTuple):
    """Token ids of a [`StepFormat`] in one tokenizer."""

    marker: list[int]
    good: int
    bad: int
    joiner: list[int]


@dataclass(frozen=True)
class StepFormat:
    """
    The layout of question and steps, the position at which a step is read, and the tokens or head that judge it.

    Args:
        marker (`str`, *optional*, defaults to `"<prm>"`):
            Text after every step. The reward of a step is read at its last token.
        reward_tokens (`tuple[str, str]`, *optional*, defaults to `("Yes", "No")`):
            Tokens for a good and a bad step. P(step good) is the softmax over their two logits.
        joiner (`str`, *optional*, defaults to a blank line):
            Text between one marker and the next step.
        messages (`tuple[tuple[str, str], ...]`, *optional*):
            Layout of a checkpoint that was trained elsewhere, as pairs of role and text. `<image>` in a text stands for
            the images, `{question}` for the question, `{steps}` for the steps with their markers, `{step}` for the
            first step if every step has its own turn (see `answer`). The role `""` means plain text without a chat
            template; without `{steps}` or `{step}` the steps follow the messages as tokens. Defaults to our layout:
            images and question in the user turn, steps in the assistant turn.
        answer (`str`, *optional*):
            The assistant's reply to each step, in a layout of turns. A step is read at the token before it.
        head (`str`, *optional*):
            Name of the classification head in the checkpoint, e.g. `"score"`, if a head of one output (sigmoid) or two
            (softmax, the second is good) gives the reward instead of the language-model head.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            Loss used in training; with `"beta_binomial"` the marker's logit holds the concentration of the score.
    """

    marker: str = "<prm>"
    reward_tokens: tuple[str, str] = ("Yes", "No")
    joiner: str = "\n\n"
    messages: tuple[tuple[str, str], ...] | None = None
    answer: str | None = None
    head: str | None = None
    loss_type: str = "hard"

    FILE_NAME = "process_reward_config.json"

    @property
    def reads_images(self) -> bool:
        """Whether the layout has a place for images."""
        return self.messages is None or any("<image>" in text for _, text in self.messages)

    @property
    def takes_rendered_prompts(self) -> bool:
        """Whether only the prompt precedes the steps, so that the prompt may be an already rendered chat."""
        return self.messages == (("", "{question}"),)

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> StepIds:
        """Look up the tokens. Raises `ValueError` if the tokenizer lacks the marker or splits a reward token."""
        marker = tokenizer.encode(self.marker, add_special_tokens=False) if self.marker else []
        # Some published markers are plain text (a line end); those in angle brackets are one token each.
        one_token = self.messages is None or (self.messages[0][0] and re.fullmatch(r"<\S+>", self.marker))
        if one_token and (len(marker) != 1 or marker[0] == tokenizer.unk_token_id):
            do = "train with ProcessRewardTrainer first, or name a marker that the tokenizer has"
            if self.messages is not None:
                do = "name the step_format that this checkpoint was trained on"
            raise ValueError(f"the tokenizer has no marker token {self.marker!r}: {do}")
        joiner = tokenizer.encode(self.joiner, add_special_tokens=False) if self.joiner else []
        if self.head is not None:  # the two columns of [`~modeling.StepClassifier`]
            return StepIds(marker, 1, 0, joiner)
        reward = [tokenizer.encode(token, add_special_tokens=False) for token in self.reward_tokens]
        for token, ids in zip(self.reward_tokens, reward, strict=True):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                raise ValueError(
                    f"reward token {token!r} is {len(ids)} tokens of this tokenizer ({ids}), expected one it knows: "
                    "set reward_tokens to two words that are one token each"
                )
        if reward[0] == reward[1]:
            raise ValueError(f"reward_tokens is {self.reward_tokens}, expected two different tokens")
        return StepIds(marker, reward[0][0], reward[1][0], joiner)

    def save(self, folder: str | os.PathLike) -> None:
        write_json(asdict(self), Path(folder) / self.FILE_NAME)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "StepFormat":
        """Read the format of a trained checkpoint. Raises `FileNotFoundError` if it is not one of ours."""
        path = Path(folder) / cls.FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {cls.FILE_NAME}: expected a checkpoint saved by ProcessRewardTrainer; "
                "name the step_format of a published one"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            _check_types(values)
            messages = values.get("messages")
            return cls(
                values["marker"],
                tuple(values["reward_tokens"]),
                values["joiner"],
                messages and tuple((role, text) for role, text in messages),
                values.get("answer"),
                values.get("head"),
                values.get("loss_type", "hard"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected marker, reward_tokens and joiner ({error!r}): save it again"
            ) from error


def forbidden_tokens(tokenizer: PreTrainedTokenizerBase, step_format: StepFormat) -> list[str]:
    """
    Special tokens that a prompt may not contain: all, for one could forge an image, a turn or a marker. Of a prompt that
    may be a rendered chat, the marker alone.
    """
    special = special_tokens(tokenizer)
    return (
        [token for token in special if token in step_format.marker] if step_format.takes_rendered_prompts else special
    )


def _check_types(values: dict) -> None:
    """Raise `TypeError` for the first value of the wrong type for a [`StepFormat`], e.g. text for the two tokens."""
    texts = dict.fromkeys(("marker", "joiner"), "text") | dict.fromkeys(
        ("answer", "head", "loss_type"), "text or null"
    )
    for name, expected in texts.items():
        if not isinstance(values.get(name), str) and (expected == "text" or values.get(name) is not None):
            raise TypeError(f"{name} is {values.get(name)!r}, expected {expected}")
    tokens, messages = values["reward_tokens"], values.get("messages")
    if not isinstance(tokens, list) or len(tokens) != 2 or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"reward_tokens is {tokens!r}, expected a list of two texts")
    if messages is not None and not (isinstance(messages, list) and all(isinstance(pair, list) for pair in messages)):
        raise TypeError(f"messages is {messages!r:.60}, expected a list of pairs of role and text, or null")
