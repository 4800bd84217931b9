"""Train process reward models on images and text with `transformers.Trainer`: set-up, loss, metrics, log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, EvalPrediction, PreTrainedModel, TrainerCallback

from ..cards.model_card import benchmark_facts, write_card
from ..data.rows import IGNORE_INDEX
from ..evaluation.metrics import step_metrics
from ..models.anatomy import is_vision_language
from ..models.reader import StepReader, good_minus_bad
from ..prompting.step_format import forbidden_tokens
from ..prompting.tokens import ProcessingClass, tokenizer_of
from .card import describe_dataset, run_record
from .checks import check_dataset, check_images, check_lengths, check_no_images, check_prompts, named_datasets
from .collator import DataCollatorForProcessReward
from .config import ProcessRewardConfig
from .from_trl import compute_accuracy, last_step_only, tokenize_row
from .host import HostedTrainer, check_sharing, host_args, one_forward_per_batch
from .loss import weighted_losses
from .preparation import adapt_model, describe_model, prepare_model, with_head
from .sampling import undecoded, unformatted, with_lengths


class ProcessRewardTrainer(HostedTrainer):
    """
    Trainer for process reward models, which give one reward after every step of a solution.

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
            Such rows for evaluation, which logs step metrics and the exact mean of the loss over all steps.
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
            Train an adapter. If it names no target modules, the decoder's linear layers are adapted; the marker's
            embedding row is trained with it.
        selection (`dict`, *optional*):
            Content of `selection.json` or `top_fraction(...).report` for the training rows; the model card quotes it.
    """

    _tag_names = ["trl", "prm", "mprm", "process-reward-model"]

    tokenize_row = staticmethod(tokenize_row)

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
        args = with_head(_checked(args, model), model)
        train_dataset, eval_dataset = unformatted(train_dataset), _map(eval_dataset, unformatted)
        if args.train_on_last_step_only:
            train_dataset = last_step_only(train_dataset, args.dataset_num_proc)
        datasets = named_datasets(train_dataset, eval_dataset)
        for name, dataset in datasets:
            check_dataset(dataset, name, args.loss_type, args.source_weights is not None)
            check_images(dataset, name)
        if isinstance(model, str) and quantization_config is not None and peft_config is None:
            raise ValueError("quantised weights cannot be trained: give a `peft_config` with the quantisation")
        model, processing_class = prepare_model(model, args, processing_class, quantization_config)
        tokenizer = tokenizer_of(processing_class)
        self.step_format = args.step_format
        self.reader = StepReader(self.step_format, tokenizer)
        self.step_ids = self.reader.step_ids
        for name, dataset in datasets:
            check_prompts(dataset, forbidden_tokens(tokenizer, self.step_format), name)
            if not is_vision_language(model.config):
                check_no_images(dataset, name)
        check_sharing(model, args)
        if args.train_sampling_strategy == "group_by_length":
            train_dataset, eval_dataset = _counted(train_dataset, eval_dataset, processing_class, args)
        if peft_config is not None:
            model = adapt_model(model, args, peft_config, processing_class)
        self.selection = selection
        self.card_names: dict[str, Any] = {}
        self.benchmarks: dict[str, dict] = {}
        self.compute_other_metrics = compute_metrics
        self.dataset_facts = describe_dataset(train_dataset)
        super().__init__(
            model=model,
            args=host_args(args, model, any(isinstance(dataset, IterableDataset) for _, dataset in datasets)),
            data_collator=data_collator
            or DataCollatorForProcessReward(
                processing_class,
                self.step_format,
                max_length=args.max_length,
                max_completion_length=args.max_completion_length,
                overlong=args.overlong,
                share_prefix=args.share_prefix,
                loss_type=args.loss_type,
                source_weights=args.source_weights,
            ),
            train_dataset=_map(train_dataset, undecoded),
            eval_dataset=_map(eval_dataset, undecoded),
            processing_class=processing_class,
            compute_metrics=self.compute_step_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.share_prefix:
            one_forward_per_batch(self.model, self.reader)
        self.model.add_model_tags(self._tag_names)
        self.overlong, self.eval_overlong = torch.zeros(2, 3, dtype=torch.long)
        self.steps_read = 0
        if self.is_world_process_zero():
            print(describe_model(self.model, args.optim))

    def read(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Read the labelled steps of a batch.

        Returns:
            `tuple`: logits `(steps, tokens read)`, losses `(steps,)`, and where the labels are, a mask of their shape.
        """
        labels, extra = batch["labels"], batch.get("extra", {})
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "extra")}
        labelled = labels != IGNORE_INDEX
        if "groups" not in inputs:
            logits = self.reader.read(model, inputs | {"markers": labelled})
        elif self.args.share_prefix:
            logits = model(groups=inputs)  # see [`~host.one_forward_per_batch`]
        else:
            raise ValueError("the data collator shares prefixes and the trainer does not: set share_prefix=True")
        return logits, weighted_losses(logits, labels[labelled], extra, self.args), labelled

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self.overlong = _added(self.overlong, inputs)
        logits, losses, _ = self.read(model, inputs)
        self.steps_read += len(losses)
        if num_items_in_batch is None:
            loss = losses.sum() / max(1, len(losses))
        else:
            # Gradients are averaged over processes, but the count is summed over them.
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            steps = torch.as_tensor(num_items_in_batch, device=losses.device).clamp(min=1)
            loss = losses.sum() / steps * processes
        return (loss, good_minus_bad(logits)) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """
        Logits and losses, and labels of the steps, padded with -100 to `(rows, most steps)`.

        No loss is returned: Trainer would average it over batches. [`compute_step_metrics`] has the exact step mean.
        """
        inputs = self._prepare_inputs(inputs)
        self.eval_overlong = _added(self.eval_overlong, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits, losses, labelled = self.read(model, inputs)
        counts, labels = labelled.sum(1), inputs["labels"][labelled]
        filled = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        padded = [torch.full(filled.shape, float(IGNORE_INDEX), device=counts.device) for _ in range(3)]
        for target, values in zip(padded, (good_minus_bad(logits), losses, labels.float()), strict=True):
            target[filled] = values
        extra = inputs.get("extra", {})
        if "row_index" in extra:  # restore the order of the input rows; dropped rows stay -100
            for number, values in enumerate(padded):
                padded[number] = values.new_full((int(extra["n_rows"]), values.shape[1]), IGNORE_INDEX)
                padded[number][extra["row_index"]] = values
        return None, (padded[0], padded[1]), padded[2]

    def compute_step_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Loss and step metrics (threshold 0.5) of an evaluation, with one solution per row and the hard label as truth,
        and the counts of what was too long.
        """
        (logits, losses), labels = prediction.predictions, prediction.label_ids
        measured = labels != IGNORE_INDEX
        dropped = self._gathered(self.eval_overlong)
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
        dropped |= compute_accuracy((np.where(measured, logits, 0), np.where(measured, truth > 0, IGNORE_INDEX)))
        return {"loss": loss, **dropped, **{name: metrics[name] for name in reported if metrics[name] is not None}}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not any(name.startswith("eval_") for name in logs):  # an evaluation logs its own counts
            logs = {**logs, **self._gathered(self.overlong)}
            if "train_loss" in logs or (self.state.epoch or 0) >= 1:  # every row has been seen
                self._check_taught(logs)
        super().log(logs, *args, **kwargs)

    def _check_taught(self, dropped: dict[str, float]) -> None:
        """Raise `ValueError` if every row was too long, so that nothing was learnt."""
        if (
            dropped.get("overlong_rows")
            and not self.accelerator.gather(torch.tensor(self.steps_read, device=self.args.device)).any()
        ):
            raise ValueError(
                f"no labelled step of {dropped['overlong_rows']} rows is left to train on, they are longer than "
                f"max_length {self.args.max_length}: raise max_length"
            )

    def _gathered(self, overlong: torch.Tensor) -> dict[str, int]:
        """Counts of rows, steps and labelled steps that all processes dropped; empty if no row can be too long."""
        if self.args.max_length is None and self.args.max_completion_length is None:
            return {}
        counts = self.accelerator.gather(overlong.to(self.args.device)).view(-1, 3).sum(0).tolist()
        return dict(zip(("overlong_rows", "overlong_steps", "overlong_labelled_steps"), counts, strict=True))

    def save_beside_weights(self, folder: Path) -> None:
        self.step_format.save(folder)
        self.write_card(folder)

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
        Write the model card of this run into `output_dir`. Arguments that are given are kept for later cards of the run.

        Args:
            model_name (`str`, *optional*):
                Defaults to the name of `hub_model_id`, or of `output_dir`.
            dataset_name (`str`, *optional*):
                Hub id of the data set, or its folder.
            tags (`str` or `list[str]`, *optional*):
                Tags in addition to `trl`, `prm`, `mprm` and `process-reward-model`.
            license (`str`, *optional*):
                Licence of the weights, as a Hub identifier. Left out if unknown, since it follows the base model's.
            dataset_revision (`str`, *optional*):
                Commit of the data set on the Hub.
            results (`dict`, *optional*):
                Result of [`step_metrics`] for this model.
            benchmark (`str`, *optional*):
                Name of the benchmark that `results` were measured on.
        """
        named = {"model_name": model_name, "dataset_name": dataset_name, "license": license,
                 "dataset_revision": dataset_revision, "tags": [tags] if isinstance(tags, str) else tags}  # fmt: skip
        self.card_names |= {key: value for key, value in named.items() if value is not None}
        if results is not None:
            self.benchmarks[benchmark or "benchmark"] = benchmark_facts(results)
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    def write_card(self, folder: str | Path) -> None:
        write_card(folder, run_record(self, self.dataset_facts, self.card_names))


def _checked(args: ProcessRewardConfig | None, model: str | PreTrainedModel | PeftModel) -> ProcessRewardConfig:
    if args is None:
        model_id = model if isinstance(model, str) else model.name_or_path
        args = ProcessRewardConfig(f"{Path(model_id).name or 'model'}-PRM")
    if not isinstance(args, ProcessRewardConfig):
        raise ValueError(
            f"args is a {type(args).__name__}, expected a ProcessRewardConfig: it takes the same arguments"
        )
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs in one process: start with `accelerate launch`, one process per GPU")
    return args


def _added(overlong: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Add the counts of what was too long in one more batch."""
    new = inputs.get("extra", {}).get("overlong")
    return overlong if new is None else overlong.to(new.device) + new


def _map(dataset: Any, function: Callable, *args: Any) -> Any:
    """Apply a function to a data set, or to each in a `dict` of them; None stays None."""
    if isinstance(dataset, dict):
        return {name: function(value, *args) for name, value in dataset.items()}
    return None if dataset is None else function(dataset, *args)


def _counted(
    train_dataset: Any, eval_dataset: Any, processing_class: ProcessingClass, args: ProcessRewardConfig
) -> tuple:
    """Add a column of row lengths to both data sets; raise if a row is too long and `overlong` is `"error"`."""
    how = processing_class, args.step_format, args.length_column_name
    train_dataset, eval_dataset = (_map(rows, with_lengths, *how) for rows in (train_dataset, eval_dataset))
    if args.max_length is not None and args.overlong == "error":
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_lengths(dataset, name, args.length_column_name, args.max_length)
    return train_dataset, eval_dataset
