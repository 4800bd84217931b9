"""Nothing is computed twice: counted, not timed. And what is saved changes no loss and no gradient."""

import copy
import random

import pytest
import torch
from datasets import Dataset
from helpers import TEXT_MODELS, make_rows, make_trainer, picture, rollouts
from peft import LoraConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BitsAndBytesConfig

from trl_mprm import DataCollatorForProcessReward, ProcessRewardConfig, ProcessRewardModel, ProcessRewardTrainer
from trl_mprm.data.rows import IGNORE_INDEX
from trl_mprm.models.tiny import BUILDERS
from trl_mprm.training.sampling import EpochSampler, by_prompt, prompt_groups


def gradients(trainer, rows, checkpointing=False):
    """Loss, gradients, and how often the first decoder layer ran."""
    model = trainer.model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []
    layer = model.get_decoder().layers[0].self_attn
    hook = layer.register_forward_hook(lambda *_: passes.append(1))
    loss = trainer.compute_loss(model, trainer.data_collator(rows), num_items_in_batch=torch.tensor(10))
    loss.backward()
    hook.remove()
    flat = torch.cat(
        [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()]
    ).double()
    return loss.item(), flat, len(passes)


@pytest.mark.parametrize("architecture", [*BUILDERS, *TEXT_MODELS])
def test_shared_prefix_changes_no_loss_and_no_gradient(architecture, tiny_folders, tmp_path):
    rows = rollouts(architecture)
    settings = {"freeze_vision_encoder": False}
    plain = gradients(make_trainer(tiny_folders, architecture, tmp_path, rows, **settings), rows)
    shared = make_trainer(tiny_folders, architecture, tmp_path, rows, share_prefix=True, **settings)
    loss, gradient, passes = gradients(shared, rows)
    assert abs(loss - plain[0]) < 1e-5 and gradient.norm() > 0
    assert torch.nn.functional.cosine_similarity(gradient, plain[1], dim=0) >= 0.999999
    torch.testing.assert_close(gradient, plain[1], atol=1e-5, rtol=1e-4)
    assert passes == 2 * 3  # a prefix and its solutions, three questions


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "gemma3", "llama"])
def test_shared_prefix_under_activation_checkpointing(architecture, tiny_folders, tmp_path):
    rows = rollouts(architecture)
    plain = gradients(make_trainer(tiny_folders, architecture, tmp_path, rows), rows)
    shared = make_trainer(tiny_folders, architecture, tmp_path, rows, share_prefix=True)
    loss, gradient, passes = gradients(shared, rows, checkpointing=True)
    assert abs(loss - plain[0]) < 1e-5
    assert torch.nn.functional.cosine_similarity(gradient, plain[1], dim=0) >= 0.999999
    assert passes == 2 * 2 * 3  # every layer runs again for the backward pass: it was checkpointed


def test_a_collator_that_shares_under_a_trainer_that_does_not(tiny_folders, tmp_path):
    rows = rollouts("qwen2")
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows)
    trainer.data_collator.share_prefix = True
    with pytest.raises(ValueError, match="set share_prefix=True"):
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))


def test_shared_prefix_of_an_adapter(tiny_folders, tmp_path):
    rows, peft_config = rollouts("qwen2_5_vl"), LoraConfig(r=4, init_lora_weights=False)
    plain = gradients(make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, peft_config), rows)
    shared = gradients(make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, peft_config, share_prefix=True), rows)
    assert abs(shared[0] - plain[0]) < 1e-5
    assert torch.nn.functional.cosine_similarity(shared[1], plain[1], dim=0) >= 0.999999


@pytest.mark.parametrize("n", [2, 4, 8])
def test_flops_of_training_are_within_five_percent_of_the_ideal(n, tiny_folders, tmp_path):
    """Forward and backward, of rollouts of one question."""
    rows = [
        {"prompt": "How many? " * 16, "completions": [f"{index:02d} of it" * 3] * 3, "labels": [1.0, 0.0, 1.0]}
        for index in range(n)
    ]
    flops = {}
    for share_prefix in (False, True):
        trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows, share_prefix=share_prefix)
        batch = trainer.data_collator(rows)
        if share_prefix:
            (group,) = batch["groups"]
            prefix, answer = group["prefix"]["input_ids"].shape[1], group["input_ids"].shape[1]
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model.train(), batch).backward()
        flops[share_prefix] = counter.get_total_flops()
    ideal = (prefix + n * answer) / (n * (prefix + answer))
    assert flops[True] / flops[False] <= 1.05 * ideal


