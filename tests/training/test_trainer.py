"""Training on real components: tiny random models with their real processors, peft, bitsandbytes."""

import json
import math
import subprocess
import sys
import zipfile

import bitsandbytes
import pytest
import torch
from datasets import Dataset, Image, List
from helpers import ARCHITECTURES, config, dataset, flat, make_rows, nf4, picture, trainer_scores
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from trl_mprm import ProcessRewardModel, ProcessRewardTrainer
from trl_mprm.models.anatomy import modules_beside_decoder
from trl_mprm.models.loading import load_model, load_processing_class
from trl_mprm.prompting.step_format import StepFormat
from trl_mprm.training.collator import DataCollatorForProcessReward
from trl_mprm.training.preparation import describe_model


def losses(trainer: ProcessRewardTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_adapter_scores_the_same_in_a_new_process(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"],
        args=config(tmp_path),
        train_dataset=dataset("qwen2"),
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    trainer.save_model()
    code = (
        "import json, sys; from trl_mprm import ProcessRewardModel\n"
        "prm = ProcessRewardModel.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(prm.score([], 'How many?', ['one', 'two tiles'])))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    row = {"prompt": "How many?", "completions": ["one", "two tiles"]}
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(trainer_scores(trainer, [row])[0], abs=1e-6)


def test_quantises_the_decoder_only(tiny_folders):
    for architecture in ARCHITECTURES:
        model = load_model(tiny_folders[architecture], nf4())
        quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        beside = tuple(modules_beside_decoder(model))
        assert quantised == {name for name in linears if not name.startswith(beside)}
        assert len(quantised) == 14  # two layers of seven
        assert beside[-1] == "lm_head"
        assert all(not m.support_avx512bf16_for_cpu for m in model.modules() if type(m).__name__ == "Linear4bit")


def test_4bit_gradients_survive_an_evaluation(tiny_folders, tmp_path):
    """bitsandbytes >= 0.49 repacks weights on eval() on some CPUs; gradients must be the same before and after."""
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"],
        args=config(tmp_path),
        train_dataset=dataset("qwen2"),
        eval_dataset=dataset("qwen2"),
        quantization_config=nf4(),
        peft_config=LoraConfig(r=4, init_lora_weights=False),
    )
    batch = DataCollatorForProcessReward(trainer.processing_class)(make_rows(images=False))

    def gradients() -> torch.Tensor:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])

    first = gradients()
    trainer.evaluate()
    assert torch.equal(first, gradients())


def test_a_4bit_model_object_is_guarded_too(tiny_folders, tmp_path):
    """transformers loaded it, not `load_model`; and what is stored in bfloat16 is counted as what it holds."""
    beside = modules_beside_decoder(load_model(tiny_folders["qwen2_5_vl"]))
    printed = []
    for storage in (torch.uint8, torch.bfloat16):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_storage=storage, llm_int8_skip_modules=beside
        )
        model = AutoModelForImageTextToText.from_pretrained(
            tiny_folders["qwen2_5_vl"], quantization_config=quantization
        )
        trainer = ProcessRewardTrainer(
            model=model, args=config(tmp_path), train_dataset=dataset("qwen2_5_vl"), peft_config=LoraConfig(r=2)
        )
        layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        assert [layer.support_avx512bf16_for_cpu for layer in layers] == [False] * 14
        printed.append(describe_model(trainer.model, "adamw_torch"))
    # Two layers of four attention matrices (two of them half as wide: two key-value heads of four) and three of the MLP.
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert f"in 4 bit: {linears:,}, the linear layers of model.language_model" in printed[0]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lm_head_sees_the_labelled_markers_only(architecture, tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders[architecture], args=config(tmp_path), train_dataset=dataset(architecture)
    )
    rows = make_rows(images=architecture != "qwen2")
    rows[3]["labels"][1] = -100
    batch = trainer.data_collator(rows)
    seen = []
    hook = trainer.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:-1].numel())
    )
    loss = trainer.compute_loss(trainer.model, dict(batch))
    hook.remove()
    n_labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert seen == [n_labelled]

    # The plain path: all logits, softmax over the two reward tokens at the marker itself, mean over labelled steps.
    labels = batch.pop("labels")
    logits = trainer.model(**batch).logits[:, :, [trainer.step_ids.good, trainer.step_ids.bad]]
    terms = []
    for row in range(len(rows)):
        for position in range(labels.shape[1]):
            label = labels[row, position].item()
            if label != -100:
                assert [batch["input_ids"][row, position]] == trainer.step_ids.marker
                terms.append(-logits[row, position].log_softmax(-1)[0 if label > 0 else 1])
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", ["hard", "soft"])
def test_step_mean_is_exact_under_accumulation(loss_type, tiny_folders, tmp_path):
    """One update from 8 rows at once equals one from 8 rows, two at a time, though rows have one to four steps."""
    weights = []
    for batch_size in (8, 2):
        trainer = ProcessRewardTrainer(
            model=tiny_folders["qwen2_5_vl"],
            args=config(
                tmp_path / str(batch_size),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=8 // batch_size,
                loss_type=loss_type,
                optim="sgd",
            ),
            train_dataset=dataset("qwen2_5_vl"),
        )
        trainer.train()
        assert trainer.state.global_step == 1
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


