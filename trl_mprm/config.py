"""The few fields that a process reward training has beyond `transformers.TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .loss import LOSS_TYPES
from .step_format import StepFormat


@dataclass
class ProcessRewardConfig(TrainingArguments):
    """
    Configuration class for the [`ProcessRewardTrainer`].

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`, used when `model` is given as a string.
        processor_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the processor's `from_pretrained`, as `{"max_pixels": 200704}`. Saved with the
            model, so scoring sees pictures of the same size.
        marker (`str`, *optional*, defaults to `"<prm>"`):
            Token after every step, at which the reward is read. Added to the vocabulary where it is missing.
        reward_tokens (`list[str]`, *optional*, defaults to `["Yes", "No"]`):
            Tokens whose logits tell a good step from a bad one, one token each.
        loss_type (`str`, *optional*, defaults to `"hard"`):
            `"hard"`: label 1[MC score > threshold], `"soft"`: the MC score itself.
        hard_threshold (`float`, *optional*, defaults to `0.0`):
            Threshold of the hard label.
        freeze_vision_encoder (`bool`, *optional*, defaults to `True`):
            Keep the vision encoder as it is; the projector and the text decoder are trained.

    > [!NOTE]
    > These differ from the defaults of [`~transformers.TrainingArguments`], as in the paper's Table 7:
    > `learning_rate` 1e-5, `weight_decay` 0.05, `warmup_steps` 0.05 (a share of all steps), `lr_scheduler_type`
    > "cosine", `num_train_epochs` 1. And `logging_steps` is 10, `remove_unused_columns` False (the collator reads the
    > raw columns).
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["model_init_kwargs", "processor_kwargs"]

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator reads the raw columns."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained`, when the model is a string."}
    )
    processor_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the processor, as {'max_pixels': 200704}."}
    )
    marker: str = field(default=StepFormat.marker, metadata={"help": "Token after every step."})
    reward_tokens: list[str] = field(
        default_factory=lambda: list(StepFormat.reward_tokens),
        metadata={"help": "The two tokens for a good and a bad step."},
    )
    loss_type: str = field(default="hard", metadata={"help": "'hard' or 'soft' labels.", "choices": LOSS_TYPES})
    hard_threshold: float = field(default=0.0, metadata={"help": "Hard label = 1[MC score > threshold]."})
    freeze_vision_encoder: bool = field(default=True, metadata={"help": "Do not train the vision encoder."})

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type is {self.loss_type!r}, expected one of {', '.join(LOSS_TYPES)}")
        if len(self.reward_tokens) != 2:
            raise ValueError(f"reward_tokens is {self.reward_tokens}, expected two: for a good step, for a bad step")
        if self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy is {self.hub_strategy!r}, expected 'end' or 'every_save': "
                "checkpoints to resume from hold pickles, which are not published"
            )
        super().__post_init__()

    @property
    def step_format(self) -> StepFormat:
        return StepFormat(self.marker, tuple(self.reward_tokens))