def test_lm_head_sees_the_labelled_steps_of_a_shared_batch_only(tiny_folders, tmp_path):
    rows = rollouts("qwen2_5_vl")
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, share_prefix=True)
    seen = []
    hook = trainer.model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    hook.remove()
    assert sum(seen) == sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


@pytest.mark.parametrize("share_prefix", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("architecture", BUILDERS)
def test_a_picture_is_encoded_once_a_batch(architecture, share_prefix, tiny_folders, tmp_path):
    """
    Six rows show a red, two of them a blue picture too: the encoder gets two.

    Questions of the rows with pictures, by row: red and "0" 0 4 6, red and "1" 1, both and "1" 3 7.
    """
    rows = [row | {"prompt": f"How many, question {index % 2}?"} for index, row in enumerate(make_rows(True, n=8))]
    n_images = sum(len(row["images"]) for row in rows)
    assert n_images > 2 == len({image.tobytes() for row in rows for image in row["images"]})
    folder = tiny_folders[architecture]
    trainer = make_trainer(tiny_folders, architecture, tmp_path, rows, share_prefix=share_prefix)
    encoder, pixels = trainer.model.get_encoder("image"), []
    first = next(module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d))
    hook = first.register_forward_hook(lambda _, args, out: pixels.append(len(args[0])))
    batch = trainer.data_collator(rows)
    assert not share_prefix or len(batch["groups"]) == 2
    loss = trainer.compute_loss(trainer.model, batch)
    distinct = [{**rows[0], "images": [picture("red"), picture("blue", (56, 28))], "labels": [1.0]}]
    in_batch = sum(pixels)
    pixels.clear()
    trainer.compute_loss(trainer.model, trainer.data_collator(distinct))
    hook.remove()
    if architecture in ("idefics3", "llava_onevision"):  # one batch of tiles, padded to the most tiles of a row
        assert in_batch < n_images * sum(pixels) / 2
    else:
        assert in_batch == sum(pixels)
    # The plain path of transformers, each picture encoded anew.
    twin = make_trainer({architecture: folder}, architecture, tmp_path, rows)
    del twin.model.get_encoder("image").forward
    torch.testing.assert_close(twin.compute_loss(twin.model, twin.data_collator(rows)), loss, atol=1e-6, rtol=1e-6)


def test_a_copy_of_a_model_has_its_own_encoder(tiny_folders, tmp_path):
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rollouts("qwen2_5_vl"))
    prm = ProcessRewardModel(trainer.model, trainer.processing_class, trainer.step_format)
    twin = copy.deepcopy(prm.model)
    with torch.no_grad():
        for parameter in twin.get_encoder("image").parameters():
            parameter.mul_(2)
    rows = [{"images": [picture("red")] * 2, "prompt": "q", "completions": ["a"]}]
    again = ProcessRewardModel(twin, prm.processing_class, prm.step_format)
    assert again.score_batch(rows) != prm.score_batch(rows)
    assert not isinstance(twin.get_encoder("image").forward.args[0], type(twin.get_encoder("image").forward))


def test_rows_of_equal_length_are_padded_by_less_than_three_percent(tiny_folders, tmp_path):
    rows = [
        {"prompt": "q" * (1 + index * 7 % 90), "completions": ["a" * (1 + index * 13 % 50)] * (1 + index % 4)}
        for index in range(2000)
    ]
    rows = [row | {"labels": [1.0] * len(row["completions"])} for row in rows]
    padding = {}
    for strategy in ("random", "group_by_length"):
        trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows, train_sampling_strategy=strategy)
        order = list(trainer._get_train_sampler())
        assert sorted(order) == list(range(2000))
        masks = [
            trainer.data_collator([rows[index] for index in order[at : at + 8]])["attention_mask"]
            for at in range(0, 2000, 8)
        ]
        padding[strategy] = 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding["group_by_length"] <= 0.03 < 0.3 < padding["random"]


