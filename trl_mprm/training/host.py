"""
All code that reaches into transformers' Trainer. Each override or setting names its upstream code, and why it is needed.

Upstream is transformers/trainer.py unless another file is named. Code that reaches into a model or into PEFT is in
`models/`: `adapters`, `classifier`, `distinct_images`, `shared_prefix`.
"""

import copy
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import ADAPTER_CONFIG_NAME, PushInProgress

from ..data.hub import public_name
from ..files import write_json
from ..models.anatomy import base_of, is_vision_language
from ..models.reader import StepReader
from ..models.shared_prefix import can_share_prefix
from .checkpoints import check_checkpoint, last_whole_checkpoint
from .config import ProcessRewardConfig
from .sampling import EpochSampler, NumberedRows, by_length, by_prompt, prompt_groups, undecoded, with_lengths


logger = logging.getLogger(__name__)


def host_args(args: ProcessRewardConfig, model: PreTrainedModel, streams: bool) -> ProcessRewardConfig:
    """
    Return a copy of the configuration with settings that Trainer reads only from there.

    - `Trainer.__init__` reads `label_names`, the keys of a batch that are labels. If unset, it guesses them from the
      class of the model, and warns that it cannot for a PEFT model.
    - `Trainer._build_accelerator_args` reads `ddp_find_unused_parameters`: rows without images leave the projector
      without gradient.
    - `Trainer.create_accelerator_and_postprocess` reads `accelerator_config`: accelerate would dispatch a batch of a
      stream by slicing every tensor by rows, but the rows of picture tensors are not the rows of the batch.
    - `Trainer._get_dataloader` reads `dataloader_pin_memory`: torch warns if there is no device to pin memory for.
    """
    args = copy.copy(args)
    args.dataloader_pin_memory = args.dataloader_pin_memory and torch.accelerator.is_available()
    args.label_names = args.label_names or ["labels"]
    if is_vision_language(model.config) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True
    if streams:
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.accelerator_config.dispatch_batches = False
    return args


def check_sharing(model: PreTrainedModel, args: ProcessRewardConfig) -> None:
    """Raise `ValueError` if the prefix of a question cannot be shared."""
    if not args.share_prefix:
        return
    if not can_share_prefix(model):
        raise ValueError(f"share_prefix: {type(model).__name__} keeps more of its past than keys and values")
    # `accelerate launch` sets the environment variable before an Accelerator exists.
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" or is_deepspeed_zero3_enabled():
        raise ValueError(
            "share_prefix under FSDP or DeepSpeed ZeRO-3: a process calls the model once per question, and those with "
            "fewer questions would leave the others waiting for their weights; train with DDP, or without it"
        )


def one_forward_per_batch(model: torch.nn.Module, reader: StepReader) -> None:
    """
    Let `model(groups=batch)` read all groups of a batch.

    torch's DistributedDataParallel (torch/nn/parallel/distributed.py, `forward`) averages gradients of the parameters
    used by one call of its `forward`, but processes have different numbers of groups. So the wrapper is called once, and
    the wrapped model as often as needed.
    """
    forward = model.forward
    model.forward = lambda *args, groups=None, **kwargs: (
        forward(*args, **kwargs) if groups is None else reader.read(model, groups)
    )


class DecoderInputGradients(TrainerCallback):
    """
    Require gradients only at the decoder's input, for activation checkpointing.

    `PreTrainedModel.enable_input_require_grads` (transformers/modeling_utils.py), which Trainer calls, requires them in
    every part of a model, so that a frozen vision encoder would compute gradients that nobody needs.
    """

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        base = base_of(model)
        base.disable_input_require_grads()
        base.get_decoder().enable_input_require_grads()