def test_soft_labels_reach_the_loss_as_floats(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"], args=config(tmp_path, loss_type="soft"), train_dataset=dataset("qwen2")
    )
    rows = make_rows(images=False)
    batch = trainer.data_collator(rows)
    assert batch["labels"].dtype == torch.float32
    scores = flat(trainer_scores(trainer, rows))
    labels = [label for row in rows for label in row["labels"]]
    trainer.model.eval()
    expected = -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for y, p in zip(labels, scores, strict=True))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected / len(labels), abs=1e-5)


def test_evaluates_during_training(tiny_folders, tmp_path):
    """Step metrics and the exact step mean of the loss, whatever the batch size; dict datasets; best checkpoint."""
    results = []
    for batch_size in (1, 3):
        trainer = ProcessRewardTrainer(
            model=tiny_folders["qwen2_5_vl"],
            args=config(
                tmp_path / str(batch_size),
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="steps",
                save_steps=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_a_loss",
                per_device_eval_batch_size=batch_size,
            ),
            train_dataset=dataset("qwen2_5_vl"),
            eval_dataset={"a": dataset("qwen2_5_vl", 7), "b": dataset("qwen2_5_vl", 4)},
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry]
        assert len(logged) == 2 and {"eval_a_auc", "eval_a_macro_f1_pooled"} <= set(logged[0])
        assert trainer.state.best_metric == min(entry["eval_a_loss"] for entry in logged)
        results.append(logged)
    rows = make_rows(images=True, n=7)
    trainer.model.eval()
    exact = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
    assert exact == pytest.approx(min(entry["eval_a_loss"] for entry in results[1]), abs=1e-5)
    for one, three in zip(*results, strict=True):
        assert one["eval_a_loss"] == pytest.approx(three["eval_a_loss"], abs=1e-5)


def test_streams_and_old_trl_rows(tiny_folders, tmp_path):
    """Boolean labels, no other columns: the rows of TRL's PRMTrainer; also as a stream."""
    rows = [
        {"prompt": "2+2?", "completions": ["2+2", "is 4"], "labels": [True, True]},
        {"prompt": "2+3?", "completions": ["is 4"], "labels": [False]},
    ]
    trained = []
    for data in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        args = config(tmp_path, max_steps=3, seed=1, per_device_train_batch_size=2)
        trainer = ProcessRewardTrainer(model=tiny_folders["qwen2"], args=args, train_dataset=data)
        trainer.train()
        trained.append(losses(trainer))
    assert trained[0] == pytest.approx(trained[1], abs=1e-6)


