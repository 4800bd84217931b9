"""
Rewards for training a policy: turn its completions into rows for a process reward model, and count those that fail.

    GRPOTrainer(reward_funcs=prm.as_reward_func(), ...)      one number per completion
    prm.step_rewards(["1 + 1?"], ["It is 2.\\n\\nSo 2."])      one per step, with the step's place in the completion
        -> [[StepReward(score=0.91, start=0, end=8, ...), StepReward(score=0.88, start=10, end=15, ...)]]

A policy may write anything: text that is too long, no text, the name of a special token. None of it may end a run.
"""

import logging
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .data.rows import question_key
from .data.splitting import split_steps
from .prompting.tokens import images_of, texts_of


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReward:
    """
    P(step good) of one step of a completion, and the place of the step in it.

    Args:
        score (`float`):
            P(step good) in [0, 1].
        start, end (`int`):
            The characters of the step, `text[start:end]`; [`StepScorer.step_rewards`] defines the text.
        token_start, token_end (`int`, *optional*):
            The tokens that hold a character of the step, `ids[token_start:token_end]`; None for a completion that did
            not come as token ids. A token that holds the end of one step and the beginning of the next belongs to both.
    """

    score: float
    start: int
    end: int
    token_start: int | None = None
    token_end: int | None = None


class Scored(NamedTuple):
    """The steps of a completion and their scores, or no scores and the error that explains why."""

    steps: list[str]
    scores: list[float]
    error: ValueError | None = None


ScoreBatch = Callable[[list[dict[str, Any]]], list[list[float]]]


