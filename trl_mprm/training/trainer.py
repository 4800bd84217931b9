"""A thin `transformers.Trainer` that trains process reward models, for images and text."""

import functools
import json
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import ADAPTER_CONFIG_NAME, PushInProgress

from ..cards.model_card import benchmark_facts, write_card
from ..data.hub import public_name
from ..data.rows import IGNORE_INDEX
from ..evaluation.metrics import step_metrics
from ..files import write_json
from ..models.adapters import fill_peft_config, train_marker_in_place
from ..models.anatomy import base_of, decoder_name, freeze_vision_encoder, is_vision_language
from ..models.classifier import check_classifier
from ..models.distinct_images import encode_distinct_images, encoded_once
from ..models.loading import (
    add_marker,
    check_processing_class,
    keep_4bit_gradients_on_cpu,
    load_model,
    load_processing_class,
    shared_load_kwargs,
)
from ..models.reader import good_minus_bad, marker_logits
from ..models.shared_prefix import can_share_prefix, run_prefix
from ..prompting.tokens import ProcessingClass, special_tokens, tokenizer_of
from .card import describe_dataset, run_record
from .checks import (
    check_dataset,
    check_images,
    check_lengths,
    check_no_images,
    check_prompts,
    named_datasets,
)
from .collator import DataCollatorForProcessReward
from .config import ProcessRewardConfig
from .host import DecoderInputGradients, last_whole_checkpoint
from .loss import beta_binomial_losses, class_weighted, step_losses, step_targets
from .sampling import EpochSampler, NumberedRows, WithLength, by_length, by_prompt, prompt_groups, undecoded


logger = logging.getLogger(__name__)

# What a batch holds beside the features of the model.
NO_FEATURES = ("labels", "overlong", "row_index", "n_rows", "mc_total", "row_weights")


