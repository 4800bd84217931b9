"""Configure the training of a process reward model: the fields beyond those of `transformers.TrainingArguments`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..models.quiet import quiet_upstream
from ..prompting.step_format import StepFormat
from .loss import LOSSES


quiet_upstream()

OVERLONG = ("error", "drop_steps", "drop_row")
REWARD_HEADS = ("lm", "classification")


@dataclass
class ProcessRewardConfig(TrainingArguments):
    """
    Configuration class for the [`ProcessRewardTrainer`].

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`, used when `model` is given as a string.
        processor_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the processor's `from_pretrained`, e.g. `{"max_pixels": 200704}`. Saved with the
            model, so that scoring sees pictures of the same size.
        marker (`str`, *optional*, defaults to `"<prm>"`):
            Token after every step, at which the reward is read. Added to the vocabulary if it is missing.
        reward_tokens (`list[str]`, *optional*, defaults to `["Yes", "No"]`):
            Tokens whose logits tell a good step from a bad one, one token each.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            What a step learns: `"hard"` the label 1[MC score > threshold], `"soft"` the MC score itself,
            `"beta_binomial"` the count of good continuations in the columns `mc_counts` and `mc_total` (the mean is the
            score; the logit of the marker learns the concentration).
        hard_threshold (`float`, *optional*, defaults to `0.0`):
            Threshold of the hard label.
        concentration_penalty (`float`, *optional*, defaults to `0.05`):
            Penalty of `loss_type="beta_binomial"`, see [`~loss.beta_binomial_losses`].
        class_weights (`list[float]`, *optional*):
            Weights of good and of bad steps in the loss. The sum is still divided by the unweighted number of steps.
        source_weights (`dict[str, float]`, *optional*):
            Weights of the rows of each `source`; sources that are not named have weight 1.
        max_length (`int`, *optional*):
            Maximum number of tokens per row, including those of its images. Images are never cut.
        max_completion_length (`int`, *optional*):
            Maximum number of tokens in the steps of a row.
        overlong (`str`, *optional*):
            How to treat a longer row: `"error"` raises, `"drop_steps"` drops trailing steps, `"drop_row"` skips the
            row. Defaults to `"error"`, and to `"drop_steps"` with a classification head, as TRL's `PRMTrainer` cut rows.
            The logs count what was dropped (`overlong_rows`, `overlong_steps`, `overlong_labelled_steps`, and
            `eval_overlong_rows` and so on in an evaluation).
        share_prefix (`bool`, *optional*, defaults to `False`):
            Encode a question and its images once per batch, however many rollouts share them. The rows of a question
            are drawn together, and its solutions are padded to the longest of them; in our test with solutions of one
            to six steps a third of the tokens was padding. Not available under FSDP and DeepSpeed ZeRO-3.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Whether to train only on the last step of each row. An evaluation uses all steps.
        dataset_num_proc (`int`, *optional*):
            Number of processes that prepare the data sets.
        reward_head (`str`, *optional*):
            `"lm"` reads two tokens of the language-model head. `"classification"` reads a head of two labels on a
            text-only model, as TRL's `PRMTrainer` trained it; the prompt is plain text, and a step is read at the last
            token of `step_separator`. Defaults to `"classification"` for a token classifier and to `"lm"` for others.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether the dropout of a token classifier is switched off.
        step_separator (`str`, *optional*, defaults to `"\\n"`):
            Text after every step, for `reward_head="classification"`.
        freeze_vision_encoder (`bool`, *optional*, defaults to `True`):
            Whether to freeze the vision encoder; the projector and the text decoder are trained.

    > [!NOTE]
    > These differ from the defaults of [`~transformers.TrainingArguments`], as in the paper's Table 7:
    > `learning_rate` 1e-5, `weight_decay` 0.05, `warmup_steps` 0.05 (a share of all steps), `lr_scheduler_type`
    > "cosine", `num_train_epochs` 1. And `logging_steps` is 10, `remove_unused_columns` False (the collator reads the
    > raw columns).
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + [
        "model_init_kwargs",
        "processor_kwargs",
        "source_weights",
    ]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    logging_steps: float = field(default=10, metadata={"help": "Number of steps between two entries of the log."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave this off: the collator reads the raw columns."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the model's `from_pretrained`, as JSON."}
    )
    processor_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Keyword arguments for the processor, as JSON, e.g. {"max_pixels": 200704}; saved with the model.'
        },
    )
    marker: str = field(
        default=StepFormat.marker,
        metadata={"help": "Token after every step, at which its reward is read; default: <prm>."},
    )
    reward_tokens: list[str] = field(
        default_factory=lambda: list(StepFormat.reward_tokens),
        metadata={"help": "The tokens for a good and for a bad step; default: Yes No."},
    )
    loss_type: str = field(
        default="hard",
        metadata={
            "help": "Loss of a step. hard: cross entropy with the label 1[MC score > hard_threshold]; soft: cross entropy "
            "with the MC score itself; beta_binomial: likelihood of the counts in the columns mc_counts and mc_total.",
            "choices": tuple(LOSSES),
        },
    )
    hard_threshold: float = field(
        default=0.0, metadata={"help": "A step is good if its MC score is above this (loss_type hard)."}
    )
    concentration_penalty: float = field(
        default=0.05,
        metadata={"help": "Penalty on high concentration where the mean is off (loss_type beta_binomial)."},
    )
    class_weights: list[float] | None = field(
        default=None, metadata={"help": "Two weights in the loss: of good steps, of bad steps."}
    )
    source_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": 'Weights of the rows of some sources, as JSON, e.g. {"ChartQA": 2.0}.'}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens per row, images included."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens in the steps of a row."}
    )
    overlong: str | None = field(
        default=None,
        metadata={"help": "What to do with a longer row: stop, drop its last steps, or skip it.", "choices": OVERLONG},
    )
    share_prefix: bool = field(
        default=False,
        metadata={"help": "Encode a question and its images once per batch, for all rollouts that share them."},
    )
    train_on_last_step_only: bool = field(default=False, metadata={"help": "Train only on the last step of each row."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Number of processes that prepare the data."})
    reward_head: str | None = field(
        default=None,
        metadata={
            "help": "lm: two tokens of the language-model head; classification: a head of two labels on a text-only model, "
            "as TRL's PRMTrainer trains; default: the head of the model.",
            "choices": REWARD_HEADS,
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch off the dropout of a token classifier."})
    step_separator: str = field(
        default="\n", metadata={"help": "Text after every step, with reward_head classification; default: a line end."}
    )
    freeze_vision_encoder: bool = field(
        default=True, metadata={"help": "Train the projector and the text decoder, but not the vision encoder."}
    )

    def __post_init__(self):
        choices = {"loss_type": tuple(LOSSES), "overlong": OVERLONG, "reward_head": REWARD_HEADS}
        for name, allowed in choices.items():
            if getattr(self, name) not in (allowed if name == "loss_type" else (*allowed, None)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not 0 <= self.hard_threshold < 1:
            raise ValueError(
                f"hard_threshold is {self.hard_threshold}, expected at least 0 and below 1: a step is good above it"
            )
        if self.class_weights is not None and (len(self.class_weights) != 2 or not _all_weights(self.class_weights)):
            raise ValueError(f"class_weights is {self.class_weights}, expected two of at least 0: for good, for bad")
        for name in ("max_length", "max_completion_length"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name} is {limit}, expected at least 1, or None for no limit")
        if self.share_prefix and self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                'share_prefix draws the rows of a question together and train_sampling_strategy="group_by_length" rows '
                "of one length: choose one"
            )
        if not self.step_separator:
            raise ValueError("step_separator is empty, expected text that ends a step")
        self.check_head()
        if len(self.reward_tokens) != 2:
            raise ValueError(f"reward_tokens is {self.reward_tokens}, expected two: for a good step, for a bad step")
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy is {self.hub_strategy!r}, expected 'end' or 'every_save': "
                "checkpoints to resume from hold pickles, which are not published"
            )
        super().__post_init__()  # reads the dictionaries
        if self.source_weights is not None and not _all_weights(self.source_weights.values()):
            raise ValueError(f"source_weights is {self.source_weights}, expected numbers of at least 0")
        if "quantization_config" in (self.model_init_kwargs or {}):
            raise ValueError(
                "model_init_kwargs has quantization_config: give it to ProcessRewardTrainer itself, or set load_in_4bit "
                "on the command line; only the text decoder is quantised then"
            )

    def check_head(self) -> None:
        """Raise `ValueError` if these settings rule out a classification head."""
        if self.reward_head == "classification" and (self.share_prefix or LOSSES[self.loss_type].reads_marker):
            reading = " and ".join(f'loss_type="{name}"' for name, loss in LOSSES.items() if loss.reads_marker)
            raise ValueError(f'share_prefix and {reading} need reward_head="lm"')

    @property
    def step_format(self) -> StepFormat:
        if self.reward_head == "classification":
            return StepFormat(
                self.step_separator, joiner="", messages=(("", "{question}"),), head="score", loss_type=self.loss_type
            )
        return StepFormat(self.marker, tuple(self.reward_tokens), loss_type=self.loss_type)


def _all_weights(weights: Iterable[float]) -> bool:
    return all(0 <= weight < math.inf for weight in weights)
