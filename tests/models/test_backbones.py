"""
Every backbone, trained on a tiny random model with its real processor: in full, with LoRA, with QLoRA.

The rows of every training: batches of two solutions without an image, of one without and one with two images, of one
image and two images.
"""

import pytest
import torch
from helpers import FACTS, as_dataset, config, flat, make_rows, nf4, parameters, trainer_scores
from peft import LoraConfig, PeftModel

from trl_mprm import ProcessRewardModel, ProcessRewardTrainer
from trl_mprm.models.anatomy import PROJECTORS_IN_ENCODER, base_of, decoder_name
from trl_mprm.models.loading import load_model, load_processing_class
from trl_mprm.models.tiny import IMAGE_TOKENS


TEXT_ONLY = ("qwen2", "llama")
VISION = [architecture for architecture in IMAGE_TOKENS if architecture not in TEXT_ONLY]


def mixed_rows(architecture: str) -> list[dict]:
    rows = make_rows(images=architecture not in TEXT_ONLY, n=9)
    rows = [rows[index] for index in (2, 5, 8, 3, 0, 7)]
    assert architecture in TEXT_ONLY or [len(row["images"]) for row in rows] == [0, 0, 0, 2, 1, 2]
    # Thirteen right steps and two wrong ones: the last of four.
    return [{**row, "labels": [float(number < 3) for number in range(len(row["completions"]))]} for row in rows]


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
@pytest.mark.parametrize("architecture", IMAGE_TOKENS)
def test_trains_saves_and_loads(architecture, mode, tiny_folders, tmp_path):
    """Loss falls, trainable parameters move, frozen ones do not, and the saved model scores the same."""
    rows = mixed_rows(architecture)
    trainer = ProcessRewardTrainer(
        model=tiny_folders[architecture],
        args=config(
            tmp_path / "run",
            num_train_epochs=2,
            lr_scheduler_type="constant",
            learning_rate=5e-3,
            per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
        ),
        train_dataset=as_dataset(rows),
        quantization_config=nf4() if mode == "qlora" else None,
        peft_config=None if mode == "full" else LoraConfig(r=8),
    )
    batch = trainer.data_collator(rows)

    def loss() -> float:
        with torch.no_grad():
            return trainer.compute_loss(trainer.model.eval(), dict(batch)).item()

    before, loss_before = parameters(trainer.model), loss()
    trainer.train()
    assert trainer.state.global_step == 6 and loss() < 0.9 * loss_before
    after = dict(trainer.model.named_parameters())
    for name, value in before.items():
        moved = not torch.equal(value, after[name].detach())
        assert moved == after[name].requires_grad, f"{name}: moved {moved}, trainable {after[name].requires_grad}"
    facts = FACTS[architecture]
    decoder = ("" if mode == "full" else "base_model.model.") + facts.decoder
    beside = [name for name in before if after[name].requires_grad and not name.startswith((decoder, "lm_head"))]
    if mode == "full":
        assert {facts.projector_of(name) for name in beside} == set(facts.projector)
    else:
        assert not beside
        assert any("trainable_tokens" in name for name in before if after[name].requires_grad)

    trainer.save_model()
    assert not list((tmp_path / "run").glob("*.bin"))
    expected = flat(trainer_scores(trainer, rows))
    loaded = ProcessRewardModel.from_pretrained(
        tmp_path / "run", quantization_config=nf4() if mode == "qlora" else None
    )
    assert flat(loaded.score_batch(rows)) == pytest.approx(expected, abs=1e-5)
    assert isinstance(loaded.model, PeftModel) == (mode != "full")
    if mode != "full":
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = ProcessRewardModel.from_pretrained(tmp_path / "merged")
        assert not isinstance(merged.model, PeftModel) and not getattr(merged.model, "is_quantized", False)
        assert flat(merged.score_batch(rows)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", IMAGE_TOKENS)
def test_what_differs(architecture, tiny_folders):
    """The table holds what the libraries themselves say."""
    facts, vision = FACTS[architecture], architecture not in TEXT_ONLY
    model = load_model(tiny_folders[architecture], nf4())
    names = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    assert names[decoder] == decoder_name(model) == facts.decoder
    quantised = [name for module, name in names.items() if type(module).__name__ == "Linear4bit"]
    assert len(quantised) == facts.quantised and all(name.startswith(facts.decoder + ".") for name in quantised)
    assert {type(layer).__name__ for layer in decoder.layers} == {facts.wrap}
    rope = decoder.config.rope_parameters
    two_bases = "rope_theta" not in rope and len({layer["rope_theta"] for layer in rope.values()}) == 2
    assert facts.positions == ("M-RoPE" if "mrope_section" in rope else "RoPE, two bases" if two_bases else "RoPE")
    if vision:
        assert names[model.get_encoder("image")] == facts.encoder
        processor = load_processing_class(tiny_folders[architecture], vision=True)
        assert processor.image_token == facts.image
        assert len(processor.tokenizer.encode(facts.image, add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("architecture", "mode"), [*((architecture, "lora") for architecture in VISION), ("internvl", "full")]
)
def test_frozen_encoder_has_no_backward(architecture, mode, tiny_folders, tmp_path):
    """Activation checkpointing or not: no gradient is computed in the frozen part of the vision encoder."""
    trainer = ProcessRewardTrainer(
        model=tiny_folders[architecture],
        args=config(tmp_path, max_steps=1, gradient_checkpointing=True),
        train_dataset=as_dataset(mixed_rows(architecture)[3:]),
        peft_config=None if mode == "full" else LoraConfig(r=4),
    )
    backwards = {"encoder": 0, "decoder": 0}

    def count(part: str, model: torch.nn.Module) -> None:
        def hook(*args) -> None:
            backwards[part] += 1

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not PROJECTORS_IN_ENCODER.match(name):
                module.register_full_backward_hook(hook)

    base = base_of(trainer.model)
    count("encoder", base.get_encoder("image"))
    count("decoder", base.get_decoder())
    trainer.train()
    assert backwards["encoder"] == 0 < backwards["decoder"]