def ragged_rollouts(questions: int, rollouts: int) -> list[dict]:
    """Solutions of one to six steps, of 5 to 60 characters each; a picture a question, of 56 to 448 pixels a side."""
    draw = random.Random(0)
    rows = []
    for question in range(questions):
        image = picture("red", (28 * draw.randint(2, 16), 28 * draw.randint(2, 16)))
        for _ in range(rollouts):
            steps = ["s" * draw.randint(5, 60) for _ in range(draw.randint(1, 6))]
            row = {"images": [image], "prompt": f"question {question}", "completions": steps}
            rows.append(row | {"labels": [1.0] * len(steps)})
    return rows


def test_padding_of_a_vision_language_model(tiny_folders, tmp_path):
    """Rows of one length in a batch, images included: under 3%. Rollouts of one prefix are padded to their longest."""
    kwargs = {"processor_kwargs": {"max_pixels": 448 * 448}, "per_device_train_batch_size": 4}
    rows, settings = ragged_rollouts(400, 1), {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, **settings, **kwargs)
    lengths = trainer.train_dataset["length"][:]
    for number in (0, 1):  # counted as the collator renders them
        assert len(trainer.data_collator(rows[number : number + 1])["input_ids"][0]) == lengths[number]
    order = list(trainer._get_train_sampler())
    batches = [[lengths[index] for index in order[at : at + 4]] for at in range(0, len(order), 4)]
    assert 1 - sum(lengths) / sum(4 * max(batch) for batch in batches) <= 0.03

    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, ragged_rollouts(8, 4), share_prefix=True, **kwargs)
    run = padded = 0
    for batch in trainer.get_train_dataloader():
        for group in batch["groups"]:
            markers = group["markers"]
            last = markers.int().cumsum(1).argmax(1) + 1  # a row ends with a marker
            padded += int(markers.numel() - last.sum())
            run += markers.numel() + group["prefix"]["input_ids"].numel()
    assert 0.25 < padded / run < 0.4  # what the docstring of `share_prefix` says


def test_rows_of_a_question_are_drawn_together(tiny_folders, tmp_path):
    rows = rollouts("qwen2_5_vl", n=12)
    dataset = Dataset.from_list(rows)
    groups = prompt_groups(dataset)
    assert groups == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    sampler = EpochSampler(by_prompt(groups), 12, seed=0)
    orders = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(12)) and len(sampler) == 12
        assert [order[at : at + 4] in groups for at in (0, 4, 8)] == [True] * 3
        orders.append(tuple(order))
    assert len(set(orders)) > 1
    trainer = make_trainer(
        tiny_folders, "qwen2_5_vl", tmp_path, rows, share_prefix=True, per_device_train_batch_size=4
    )
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["groups"]) for batch in batches] == [1, 1, 1] and not any("plain" in batch for batch in batches)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_trains_with_every_loss(share_prefix, tiny_folders, tmp_path):
    """Whole runs, whose exact evaluation loss is that of the plain path."""
    rows = [
        row | {"labels": [0.25, 1.0, 0.0, 0.5][: len(row["labels"])], "mc_counts": [4, 16, 0, 8][: len(row["labels"])]}
        for row in rollouts("qwen2_5_vl")
    ]
    rows = [row | {"mc_total": 16} for row in rows]
    for loss_type in ("hard", "soft", "beta_binomial"):
        trainer = make_trainer(
            tiny_folders,
            "qwen2_5_vl",
            tmp_path / loss_type,
            rows,
            share_prefix=share_prefix,
            loss_type=loss_type,
            class_weights=[1.0, 2.0],
            source_weights={"b": 0.5},
            max_steps=6,
            learning_rate=3e-3,
            per_device_eval_batch_size=3,
        )
        start = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
        twin = copy.copy(trainer)
        twin.data_collator = copy.copy(trainer.data_collator)
        twin.data_collator.share_prefix = False
        assert twin.evaluate(Dataset.from_list(rows))["eval_loss"] == pytest.approx(start, abs=1e-6)
        trainer.train()
        assert trainer.evaluate(Dataset.from_list(rows))["eval_loss"] < start
        trainer.save_model()
        prm = ProcessRewardModel.from_pretrained(tmp_path / loss_type)
        if loss_type == "beta_binomial":
            concentrations = prm.concentrations(rows)
            assert [len(row) for row in concentrations] == [len(row["labels"]) for row in rows]
            assert all(value > 0 for row in concentrations for value in row)
        else:
            with pytest.raises(ValueError, match=f'trained with loss_type="{loss_type}"'):
                prm.concentrations(rows)