BAD = [
    ({"labels": [0.5]}, r"rollout_id|row a:0: 1 labels for 2 steps, expected one label per step"),
    ({"labels": [0.5, 1.5]}, r"row a:0: label of step 1 is 1.5, expected a number in \[0, 1\]"),
    ({"labels": [float("nan"), 0.5]}, r"row a:0: label of step 0 is nan"),
    ({"labels": [-100.0, -100.0]}, r"row a:0: every label is -100"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_rows_stop_before_training(change, message, tiny_folders, tmp_path):
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [0.0, 1.0], "rollout_id": "a:0"}
    good = {**row, "rollout_id": "a:1"}
    with pytest.raises(ValueError, match=message):
        ProcessRewardTrainer(
            model=tiny_folders["qwen2"],
            args=config(tmp_path),
            train_dataset=Dataset.from_list([good, {**row, **change}]),
        )


def test_bad_use_says_what_to_do(tiny_folders, tmp_path):
    data = dataset("qwen2")
    cases = [
        ({"train_dataset": None}, "`train_dataset` is required"),
        ({"train_dataset": data.remove_columns("labels")}, "has no column labels"),
        ({"train_dataset": data.select([])}, "has no rows"),
        ({"args": config(tmp_path, reward_tokens=["Correct", "Wrong"])}, "reward token 'Correct' is 7 tokens"),
        ({"args": config(tmp_path, reward_tokens=["Yes", "Yes"])}, "expected two different tokens"),
        ({"quantization_config": nf4()}, "give a `peft_config`"),
        ({"train_dataset": data.remove_columns("images").add_column("image", ["a.png"] * 8)}, "has a column `image`"),
        ({"train_dataset": data.map(lambda row: {"prompt": "q<|im_end|>"})}, r"row a:0 \(8 rows in all\): the prompt"),
        (
            {"train_dataset": data.map(lambda row: {"completions": [" "] * len(row["labels"])})},
            "row a:0: step 0 is ' '",
        ),
    ]
    for change, message in cases:
        kwargs = {"model": tiny_folders["qwen2"], "args": config(tmp_path), "train_dataset": data, **change}
        with pytest.raises(ValueError, match=message):
            ProcessRewardTrainer(**kwargs)
    for change, message in [
        ({"loss_type": "mse"}, "loss_type is 'mse', expected one of hard, soft"),
        ({"reward_tokens": ["Yes"]}, "expected two: for a good step, for a bad step"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy is 'checkpoint', expected 'end' or 'every_save'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **change)
    with pytest.raises(ValueError, match="train_dataset, row a:0: 1 images came with a text-only model"):
        ProcessRewardTrainer(model=tiny_folders["qwen2"], args=config(tmp_path), train_dataset=dataset("qwen2_5_vl"))


@pytest.mark.parametrize(
    ("architecture", "processor_of", "loader", "message"),
    [
        ("qwen2", "qwen2_5_vl", AutoProcessor, "Qwen2ForCausalLM reads text only.*give the model's tokenizer"),
        (
            "qwen2_5_vl",
            "qwen2_5_vl",
            AutoTokenizer,
            "reads images, and processing_class is a tokenizer.*AutoProcessor",
        ),
        ("qwen2_5_vl", "internvl", AutoProcessor, "token 261, which this InternVLProcessor does not write"),
    ],
)
def test_the_processor_of_another_model(architecture, processor_of, loader, message, tiny_folders, tmp_path):
    """Rows with images trained without a word, or without their images."""
    with pytest.raises(ValueError, match=message):
        ProcessRewardTrainer(
            model=tiny_folders[architecture],
            args=config(tmp_path),
            train_dataset=dataset("qwen2_5_vl"),
            processing_class=loader.from_pretrained(tiny_folders[processor_of]),
        )


def row_40(**change) -> list[dict]:
    """Forty good rows without an id, and one that is not."""
    row = {"prompt": "q", "completions": ["a", "b"], "labels": [0.0, 1.0]}
    return [row] * 40 + [{**row, **change}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "row 40: `labels` is None, expected a list of numbers"),
        ({"completions": None}, "row 40: `completions` is None, expected a list of steps"),
        ({"completions": [], "labels": []}, "row 40: `completions` is empty"),
        ({"completions": ["a", None]}, "row 40: step 1 is None, expected text"),
        ({"prompt": None}, "row 40: `prompt` is None, expected the question"),
    ],
)
def test_a_malformed_row_is_named_by_its_number(change, message, tiny_folders, tmp_path):
    data = Dataset.from_list(row_40(**change))
    with pytest.raises(ValueError, match="train_dataset, " + message):
        ProcessRewardTrainer(model=tiny_folders["qwen2"], args=config(tmp_path), train_dataset=data)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("labels", ["0.5", "1"], "row 0: label of step 0 is '0.5', expected a number"),
        ("labels", 1.0, "row 0: `labels` is 1.0, expected a list of numbers, one per step"),
        ("completions", "a. b.", "row 0: `completions` is 'a. b.', expected a list of steps"),
        ("prompt", 5, "row 0: `prompt` is 5, expected the question"),
        ("images", "a.png", "the column `images` has one string per row, expected a list of pictures"),
    ],
)
def test_a_column_of_another_type(column, value, message, tiny_folders, tmp_path):
    data = Dataset.from_list([{**row, column: value} for row in row_40()])
    with pytest.raises(ValueError, match="train_dataset.{1,2}" + message):
        ProcessRewardTrainer(model=tiny_folders["qwen2"], args=config(tmp_path), train_dataset=data)


