"""The methods that all step scorers share, whether the model is in this process or behind a server."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

from PIL import Image
from transformers import PreTrainedTokenizerBase

from .data.aggregates import AGGREGATES
from .data.splitting import SPLITS, split_steps
from .rewards import StepReward, reward_function, step_rewards


@dataclass(frozen=True)
class Candidate:
    """One candidate of a ranking: its index in the input, its aggregated score, and P(step good) of its steps."""

    index: int
    score: float
    step_scores: list[float]


class StepScorer:
    """
    Scores, ranks and rewards by means of `score_batch`, which a subclass provides; reward functions are named after `name`.
    """

    name: str

    def score_batch(self, rows: Sequence[dict[str, Any]]) -> list[list[float]]:
        """P(step good) of each step of each row, in the order of `rows`."""
        raise NotImplementedError

    def score(self, images: Sequence[Image.Image | str], question: str, steps: Sequence[str]) -> list[float]:
        """
        Score the steps of one solution.

        Args:
            images (`Sequence` of images or paths):
                Pictures of the question, in order; empty for a text question.
            question (`str`):
                The question.
            steps (`Sequence[str]`):
                Steps of the solution, in order.

        Returns:
            `list[float]`: P(step good) in [0, 1], one per step.
        """
        row = {"images": images, "prompt": question, "completions": steps}
        return self.score_batch([row])[0]

    def best_of_n(
        self,
        images: Sequence[Image.Image | str],
        question: str,
        candidates: Sequence[str | Sequence[str]],
        aggregate: Literal["mean", "min", "product", "last"] = "mean",
        split: str | None = None,
        **options: Any,
    ) -> list[Candidate]:
        """
        Rank candidate solutions of one question, best first; they share one pass over images and question.

        Args:
            images, question:
                As in [`StepScorer.score`].
            candidates (`Sequence[str | Sequence[str]]`):
                Solutions, each a list of steps, or a text to `split`.
            aggregate (`str`, *optional*, defaults to `"mean"`):
                How step scores become one score: `"mean"` (the paper's Table 3), `"min"`, `"product"` or `"last"`.
            split (`str`, *optional*):
                How to split texts into steps, see [`split_steps`].
            options:
                Passed to `score_batch`, e.g. `max_batch_tokens`.

        Returns:
            `list[Candidate]`: all candidates, highest score first; equal scores keep their order.
        """
        _check_aggregate(aggregate)
        if isinstance(candidates, str):
            raise ValueError("`candidates` is one string, expected a list of solutions: write candidates=[...]")
        if not candidates:
            raise ValueError("`candidates` is empty, expected at least one solution")
        rows = []
        for index, steps in enumerate(candidates):
            if isinstance(steps, str):
                if split is None:
                    raise ValueError(
                        f"candidate {index} is one string, expected a list of steps: "
                        f"split it first, or name a rule (split={' or '.join(map(repr, SPLITS))})"
                    )
                steps = split_steps(steps, split)
            rows.append({"images": images, "prompt": question, "completions": steps})
            rows[-1]["rollout_id"] = f"candidate {index}"
        ranking = [
            Candidate(index, AGGREGATES[aggregate](scores), scores)
            for index, scores in enumerate(self.score_batch(rows, **options))
        ]
        return sorted(ranking, key=lambda candidate: -candidate.score)

    def as_reward_func(
        self,
        aggregate: Literal["mean", "min", "product", "last"] = "mean",
        split: str = "blank_line",
        unscored: float | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Callable[..., list[float | None]]:
        """
        Return a reward function for `reward_funcs` of TRL's [`~trl.GRPOTrainer`].

        The function takes the arguments that TRL passes to a callable: `prompts` and `completions`, texts or messages,
        and the dataset's `images` or `image` column. Completions of one prompt share its prefix. A completion without
        text earns 0. Nothing that a policy writes stops the run: a completion that cannot be scored (too long for this
        model, a message without content) earns `unscored`. Each reason is logged once; `function.unscored` counts them
        by reason, and TRL logs their share as `{name}/unscored`.

        Args:
            aggregate, split, options:
                As in [`StepScorer.best_of_n`].
            unscored (`float`, *optional*):
                Reward of a completion that cannot be scored. Defaults to None: TRL leaves this function out of the
                completion's reward.
            name (`str`, *optional*):
                Name of the function, under which TRL logs it. Defaults to the model's name and the aggregate, followed
                by a number if a function of another model already has that name.

        Examples:
        ```python
        trainer = GRPOTrainer(model=policy, reward_funcs=prm.as_reward_func(), train_dataset=dataset, args=args)
        ```
        """
        _check_aggregate(aggregate)
        split_steps("", split)
        name = name or self._own_name(aggregate if split == "blank_line" else f"{aggregate}_{split}")
        score_batch = partial(self.score_batch, **options)
        return reward_function(score_batch, AGGREGATES[aggregate], split, unscored, name)

    def step_rewards(
        self,
        prompts: list,
        completions: list,
        images: list | None = None,
        split: str = "blank_line",
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> list[list[StepReward] | None]:
        """
        Dense rewards for a custom training loop: the score of each step, and its place in the completion.

        Args:
            prompts (`list`):
                Texts or chat messages, one per completion.
            completions (`list`):
                Completions of the policy: texts, chat messages or, with `tokenizer`, the sampled token ids.
            images (`list`, *optional*):
                A list of pictures per prompt.
            split (`str`, *optional*, defaults to `"blank_line"`):
                How to split a completion into steps, see [`split_steps`].
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                The policy's tokenizer, for completions that are token ids. Nothing is tokenised again: token spans
                refer to the given ids.
            options:
                Passed to `score_batch`, e.g. `max_batch_tokens`.

        Returns:
            `list[list[StepReward] | None]`: the steps of each completion: an empty list for one without text, None for
            one that cannot be scored. Character spans refer to the completion's text: for a string the string itself;
            for messages the assistant's texts, joined by line ends; for token ids `tokenizer.decode(ids,
            skip_special_tokens=True, clean_up_tokenization_spaces=False)`.

        Examples:
        ```python
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from trl_mprm import ProcessRewardModel, StepFormat
        >>> from trl_mprm.models.loading import add_marker, load_model, load_processing_class
        >>> from trl_mprm.models.tiny import tiny_model
        >>> with TemporaryDirectory() as folder:
        ...     _ = tiny_model("qwen2", Path(folder))
        ...     model, tokenizer = load_model(folder), load_processing_class(folder, vision=False)
        ...     add_marker(model, tokenizer, StepFormat())
        ...     prm = ProcessRewardModel(model, tokenizer)
        >>> text = "A is red.\\n\\nSo 1."
        >>> (steps,) = prm.step_rewards(["How many?"], [tokenizer.encode(text)], tokenizer=tokenizer)
        >>> [(text[step.start : step.end], step.token_start, step.token_end) for step in steps]
        [('A is red.', 0, 9), ('So 1.', 11, 16)]

        ```
        """
        score_batch = partial(self.score_batch, **options)
        return step_rewards(score_batch, prompts, completions, images, split, tokenizer)

    def _own_name(self, how: str) -> str:
        """Find a name that no reward function of another model has in this process."""
        base = re.sub(r"[^\w.-]+", "_", f"{self.name}_{how}")
        names = (base, *(f"{base}_{number}" for number in range(2, len(_NAMED) + 3)))
        name = next(name for name in names if _NAMED.get(name, self) is self)
        _NAMED[name] = self
        return name


# The owner of each name of a reward function; TRL would log two functions of one name as one.
_NAMED: WeakValueDictionary[str, StepScorer] = WeakValueDictionary()


def _check_aggregate(aggregate: str) -> None:
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate is {aggregate!r}, expected one of {', '.join(AGGREGATES)}")