class ProcessRewardTrainer(Trainer):
    """
    Trainer for process reward models: one reward after every step of a solution.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or model object; any vision-language or causal language model.
        args ([`ProcessRewardConfig`], *optional*):
            Configuration; defaults to one with `output_dir` named after the model.
        data_collator (`Callable`, *optional*):
            Defaults to [`DataCollatorForProcessReward`].
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `prompt`, `completions`, `labels` and, with a vision-language model, `images`. Labels are Monte
            Carlo scores, booleans or 0/1; -100 ignores a step.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            The same for evaluation; logs the exact step mean of the loss and step metrics.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`], *optional*):
            Defaults to the processor or tokenizer of `model`.
        compute_metrics (`Callable`, *optional*):
            Predictions are the logits of P(step good) and label ids the labels, `(rows, most steps)`, padded with -100.
            Defaults to [`step_metrics`], with the hard label as truth.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantise the text decoder of a model given as a string. Needs `peft_config`.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Train an adapter. Where it names no target modules, the decoder's linear layers are taken; the marker's
            embedding row is trained with it.
        selection (`dict`, *optional*):
            What `selection.json` or `top_fraction(...).report` says of the training rows; quoted by the model card.
    """

    _tag_names = ["trl", "mprm", "process-reward-model"]
    # The loss below is divided by the labelled steps of the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: ProcessRewardConfig | None = None,
        data_collator: Callable[[list[dict]], dict] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ProcessingClass | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        selection: dict[str, Any] | None = None,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: rows with `prompt`, `completions` and `labels`")
        model_id = model if isinstance(model, str) else model.name_or_path
        if args is None:
            args = ProcessRewardConfig(f"{Path(model_id).name or 'model'}-PRM")
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_dataset(dataset, name, args.loss_type == "beta_binomial", args.source_weights is not None)
            check_images(dataset, name)
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch`, one process a GPU")
        init_kwargs = args.model_init_kwargs or {}
        # Trainer seeds too late for the weights that LoRA draws.
        set_seed(args.seed)
        if isinstance(model, str):
            if quantization_config is not None and peft_config is None:
                raise ValueError("quantised weights cannot be trained: give a `peft_config` with the quantisation")
            model = load_model(model, quantization_config, args.reward_head, **init_kwargs)
        elif quantization_config is not None:
            raise ValueError("`quantization_config` needs the model as a string; this one is loaded already")
        if processing_class is None:
            processor_kwargs = {**shared_load_kwargs(init_kwargs), **(args.processor_kwargs or {})}
            processing_class = load_processing_class(model_id, is_vision_language(model.config), **processor_kwargs)
        check_processing_class(model, processing_class)
        keep_4bit_gradients_on_cpu(model)  # a model object was not loaded by `load_model`
        self.step_format = args.step_format
        if args.reward_head == "classification":
            check_classifier(model)
        else:
            add_marker(model, processing_class, self.step_format)
        self.step_ids = self.step_format.ids(tokenizer_of(processing_class))
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_prompts(dataset, special_tokens(tokenizer_of(processing_class)), name)
            if not is_vision_language(model.config):
                check_no_images(dataset, name)
            if isinstance(dataset, IterableDataset):  # dispatching would cut a batch of pictures by rows
                args.accelerator_config.dispatch_batches = False
        if is_vision_language(model.config):
            if args.ddp_find_unused_parameters is None:  # rows without image leave the projector without gradient
                args.ddp_find_unused_parameters = True
            encode_distinct_images(base_of(model))
            if args.freeze_vision_encoder:
                freeze_vision_encoder(model)
        sharded = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"  # set by `accelerate launch`
        if args.share_prefix and not can_share_prefix(model):
            raise ValueError(f"share_prefix: {type(model).__name__} keeps more of its past than keys and values")
        if args.share_prefix and (sharded or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "share_prefix under FSDP or DeepSpeed ZeRO-3: a process calls the model once a question, and those with "
                "fewer questions would leave the others waiting for their weights; train with DDP, or without it"
            )
        if args.train_sampling_strategy == "group_by_length":
            self.count_tokens = WithLength(processing_class, self.step_format, args.length_column_name)
            train_dataset, eval_dataset = (
                _map(dataset, self._with_lengths) for dataset in (train_dataset, eval_dataset)
            )
            if args.max_length is not None and args.overlong == "error":
                for name, dataset in named_datasets(train_dataset, eval_dataset):
                    check_lengths(dataset, name, args.length_column_name, args.max_length)
        if peft_config is not None:
            peft_config = fill_peft_config(peft_config, model, self.step_ids.marker[0], args.reward_head)
            model = get_peft_model(model, peft_config, revision=init_kwargs.get("revision"))
            train_marker_in_place(model)
            # Where the marker made the vocabulary longer, PEFT would save the whole embedding, frozen as it is.
            model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
        if args.label_names is None:
            args.label_names = ["labels"]
        self.selection = selection
        self.card_names: dict[str, Any] = {}
        self.benchmarks: dict[str, dict] = {}
        self.compute_other_metrics = compute_metrics
        # What FSDP shards: layers of the decoder. A vision encoder does not run where a process has no image.
        if sharded:  # what the launcher's file names wins
            layer = type(base_of(model).get_decoder().layers[0]).__name__
            os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", layer)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or DataCollatorForProcessReward(
                processing_class,
                self.step_format,
                max_length=args.max_length,
                overlong=args.overlong,
                share_prefix=args.share_prefix,
                counts=args.loss_type == "beta_binomial",
                source_weights=args.source_weights,
            ),
            train_dataset=_map(train_dataset, undecoded),
            eval_dataset=_map(eval_dataset, undecoded),
            processing_class=processing_class,
            compute_metrics=self.compute_step_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.gradient_checkpointing and args.freeze_vision_encoder and is_vision_language(model.config):
            self.add_callback(DecoderInputGradients())
        if args.share_prefix:  # DDP wants one call of the model a batch, whatever the number of groups
            forward = self.model.forward
            self.model.forward = lambda *args, groups=None, **kwargs: (
                forward(*args, **kwargs) if groups is None else self._group_logits(groups)
            )
        # Makes Trainer count the labelled steps of the accumulated batch over all processes.
        self.model_accepts_loss_kwargs = True
        self.model.add_model_tags(self._tag_names)
        self.overlong, self.eval_overlong = torch.zeros(2, 3, dtype=torch.long)
        if self.is_world_process_zero():
            print(describe_model(self.model, args.optim))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in [`~transformers.Trainer`]; with `True`, from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if "overlong" in inputs:
            self.overlong = self.overlong.to(inputs["overlong"].device) + inputs["overlong"]
        logits, labels, counts = self._marker_logits(model, inputs)
        loss = self._step_losses(logits, labels, counts, inputs).sum()
        if num_items_in_batch is None:
            loss = loss / max(1, len(labels))
        else:
            # Gradients are averaged over processes, the count is their sum.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1) * processes
        return (loss, good_minus_bad(logits)) if return_outputs else loss

    def _marker_logits(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `(steps, tokens read)` and labels `(steps,)` of the labelled steps, and how many a row has `(rows,)`."""
        measured = inputs["labels"] != IGNORE_INDEX
        if "groups" in inputs:
            if not self.args.share_prefix:
                raise ValueError("the data collator shares prefixes and the trainer does not: set share_prefix=True")
            logits = model(groups=inputs)
        else:
            logits = self._forward(model, inputs, measured)
        return logits, inputs["labels"][measured], measured.sum(1)

    def _group_logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        logits = []
        with encoded_once(base_of(self.model)) if is_vision_language(self.model.config) else nullcontext():
            if "plain" in inputs:
                logits.append(self._forward(self.model, inputs["plain"], inputs["plain"]["labels"] != IGNORE_INDEX))
            for group in inputs["groups"]:
                continuation = {
                    "input_ids": group["input_ids"],
                    "past_key_values": run_prefix(self.model, group["prefix"]),
                }
                logits.append(self._forward(self.model, continuation, group["markers"]))
        return torch.cat(logits)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """As Trainer does, but a full model by its own loader: some keep other names in a checkpoint than in memory."""
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
                saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, use_safetensors=True)
                model.load_state_dict(saved.state_dict())
        except (KeyError, RuntimeError) as error:  # torch lists every tensor of another shape
            raise ValueError(
                f"{resume_from_checkpoint} does not fit this {base}: resume with the model, its size and the LoRA "
                f"settings that the checkpoint was trained with ({str(error).splitlines()[0]})"
            ) from error

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _forward(self, model: torch.nn.Module, inputs: dict[str, Any], markers: torch.Tensor) -> torch.Tensor:
        features = {name: value for name, value in inputs.items() if name not in NO_FEATURES}
        if self.args.reward_head == "classification":
            return model(**features).logits[markers][:, [self.step_ids.good, self.step_ids.bad]].float()
        token_ids = [self.step_ids.good, self.step_ids.bad, *self.step_ids.marker]
        return marker_logits(model, features, markers, token_ids)

    def _step_losses(
        self, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, inputs: dict[str, Any]
    ) -> torch.Tensor:
        targets = step_targets(labels, self.args.loss_type, self.args.hard_threshold)
        if self.args.loss_type == "beta_binomial":
            totals = inputs["mc_total"].repeat_interleave(counts)
            penalty = self.args.concentration_penalty
            losses = beta_binomial_losses(good_minus_bad(logits), logits[:, 2], labels, totals, penalty)
        else:
            losses = step_losses(good_minus_bad(logits), targets)
        if self.args.class_weights is not None:
            losses = class_weighted(losses, targets, *self.args.class_weights)
        if "row_weights" in inputs:
            losses = losses * inputs["row_weights"].repeat_interleave(counts)
        return losses

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """
        Logits and losses, and labels of the steps, padded with -100 to `(rows, most steps)`.

        No loss is returned: Trainer would average it over batches. [`compute_step_metrics`] has the exact step mean.
        """
        inputs = self._prepare_inputs(inputs)
        if "overlong" in inputs:
            self.eval_overlong = self.eval_overlong.to(inputs["overlong"].device) + inputs["overlong"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, labels, counts = self._marker_logits(model, inputs)
            losses = self._step_losses(logits, labels, counts, inputs)
        filled = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        padded = [torch.full(filled.shape, float(IGNORE_INDEX), device=counts.device) for _ in range(3)]
        for target, values in zip(padded, (good_minus_bad(logits), losses, labels.float()), strict=True):
            target[filled] = values
        if "row_index" in inputs:  # back to the rows that came in, in their order; what was dropped stays -100
            for number, values in enumerate(padded):
                padded[number] = values.new_full((int(inputs["n_rows"]), values.shape[1]), IGNORE_INDEX)
                padded[number][inputs["row_index"]] = values
        return None, (padded[0], padded[1]), padded[2]

    def compute_step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Loss and step metrics (threshold 0.5) of an evaluation; one solution a row, the hard label as truth. And what
        was too long for it.
        """
        (logits, losses), labels = prediction.predictions, prediction.label_ids
        measured = labels != IGNORE_INDEX
        dropped = self._counted(self.eval_overlong)
        self.eval_overlong = torch.zeros_like(self.eval_overlong)
        if not measured.any():
            raise ValueError(
                f"evaluation: no labelled step of {len(labels)} rows is left, they are longer than max_length "
                f"{self.args.max_length}: raise max_length, or evaluate on shorter rows"
            )
        loss = float(losses[measured].astype(np.float64).mean())
        if self.compute_other_metrics is not None:
            return {"loss": loss, **dropped, **self.compute_other_metrics(EvalPrediction(logits, labels))}
        truth = np.where(labels > self.args.hard_threshold, 1, -1)
        scores = torch.from_numpy(logits).double().sigmoid().numpy()
        metrics = step_metrics(
            [row[mask].tolist() for row, mask in zip(truth, measured, strict=True)],
            [row[mask].tolist() for row, mask in zip(scores, measured, strict=True)],
            threshold=0.5,
            n_resamples=0,
        )
        reported = ("macro_f1_pooled", "auc", "first_error_accuracy")
        return {"loss": loss, **dropped, **{name: metrics[name] for name in reported if metrics[name] is not None}}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not any(name.startswith("eval_") for name in logs):  # an evaluation has its own
            logs = {**logs, **self._counted(self.overlong)}
        super().log(logs, *args, **kwargs)

    def _counted(self, overlong: torch.Tensor) -> dict[str, int]:
        """Rows, steps and labelled steps that all processes dropped; empty where no row can be too long."""
        if self.args.max_length is None:
            return {}
        counts = self.accelerator.gather(overlong.to(self.args.device)).view(-1, 3).sum(0).tolist()
        return dict(zip(("overlong_rows", "overlong_steps", "overlong_labelled_steps"), counts, strict=True))

    def _with_lengths(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The same rows with a column of their lengths."""
        if isinstance(dataset, IterableDataset):
            return dataset
        return undecoded(dataset).map(self.count_tokens, with_indices=True, desc="Counting tokens")

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        """As Trainer does, of rows that know their number and whose pictures the collator opens."""
        if isinstance(dataset, Dataset):
            dataset = NumberedRows(dataset)
        elif isinstance(dataset, IterableDataset):
            dataset = undecoded(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = _rows_of(self.train_dataset if train_dataset is None else train_dataset)
        if isinstance(dataset, Dataset) and self.args.share_prefix:
            return EpochSampler(by_prompt(prompt_groups(dataset)), len(dataset), self._order_seed)
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy == "group_by_length":
            return self._length_sampler(dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        dataset = _rows_of(eval_dataset)
        if isinstance(dataset, Dataset) and self.args.train_sampling_strategy == "group_by_length":
            counted = self.args.length_column_name in dataset.column_names  # those that the trainer was made with
            return self._length_sampler(dataset if counted else self._with_lengths(dataset), self.args.eval_batch_size)
        return super()._get_eval_sampler(dataset)

    def _length_sampler(self, dataset: Dataset, batch_size: int) -> EpochSampler:
        lengths = dataset[self.args.length_column_name][:]
        return EpochSampler(by_length(lengths, batch_size), len(dataset), self._order_seed)

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            # A pickle that nothing here reads, with the Hub token in it if one was given.
            Path(output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self.step_format.save(output_dir)
            self._hide_local_base(Path(output_dir, ADAPTER_CONFIG_NAME))
            self._write_card(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint as it is, complete and loadable; Trainer would pickle the arguments, with the Hub token."""
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
            ignore_patterns=["*.pt", "*.pth", "*.bin", TRAINER_STATE_NAME],  # to resume, not to use
        )
        self.push_in_progress = PushInProgress([job])

    def _hide_local_base(self, adapter_config: Path) -> None:
        """In an adapter that goes to the Hub, a base in a local folder is named without its path."""
        if self.hub_model_id is None or not adapter_config.is_file():
            return
        values = json.loads(adapter_config.read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
        if public_name(base) != base:
            logger.warning(
                f"the base is a local folder: who loads the adapter must pass base_model ({Path(base).name})"
            )
            write_json({**values, "base_model_name_or_path": public_name(base)}, adapter_config)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        dataset_revision: str | None = None,
        results: dict[str, Any] | None = None,
        benchmark: str | None = None,
    ) -> None:
        """
        Write the model card into `output_dir`, from the run itself. What is named once stays for later cards of this
        run.

        Args:
            model_name (`str`, *optional*):
                Defaults to the name of `hub_model_id`, or of `output_dir`.
            dataset_name (`str`, *optional*):
                Hub id of the data set, or its folder.
            tags (`str` or `list[str]`, *optional*):
                Tags beside `trl`, `mprm` and `process-reward-model`.
            license (`str`, *optional*):
                Licence of the weights, as a Hub identifier. Left out where unknown: it follows the base model's.
            dataset_revision (`str`, *optional*):
                Commit of the data set on the Hub.
            results (`dict`, *optional*):
                What [`step_metrics`] returned for this model.
            benchmark (`str`, *optional*):
                Name of the benchmark that `results` were measured on.
        """
        named = {"model_name": model_name, "dataset_name": dataset_name, "license": license,
                 "dataset_revision": dataset_revision, "tags": [tags] if isinstance(tags, str) else tags}  # fmt: skip
        self.card_names |= {key: value for key, value in named.items() if value is not None}
        if results is not None:
            self.benchmarks[benchmark or "benchmark"] = benchmark_facts(results)
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str) -> None:
        write_card(folder, run_record(self, describe_dataset(self.train_dataset), self.card_names))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository. Where the Hub cannot be reached, training goes on and pushes nothing."""
        try:
            super().init_hf_repo(token, private)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, HTTPError) as error:
            logger.warning(f"the Hub cannot be reached ({error}): training goes on, and everything is written locally")
            self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            self.push_in_progress = None
            self.args.hub_strategy = HubStrategy.END

    def push_to_hub(self, *args, **kwargs) -> Any:
        """
        Publish model and card, as [`~transformers.Trainer.push_to_hub`] does. Where the Hub cannot be reached, both are
        written locally, and a warning tells how to push later.
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


def _map(dataset: Any, function: Callable) -> Any:
    """What a function makes of a data set, or of each of a `dict` of them; None stays."""
    if isinstance(dataset, dict):
        return {name: function(value) for name, value in dataset.items()}
    return None if dataset is None else function(dataset)


def describe_model(model: PreTrainedModel | PeftModel, optim: str) -> str:
    """
    What is trained, what is in 4 bit, and the memory for weights, gradients and optimizer states, in three lines.
    """
    stored = trained = four_bit = weights = gradients = states = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        size = parameter.numel() * parameter.element_size()
        count = size * 2 if packed else parameter.numel()  # whatever type the two in a byte are stored as
        stored += count
        weights += size
        four_bit += packed * count
        if parameter.requires_grad:
            trained += count
            gradients += size
            states += 2 * (count if "8bit" in optim else size)
    total = weights + gradients + states
    quantised = f"{four_bit:,}, the linear layers of {decoder_name(base_of(model))}" if four_bit else "none"
    return (
        f"trained parameters: {trained:,} of {stored:,} ({trained / stored:.2%})\n"
        f"in 4 bit: {quantised}\n"
        f"memory: {total / 1e9:.2f} GB (weights {weights / 1e9:.2f}, gradients {gradients / 1e9:.2f}, "
        f"optimizer states {states / 1e9:.2f}), activations not counted"
    )