@pytest.mark.parametrize("decode", [True, False, None], ids=["Image()", "Image(decode=False)", "paths"])
def test_a_missing_picture_stops_before_training(decode, tiny_folders, tmp_path):
    """Also in a selection of the rows; a row that was not selected may lack its picture."""
    picture("red").save(tmp_path / "there.png")
    rows = [row | {"images": [str(tmp_path / "there.png")]} for row in row_40()]
    rows[-1]["images"] = [str(tmp_path / "there.png"), str(tmp_path / "gone.png")]
    data = Dataset.from_list(rows)
    if decode is not None:
        data = data.cast_column("images", List(Image(decode=decode)))
    kwargs = {"model": tiny_folders["qwen2_5_vl"], "args": config(tmp_path / "run", max_steps=1)}
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\], row 40: picture 1 is '.*gone.png', and there is no"):
        ProcessRewardTrainer(**kwargs, train_dataset=data.select(range(4)), eval_dataset={"a": data})
    with pytest.raises(ValueError, match=r"train_dataset, row 1: picture 1 is '.*gone.png'"):
        ProcessRewardTrainer(**kwargs, train_dataset=data.select([5, 40]))
    ProcessRewardTrainer(**kwargs, train_dataset=data.select(range(4))).train()


@pytest.mark.parametrize(
    ("options", "stream"),
    [({}, False), ({"share_prefix": True}, False), ({}, True)],
    ids=["plain", "shared", "stream"],
)
def test_a_broken_picture_names_its_row(options, stream, tiny_folders, tmp_path):
    picture("red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    rows = [row | {"images": [str(tmp_path / "whole.png")]} for row in row_40()]
    rows[-1]["images"] = [str(tmp_path / "cut.png")]
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    rows_read = data.select([0, 40]).to_iterable_dataset() if stream else data
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2_5_vl"], args=config(tmp_path, max_steps=20, **options), train_dataset=rows_read
    )
    name = "row 1 of the batch" if stream else "row 40"
    with pytest.raises(ValueError, match=f"^{name}: cannot read image .*cut.png"):
        trainer.train()


def test_a_picture_behind_a_url_is_fetched(tiny_folders, tmp_path):
    """As `datasets` does it, for a column that names pictures by URL, as one inside an archive."""
    picture("red").save(tmp_path / "there.png")
    with zipfile.ZipFile(tmp_path / "there.zip", "w") as archive:
        archive.write(tmp_path / "there.png", "there.png")
    processor = load_processing_class(tiny_folders["qwen2_5_vl"], vision=True)
    processor.tokenizer.add_tokens(["<prm>"], special_tokens=True)
    collator = DataCollatorForProcessReward(processor)
    urls = [f"zip://there.png::{tmp_path}/{name}" for name in ("there.zip", "gone.zip")]
    here, far, gone = (
        row_40()[0] | {"images": [{"path": path, "bytes": None}]} for path in (str(tmp_path / "there.png"), *urls)
    )
    assert torch.equal(collator([here])["pixel_values"], collator([far])["pixel_values"])
    with pytest.raises(ValueError, match="row 1 of the batch: cannot read image"):
        collator([far, gone])