def test_weights_scale_the_loss_by_hand(tiny_folders, tmp_path):
    rows = rollouts("qwen2")
    plain = make_trainer(tiny_folders, "qwen2", tmp_path, rows)
    batch = plain.data_collator(rows)
    logits, _, labelled = plain.read(plain.model, batch)
    labels, counts = batch["labels"][labelled], labelled.sum(1)
    losses = torch.nn.functional.softplus(torch.where(labels > 0, -1, 1) * (logits[:, 0] - logits[:, 1]))
    source = torch.tensor([row["source"] == "b" for row in rows]).repeat_interleave(counts)
    expected = (losses * torch.where(labels > 0, 0.5, 3.0) * torch.where(source, 4.0, 1.0)).sum() / len(labels)
    weighted = make_trainer(tiny_folders, "qwen2", tmp_path, rows, class_weights=[0.5, 3.0], source_weights={"b": 4.0})
    torch.testing.assert_close(weighted.compute_loss(weighted.model, weighted.data_collator(rows)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mc_counts": None}, r'row r:0: loss_type="beta_binomial" needs `mc_counts`, one per step.*got None'),
        ({"mc_counts": [17]}, "row r:0: count of step 0 is 17, expected 0 to 16"),
        ({"mc_total": 0}, "row r:0.*`mc_total` above 0, got .* and 0"),
    ],
)
def test_bad_counts(change, message, tiny_folders):
    collator = DataCollatorForProcessReward(None, loss_type="beta_binomial")
    row = rollouts("qwen2")[0] | {"mc_counts": [4], "mc_total": 16} | change
    with pytest.raises(ValueError, match=message):
        collator([row])


@pytest.mark.parametrize("share_prefix", [False, True])
def test_overlong_rows(share_prefix, tiny_folders, tmp_path, caplog):
    rows = rollouts("qwen2_5_vl", n=8)
    trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, share_prefix=share_prefix)
    collator = trainer.data_collator
    whole = collator(rows[:1] + rows[3:4])
    lengths = [len(collator([row])["input_ids"][0]) if not share_prefix else None for row in rows]
    if share_prefix:
        collator.share_prefix = False
        lengths = [len(collator([row])["input_ids"][0]) for row in rows]
        collator.share_prefix = True
    assert "overlong" not in whole.get("extra", {})
    limit = sorted(lengths)[4]
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    assert len(too_long) >= 2
    collator.max_length = limit
    with pytest.raises(ValueError, match=rf"row r:\d has \d+ tokens, more than max_length {limit}: raise max_length"):
        collator(rows)

    collator.overlong = "drop_row"
    batch = collator(rows)
    steps = sum(len(rows[index]["labels"]) for index in too_long)
    labelled = sum(label != IGNORE_INDEX for index in too_long for label in rows[index]["labels"])
    assert batch["extra"]["overlong"].tolist() == [len(too_long), steps, labelled]
    assert (batch["labels"] != IGNORE_INDEX).sum() + labelled == sum(
        label != IGNORE_INDEX for row in rows for label in row["labels"]
    )

    collator.overlong = "drop_steps"
    caplog.clear()
    batch = collator(rows)
    dropped_rows, dropped_steps, dropped_labels = batch["extra"]["overlong"].tolist()
    assert dropped_rows < len(too_long) and dropped_steps < steps and dropped_labels < labelled
    assert len([record for record in caplog.records if "labelled steps dropped" in record.message]) == len(too_long)
    if not share_prefix:
        assert batch["input_ids"].shape[1] <= limit
        # Images are whole: as many image tokens as their tensors hold.
        image_token = trainer.model.config.image_token_id
        assert (batch["input_ids"] == image_token).sum() == batch["image_grid_thw"].prod(-1).sum() // 4

    collator.max_length = 3  # nothing fits: the batch teaches nothing, and the run goes on
    batch = collator(rows)
    assert batch["extra"]["overlong"].tolist()[0] == len(rows) and (batch["labels"] == IGNORE_INDEX).all()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0