def reward_function(
    score_batch: ScoreBatch,
    aggregate: Callable[[Sequence[float]], float],
    split: str,
    unscored: float | None,
    name: str,
) -> Callable[..., list[float | None]]:
    """The function that [`StepScorer.as_reward_func`] hands to TRL."""
    counts: Counter[str] = Counter()

    def process_reward(
        prompts: list,
        completions: list,
        images: list | None = None,
        image: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        if images is None and image is not None:
            images = [[] if one is None else [one] for one in image]
        scored = score_completions(score_batch, prompts, completions, images, split)
        errors = [one.error for one in scored if one.error is not None]
        for error in errors:
            kind = kind_of(error)
            counts[kind] += 1
            if counts[kind] == 1:
                logger.warning(
                    f"{name}: a completion cannot be scored and earns {unscored}: {error}. "
                    "Others like it are only counted (see the function's `unscored`)"
                )
        if log_metric is not None:
            log_metric(f"{name}/unscored", len(errors) / len(scored))
        return [unscored if one.error is not None else aggregate(one.scores) if one.scores else 0.0 for one in scored]

    process_reward.__name__ = name
    process_reward.unscored = counts
    return process_reward


def step_rewards(
    score_batch: ScoreBatch,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    images: Sequence[Sequence[Any] | None] | None,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[list[StepReward] | None]:
    """The steps of completions, see [`StepScorer.step_rewards`]."""
    texts = completions if tokenizer is None else [decode(tokenizer, ids) for ids in completions]
    rewards: list[list[StepReward] | None] = []
    scored = score_completions(score_batch, prompts, texts, images, split)
    for completion, text, (steps, scores, error) in zip(completions, texts, scored, strict=True):
        if error is not None:
            rewards.append(None)
            continue
        spans = step_spans(said(text, "assistant"), steps)
        tokens = [(None, None) if tokenizer is None else token_span(tokenizer, completion, span) for span in spans]
        rewards.append([StepReward(score, *span, *of) for score, span, of in zip(scores, spans, tokens, strict=True)])
    return rewards


def score_completions(
    score_batch: ScoreBatch,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    images: Sequence[Sequence[Any] | None] | None,
    split: str,
) -> list[Scored]:
    """
    Score completions of a policy; those of one prompt are scored together.

    Args:
        score_batch (`Callable`):
            Scores rows; raises `ValueError` before scoring any if it cannot render one of them.
        prompts, completions (`Sequence`):
            Texts, or chat messages.
        images (`Sequence`, *optional*):
            One list of pictures per prompt.
        split (`str`):
            How to split a completion into steps, see [`split_steps`].

    Raises:
        `ValueError`: lists of different lengths, which is the caller's error and not the policy's.
    """
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with images for {len(images)}: expected as many")
    rows: list[dict[str, Any] | ValueError] = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            row = {"images": (images[index] if images is not None else None) or [], "prompt": said(prompt, "user")}
            rows.append(row | {"completions": split_steps(said(completion, "assistant"), split)})
        except ValueError as error:
            rows.append(error)
    return score_rows(score_batch, rows)


def score_rows(score_batch: ScoreBatch, rows: Sequence[dict[str, Any] | ValueError]) -> list[Scored]:
    """Score rows, those of one question together; an error in a row's place stays that row's error."""
    scored: dict[int, Scored] = {}
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        if isinstance(row, ValueError):
            scored[index] = Scored([], [], row)
        elif not row["completions"]:
            scored[index] = Scored([], [])
        else:
            groups.setdefault(question_key(row["prompt"], images_of(row)), []).append(index)
    together = [group for group in groups.values() if len(group) > 1]
    alone = [group[0] for group in groups.values() if len(group) == 1]
    for group in [*together, alone]:
        scored |= zip(group, _score_or_tell(score_batch, [rows[index] for index in group]), strict=True)
    return [scored[index] for index in range(len(rows))]


def _score_or_tell(score_batch: ScoreBatch, rows: list[dict[str, Any]]) -> list[Scored]:
    """Score rows; if one of them is refused, score each half, until the refused row is alone."""
    try:
        scores = score_batch(rows) if rows else []
    except ValueError as error:
        if len(rows) == 1:
            return [Scored(rows[0]["completions"], [], error)]
        half = len(rows) // 2
        return _score_or_tell(score_batch, rows[:half]) + _score_or_tell(score_batch, rows[half:])
    nan = ValueError("the model's scores are not numbers (NaN)")
    return [
        Scored(row["completions"], *(([], nan) if any(map(math.isnan, values)) else (values, None)))
        for row, values in zip(rows, scores, strict=True)
    ]


def said(turns: str | list[dict[str, Any]], role: str) -> str:
    """
    The text of a plain prompt or completion, or what `role` says in a conversation.

    Raises `ValueError` if there is none, e.g. where a turn only calls a tool and its content is None.

    Examples:
    ```python
    >>> from trl_mprm.rewards import said
    >>> said([{"role": "assistant", "content": None}, {"role": "assistant", "content": "So 2."}], "assistant")
    'So 2.'

    ```
    """
    if isinstance(turns, str):
        return turns
    messages = turns if isinstance(turns, list) else []
    spoken = [turn for turn in messages if isinstance(turn, dict) and turn.get("role") == role]
    texts = texts_of([turn for turn in spoken if turn.get("content") is not None])
    if not texts:
        raise ValueError(f"the {role} said nothing: expected text, or messages with text as content")
    return "\n".join(texts)


def kind_of(error: ValueError) -> str:
    """
    The text of an error without the parts that differ from row to row, so that errors of one kind are counted together.

    Examples:
    ```python
    >>> from trl_mprm.rewards import kind_of
    >>> kind_of(ValueError("row 7 has 600 tokens and this model reads 512: shorten the solution or the images"))
    'row N has N tokens and this model reads N: shorten the solution or the images'

    ```
    """
    while isinstance(error.__cause__, ValueError):  # the outer error only adds the name of the row
        error = error.__cause__
    return re.sub(r"\d+|(?<!\w)(['\"]).*?\1", lambda match: "N" if match.group()[0].isdigit() else "'...'", str(error))


def step_spans(text: str, steps: Sequence[str]) -> list[tuple[int, int]]:
    """
    The character span of each step in the text that it was split from, without surrounding white space.

    Examples:
    ```python
    >>> from trl_mprm.rewards import step_spans
    >>> step_spans("A is red.\\r\\n\\r\\nSo one.", ["A is red.", "So one."])
    [(0, 9), (13, 20)]

    ```
    """
    spans, at = [], 0
    for step in steps:
        match = re.compile(r"\s+".join(map(re.escape, step.split()))).search(text, at)
        spans.append(match.span())
        at = match.end()
    return spans


def token_span(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], span: tuple[int, int]) -> tuple[int, int]:
    """The range of tokens in `ids` that hold a character of `span`, found by decoding beginnings of `ids`."""
    text, (start, end) = decode(tokenizer, ids), span
    places = range(len(ids) + 1)
    first = bisect_right(places, start, key=lambda n: len(decode(tokenizer, ids[:n]))) - 1
    last = bisect_left(places, True, key=lambda n: decode(tokenizer, ids[:n]).startswith(text[:end]))
    return first, last


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode a completion that came as token ids, without special tokens and with blanks unchanged."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