def test_streams_are_checked_too(tiny_folders, tmp_path):
    """Where a stream knows its columns, before training; else at the row."""
    good = {"images": [], "prompt": "q", "completions": ["a"], "labels": [1.0]}
    shown = {"image": "a.png", **{key: good[key] for key in ("prompt", "completions", "labels")}}
    for row, known, message in [
        ({key: good[key] for key in ("images", "prompt", "completions")}, True, "train_dataset has no column labels"),
        (shown, True, "train_dataset has a column `image`, expected `images`"),
        ({key: good[key] for key in ("prompt", "labels")}, False, "row 0 of the batch has no completions; it has"),
        (shown, False, "row 0 of the batch has an `image`, expected `images`"),
    ]:
        data = Dataset.from_list([row] * 4).to_iterable_dataset()
        if not known:
            data = data.map(lambda row: row)
            assert data.column_names is None
        with pytest.raises(ValueError, match=message):
            ProcessRewardTrainer(
                model=tiny_folders["qwen2_5_vl"], args=config(tmp_path, max_steps=1), train_dataset=data
            ).train()


def test_bad_counts_stop_before_training(tiny_folders, tmp_path):
    rows = [row | {"mc_counts": [0, 16], "mc_total": 16} for row in row_40()]
    args = config(tmp_path, loss_type="beta_binomial")
    for change, message in [
        ({"mc_counts": [0, 17]}, "count of step 1 is 17, expected 0 to 16"),
        ({"mc_counts": [0]}, "`mc_counts`, one per step"),
        ({"mc_counts": None}, "`mc_counts`, one per step"),
        ({"mc_total": 0}, "`mc_total` above 0"),
    ]:
        data = Dataset.from_list([*rows[:40], rows[40] | change])
        with pytest.raises(ValueError, match=f"train_dataset, row 40: .*{message}"):
            ProcessRewardTrainer(model=tiny_folders["qwen2"], args=args, train_dataset=data)
    ignored = rows[0] | {"labels": [-100.0, 1.0], "mc_counts": [None, 16]}
    ProcessRewardTrainer(model=tiny_folders["qwen2"], args=args, train_dataset=Dataset.from_list([ignored, *rows]))