def test_overlong_steps_are_counted_in_the_logs(tiny_folders, tmp_path):
    rows = rollouts("qwen2", n=8)
    trainer = make_trainer(
        tiny_folders, "qwen2", tmp_path, rows, max_length=70, overlong="drop_steps", num_train_epochs=1
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "overlong_rows" in entry]
    expected = trainer.data_collator(rows)["extra"]["overlong"].tolist()
    assert expected[1] > 0
    names = ("overlong_rows", "overlong_steps", "overlong_labelled_steps")
    assert [logged[-1][name] for name in names] == expected


def long_and_short(n_long: int, n_short: int) -> list[dict]:
    """Rows that are longer than 100 tokens, and rows of two steps that are not."""
    row = {"completions": ["a", "b"], "labels": [1.0, -100.0]}
    return [row | {"prompt": "q" * 200}] * n_long + [row | {"prompt": "q"}] * n_short


def test_an_accumulated_batch_without_a_label_changes_nothing(tiny_folders, tmp_path):
    """The first two of four updates have no row left; they were 0 / 0."""
    settings = {"max_length": 100, "overlong": "drop_row", "train_sampling_strategy": "sequential"}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_nan_inf_filter": False}
    rows = long_and_short(4, 4)
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows, max_steps=4, weight_decay=0.0, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[:2] == [0, 0] and all(loss > 0 for loss in losses[2:])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_what_an_evaluation_drops_is_counted_by_itself(tiny_folders, tmp_path):
    settings = {"max_length": 100, "overlong": "drop_row"}
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, long_and_short(1, 3), max_steps=1, **settings)
    trainer.train()
    names = ("overlong_rows", "overlong_steps", "overlong_labelled_steps")
    for evaluated in range(2):  # each counts anew
        metrics = trainer.evaluate(Dataset.from_list(long_and_short(3, 4)))
        assert [metrics[f"eval_{name}"] for name in names] == [3, 6, 3], evaluated
        assert not set(names) & set(trainer.state.log_history[-1])
    assert [trainer.state.log_history[0][name] for name in names] == [1, 2, 1]
    with pytest.raises(ValueError, match="no labelled step of 4 rows is left, they are longer than max_length 100"):
        trainer.evaluate(Dataset.from_list(long_and_short(4, 0)))


def test_rows_grouped_by_length(tiny_folders, tmp_path):
    """Another data set can be evaluated; a row that is too long stops before training."""
    rows, settings = long_and_short(2, 2), {"train_sampling_strategy": "group_by_length"}
    trainer = make_trainer(tiny_folders, "qwen2", tmp_path, rows, **settings, per_device_eval_batch_size=2)
    other = Dataset.from_list(rows[::-1])
    batches = [
        sorted(mask.sum(1).tolist()) for mask in (b["attention_mask"] for b in trainer.get_eval_dataloader(other))
    ]
    assert all(long - short < 10 for short, long in batches)
    plain = make_trainer(tiny_folders, "qwen2", tmp_path, rows)
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(plain.evaluate(other)["eval_loss"], abs=1e-6)
    with pytest.raises(ValueError, match=r"train_dataset, row 2 has \d+ tokens, more than max_length 100 \(1 rows"):
        make_trainer(tiny_folders, "qwen2", tmp_path, rows[2:] + rows[:1], max_length=100, **settings)