class HostedTrainer(Trainer):
    """Overrides of Trainer that do not concern rewards but rows, their order, checkpoints and the Hub."""

    # `Trainer.training_step`: the loss has already been divided by the labelled steps of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # `Trainer._get_num_items_in_batch` counts the labels of the accumulated batch over all processes only if this is set;
        # `__init__` guesses it from the signature of the model's forward.
        self.model_accepts_loss_kwargs = True
        if (
            self.args.gradient_checkpointing
            and self.args.freeze_vision_encoder
            and is_vision_language(self.model.config)
        ):
            self.add_callback(DecoderInputGradients())
        # accelerate's FullyShardedDataParallelPlugin (accelerate/utils/dataclasses.py, `set_auto_wrap_policy`) shards the
        # layers that the launcher's file names, and guesses if it names none. Here only layers of the decoder are
        # sharded, because an encoder does not run in a process that has no image.
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = [type(base_of(self.model).get_decoder().layers[0]).__name__]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in [`~transformers.Trainer`], but `True` resumes from the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:  # without an optimizer state Trainer would silently start afresh
            check_checkpoint(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, **kwargs)
        self._check_weights()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Raise `ValueError` if a loss is not finite; Trainer would log the mean of earlier losses and go on."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {self.state.global_step + 1} is {loss.item()}{self._diverged()}")
        return loss

    def _check_weights(self) -> None:
        """Raise `ValueError` if a trained weight of this process is not finite."""
        for name, parameter in self.model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad and not torch.isfinite(local).all():
                raise ValueError(f"{name} is not finite after step {self.state.global_step}{self._diverged()}")

    def _diverged(self) -> str:
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        return (
            f" (learning rate {rate:.3g}): the run stops, nothing is saved; lower learning_rate, or train in bf16 or "
            "float32, from a checkpoint before"
        )

    # ---- rows and their order

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """As in Trainer, with rows that know their number and whose pictures the collator opens."""
        if isinstance(dataset, Dataset):
            dataset = NumberedRows(dataset)
        elif isinstance(dataset, IterableDataset):
            dataset = undecoded(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """As in Trainer, but in an order that a resumed run repeats, and that can keep questions together."""
        dataset = _rows_of(self.train_dataset if train_dataset is None else train_dataset)
        if isinstance(dataset, Dataset) and self.args.share_prefix:
            return EpochSampler(by_prompt(prompt_groups(dataset)), len(dataset), self._order_seed)
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy == "group_by_length":
            return self._length_sampler(dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """As in Trainer, which would count the elements of `input_ids`, a column that rows do not have."""
        dataset = _rows_of(eval_dataset)
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy == "group_by_length":
            if (
                self.args.length_column_name not in dataset.column_names
            ):  # not a data set that the trainer was created with
                dataset = with_lengths(
                    dataset, self.processing_class, self.args.step_format, self.args.length_column_name
                )
            return self._length_sampler(dataset, self.args.eval_batch_size)
        return super()._get_eval_sampler(dataset)

    def _length_sampler(self, dataset: Dataset, batch_size: int) -> EpochSampler:
        lengths = dataset[self.args.length_column_name][:]
        return EpochSampler(by_length(lengths, batch_size), len(dataset), self._order_seed)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # ---- checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """As in Trainer, but with a full model's own loader: parameter names in a checkpoint may differ from those in memory."""
        model = self.model if model is None else model
        base = type(base_of(self.model)).__name__
        adapter = Path(resume_from_checkpoint, ADAPTER_CONFIG_NAME)
        if adapter.is_file():
            named = json.loads(adapter.read_text(encoding="utf-8")).get("auto_mapping") or {}
            trained_on = named.get("base_model_class", base)
            if trained_on != base:
                raise ValueError(
                    f"{resume_from_checkpoint} is an adapter of a {trained_on}, and this model is a {base}: name the base "
                    "it was trained on"
                )
        try:
            if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                saved = type(model).from_pretrained(
                    resume_from_checkpoint, config=model.config, dtype=model.dtype, use_safetensors=True
                )
                model.load_state_dict(saved.state_dict())
        except (KeyError, RuntimeError) as error:  # torch lists every tensor of another shape
            raise ValueError(
                f"{resume_from_checkpoint} does not fit this {base}: resume with the model, its size and the LoRA "
                f"settings that the checkpoint was trained with ({str(error).splitlines()[0]})"
            ) from error

    def _load_best_model(self) -> None:
        """As in Trainer, with the same loader."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in Trainer, but without the pickled arguments, which nothing here reads and which may hold a Hub token."""
        self._check_weights()
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self._hide_local_base(folder / ADAPTER_CONFIG_NAME)
            self.save_beside_weights(folder)

    def save_beside_weights(self, folder: Path) -> None:
        """Write the other files that a saved model needs."""

    def _hide_local_base(self, adapter_config: Path) -> None:
        """In an adapter for the Hub, name a base in a local folder without its path."""
        if self.hub_model_id is None or not adapter_config.is_file():
            return
        values = json.loads(adapter_config.read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
        if public_name(base) != base:
            logger.warning(f"the base is a local folder: to load this adapter, pass base_model ({Path(base).name})")
            write_json({**values, "base_model_name_or_path": public_name(base)}, adapter_config)

    # ---- the Hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a complete, loadable checkpoint; Trainer would include the pickled arguments, with the Hub token."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
            ignore_patterns=["*.pt", "*.pth", "*.bin", TRAINER_STATE_NAME],  # needed to resume, not to use the model
        )
        self.push_in_progress = PushInProgress([job])

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:  # transformers 5.21 passes the token only
        """Create the repository. If the Hub cannot be reached, training goes on and pushes nothing."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HTTPError) as error:
            logger.warning(f"the Hub cannot be reached ({error}): training goes on, and everything is written locally")
            self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            self.push_in_progress = None
            self.args.hub_strategy = HubStrategy.END

    def push_to_hub(self, *args, **kwargs) -> Any:
        """
        Publish model and card, as [`~transformers.Trainer.push_to_hub`] does. If the Hub cannot be reached, both are
        written locally, and a warning says how to push later.
        """
        try:
            return super().push_to_hub(*args, **kwargs)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HTTPError) as error:
            folder = self.args.output_dir
            logger.warning(
                f"the Hub cannot be reached ({error}): model and card are in {folder}; push them later with "
                f"`hf upload {self.hub_model_id} {folder} . --exclude 'checkpoint-*'`"
            )


def _rows_of(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, NumberedRows) else dataset