def test_settings_that_cannot_be_meant(tiny_folders, tmp_path):
    for change, message in [
        ({"hard_threshold": float("nan")}, "hard_threshold is nan, expected at least 0 and below 1"),
        ({"hard_threshold": 1.0}, "hard_threshold is 1.0"),
        ({"class_weights": [float("nan"), 1.0]}, r"class_weights is \[nan, 1.0\], expected two of at least 0"),
        ({"source_weights": {"a": -1.0}}, "source_weights is {'a': -1.0}, expected numbers of at least 0"),
        ({"max_length": 0}, "max_length is 0, expected at least 1"),
        ({"share_prefix": True, "train_sampling_strategy": "group_by_length"}, "choose one"),
        (
            {"model_init_kwargs": {"quantization_config": nf4()}},
            "model_init_kwargs has quantization_config: give it to",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            config(tmp_path, **change)
    with pytest.raises(ValueError, match="train_dataset has no column source"):
        ProcessRewardTrainer(
            model=tiny_folders["qwen2"],
            args=config(tmp_path, source_weights={"ChartQA": 2.0}),
            train_dataset=dataset("qwen2").remove_columns("source"),
        )


def test_an_adapter_is_no_base(tiny_folders, tmp_path):
    args = config(tmp_path / "run", max_steps=1)
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"], args=args, train_dataset=dataset("qwen2"), peft_config=LoraConfig(r=4)
    )
    trainer.save_model()
    # The frozen embedding is not saved with the adapter, though the marker made it longer.
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert max(tensor.numel() for tensor in saved.values()) < trainer.model.get_base_model().lm_head.weight.numel()
    with pytest.raises(ValueError, match="is an adapter: name its base here"):
        ProcessRewardTrainer(model=str(tmp_path / "run"), args=args, train_dataset=dataset("qwen2"))


def test_processor_kwargs_are_saved_with_the_model(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2_5_vl"],
        args=config(tmp_path, processor_kwargs={"max_pixels": 28 * 28}),
        train_dataset=dataset("qwen2_5_vl"),
    )
    trainer.save_model()
    prm = ProcessRewardModel.from_pretrained(tmp_path)
    row = make_rows(images=True, n=1)[0]  # one picture of 56 x 56, that is 4 tokens, or 1 of 28 x 28
    for processor, tokens in ((trainer.processing_class, 1), (prm.processing_class, 1)):
        ids = DataCollatorForProcessReward(processor)([row])["input_ids"]
        assert (ids == trainer.model.config.image_token_id).sum() == tokens


def test_own_metrics_keep_the_loss(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2"],
        args=config(tmp_path),
        train_dataset=dataset("qwen2"),
        eval_dataset=dataset("qwen2"),
        compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 8 and metrics["eval_loss"] > 0


def test_a_processor_that_is_silently_a_tokenizer_is_refused(tmp_path, tiny_folders):
    """AutoProcessor knows no processor for this folder, finds a tokenizer and returns that."""
    tokenizer = AutoProcessor.from_pretrained(tiny_folders["qwen2"])
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    with pytest.raises(ValueError, match="expected a processor for images and text in .*the folder lacks processor"):
        load_processing_class(tiny_folders["qwen2"], vision=True)


def test_card_tells_the_run(tiny_folders, tmp_path):
    trainer = ProcessRewardTrainer(
        model=tiny_folders["qwen2_5_vl"],
        args=config(tmp_path / "tiny-mprm", eval_strategy="epoch"),
        train_dataset=dataset("qwen2_5_vl"),
        eval_dataset=dataset("qwen2_5_vl", 5),
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    trainer.save_model()
    text = (tmp_path / "tiny-mprm" / "README.md").read_text()
    assert "# tiny-mprm" in text and "LoRA, rank 4" in text and "| a | 4 |" in text
    assert "- process-reward-model" in text and "2602.04145" in text
    steps = sum(len(row["completions"]) for row in make_rows(True))
    assert f"8 rollouts with {steps} labelled steps" in text
    assert f"loss {trainer.state.log_history[-2]['eval_loss']:.4f}" in text
    assert str(tmp_path) not in text and tiny_folders["qwen2_5_vl"] not in text
    assert StepFormat.load(tmp_path / "tiny-mprm") == StepFormat()


TWO_PROCESSES = """
import json, os, sys
import torch
from datasets import load_from_disk
from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer

torch.set_num_threads(1)
model, rows, output = sys.argv[1:]
processes = int(os.environ.get("WORLD_SIZE", 1))
args = ProcessRewardConfig(
    output, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1, warmup_steps=0,
    per_device_train_batch_size=8 // processes, per_device_eval_batch_size=3, optim="sgd", learning_rate=0.1,
)
rows = load_from_disk(rows)
trainer = ProcessRewardTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows.select(range(7)))
trainer.train()
metrics = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    print(json.dumps({name: metrics[name] for name in ("eval_loss", "eval_auc")}))
"""


@pytest.mark.slow
def test_two_processes_are_one(tiny_folders, tmp_path):
    """8 rows on one process, and 4 on each of two: the same update, and the same evaluation of 7 rows."""
    rows = [{name: row[name] for name in ("prompt", "completions", "labels")} for row in make_rows(images=False)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    launchers = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]}
    metrics, weights = {}, {}
    for processes, launcher in launchers.items():
        output = tmp_path / f"out{processes}"
        argv = [*launcher, tmp_path / "train.py", tiny_folders["qwen2"], tmp_path / "rows", output]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        metrics[processes] = json.loads(done.stdout.splitlines()[-1])
        weights[processes] = load_file(output / "model.safetensors")
    assert metrics[1] == pytest.approx(metrics[2], abs=1e-6)
    for name, value in weights[1].items():
        assert torch.allclose(value, weights[2][name], rtol=0, atol=1e-6), name