@pytest.mark.parametrize("kwargs", [{"share_prefix": True}, {"max_length": 90, "overlong": "drop_row"}])
def test_evaluation_keeps_the_order_of_the_rows(kwargs, tiny_folders, tmp_path):
    """Own metrics get one line a row that came in; a row that was dropped has no measured step."""
    rows = rollouts("qwen2_5_vl")
    seen = []
    for settings in ({}, kwargs):
        trainer = make_trainer(tiny_folders, "qwen2_5_vl", tmp_path, rows, per_device_eval_batch_size=4, **settings)
        trainer.compute_other_metrics = lambda prediction: seen.append(prediction) or {}
        trainer.evaluate(Dataset.from_list(rows))
    plain, other = seen
    measured = other.label_ids != IGNORE_INDEX
    assert len(other.label_ids) == len(rows) and measured.any()
    assert measured.all(1).sum() < len(rows)
    assert (plain.label_ids[:, : measured.shape[1]][measured] == other.label_ids[measured]).all()
    difference = plain.predictions[:, : measured.shape[1]][measured] - other.predictions[measured]
    assert abs(difference).max() < 1e-5
    if "max_length" in kwargs:
        assert 0 < (~measured.any(1)).sum() < len(rows)


def test_start_tells_what_is_trained(tiny_folders, tmp_path, capsys):
    make_trainer(tiny_folders, "qwen2", tmp_path, rollouts("qwen2"), peft_config=LoraConfig(r=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("trained parameters: ") and " of " in lines[0] and lines[0].endswith("%)")
    assert lines[1] == "in 4 bit: none"
    assert lines[2].startswith("memory: ") and lines[2].endswith("activations not counted")
    assert " MB (weights " in lines[2] and " GB" not in lines[2]  # a tiny model is not of 0.00 GB


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "gemma3", "qwen2"])
def test_training_the_marker_copies_no_embedding(architecture, tiny_folders, tmp_path):
    """The same loss and gradients as PEFT's own way, and no tensor of the embedding's size."""
    rows, peft_config = rollouts(architecture), LoraConfig(r=4, init_lora_weights=False)
    trainer = make_trainer(tiny_folders, architecture, tmp_path, rows, peft_config)
    (layer,) = [module for module in trainer.model.modules() if isinstance(module, TrainableTokensLayer)
                and isinstance(module.base_layer, torch.nn.Embedding)]  # fmt: skip
    with torch.no_grad():
        layer.trainable_tokens_delta["default"] += 0.1
    batch, copies = trainer.data_collator(rows), {}

    def run():
        trainer.model.zero_grad()
        with TorchFunctionCounter("index_copy") as counter:
            loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        return loss.item(), gradients, counter.calls

    loss, ours, copies = run()
    del layer.forward_adapters
    loss_of_peft, theirs, copies_of_peft = run()
    tied = int(architecture == "gemma3")  # PEFT wraps the LM head as well
    assert copies == tied and copies_of_peft == 1 + tied
    assert loss == pytest.approx(loss_of_peft, abs=1e-6) and set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)


def test_qlora_keeps_frozen_weights_in_their_precision(tiny_folders, tmp_path):
    """bfloat16 embeddings and LM head are not blown up to float32; adapters are in float32, as PEFT makes them."""
    args = ProcessRewardConfig(str(tmp_path), report_to=[], use_cpu=True, model_init_kwargs={"dtype": "bfloat16"})
    trainer = ProcessRewardTrainer(
        tiny_folders["qwen2_5_vl"],
        args,
        train_dataset=Dataset.from_list(rollouts("qwen2_5_vl")),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        peft_config=LoraConfig(r=2),
    )
    kept = {name: p.dtype for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert set(kept.values()) == {torch.bfloat16, torch.uint8}
    assert all("language_model" in name for name, dtype in kept.items() if dtype == torch.uint8)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


class TorchFunctionCounter(TorchFunctionMode):
    """Count the calls of one method of tensors."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.calls = name, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += getattr(function, "__name__", "") == self.name
        return function(*args, **(kwargs or {}))
