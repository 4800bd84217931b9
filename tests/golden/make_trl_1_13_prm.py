"""
What TRL 1.13's `PRMTrainer`, gone since 1.14, makes of four rows; the golden file beside this script holds its answer.

One row in, and what it becomes there (byte-level tokens; the label stands on the last token of the separator):

    {"prompt": "2+2?", "completions": ["2+2", "is 4"], "labels": [True, False]}
    input_ids  2 + 2 ?  2 + 2 \\n  i s _ 4 \\n
    labels     . . . .  . . . 1   . . . .  0        (. is -100)

Made once, in an environment beside the project's own:

    python -m venv --system-site-packages trl113 && trl113/bin/pip install --no-deps trl==1.13.0
    trl113/bin/python tests/golden/make_trl_1_13_prm.py

The versions it ran with are in the file. `ROWS` and `tiny_classifier` need no TRL: the test builds both from here.
"""

import json
import platform
import re
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config


GOLDEN = Path(__file__).with_name("trl_1_13_prm.json")
ROWS = [
    {"prompt": "2+2?", "completions": ["2+2", "is 4"], "labels": [True, False]},
    {"prompt": "What is 3*7 - 1?", "completions": ["3*7 is 21", "21 - 1", "is 20"], "labels": [True, True, True]},
    {"prompt": "Half of 9?", "completions": ["9/2 is 5"], "labels": [False]},
    {"prompt": "é + ü?", "completions": ["one\nline more", "ß", "done"], "labels": [True, False, True]},
]


def tiny_classifier(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen2 token classifier of two labels; weights from a formula, the same under every version of torch."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin((torch.arange(weight.numel(), dtype=torch.float64) + 1) ** 1.5 + number)
            weight.copy_((("norm" in name) + 0.2 * wave).reshape(weight.shape))
    return model


def checksum(model: PreTrainedModel) -> float:
    """Sum of the absolute weights in double precision."""
    return sum(weight.detach().double().abs().sum().item() for weight in model.parameters())


def main() -> None:
    import accelerate
    import datasets
    import tokenizers
    import transformers
    import trl
    from datasets import Dataset
    from trl.experimental.prm import PRMConfig, PRMTrainer

    sys.path.insert(
        0, str(Path(__file__).parents[2] / "trl_mprm" / "models")
    )  # the file alone: this package needs a newer TRL
    from tiny import tiny_tokenizer

    torch.set_num_threads(1)
    golden = {
        "command": "trl113/bin/python tests/golden/make_trl_1_13_prm.py",
        "environment": {
            **{module.__name__: module.__version__ for module in (trl, transformers, accelerate, datasets)},
            **{module.__name__: module.__version__ for module in (tokenizers, torch)},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": 1,
        },
        "cases": [],
    }
    cases = [
        {"step_separator": "\n"},
        {"step_separator": "\n\n"},
        {"step_separator": "\n", "bos_token": "<|im_start|>"},
        {"step_separator": "\n", "train_on_last_step_only": True},
        {"step_separator": "\n", "max_length": 24},
    ]
    for case in cases:
        tokenizer = tiny_tokenizer("qwen2")
        options = {"max_length": 4096, "train_on_last_step_only": False, **case}
        tokenizer.bos_token = options.pop("bos_token", None)
        model = tiny_classifier(tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            trainer = PRMTrainer(
                model=model,
                args=PRMConfig(
                    folder,
                    **options,
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    report_to="none",
                    disable_tqdm=True,
                    save_strategy="no",
                    logging_steps=1,
                    per_device_train_batch_size=4,
                    max_steps=3,
                    optim="sgd",
                    learning_rate=0.005,
                    lr_scheduler_type="constant",
                    max_grad_norm=1e9,
                ),
                train_dataset=Dataset.from_list(ROWS),
                processing_class=tokenizer,
            )
            record = {
                **case,
                "weights_checksum": checksum(model),
                "input_ids": trainer.train_dataset["input_ids"][:],
                "labels": trainer.train_dataset["labels"][:],
            }
            batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(ROWS))])
            with torch.no_grad():
                output = model.eval()(**batch)
            record["initial_loss"] = output.loss.item()
            record["logits"] = output.logits[batch["labels"] != -100].tolist()
            trainer.train()
            logged = [entry for entry in trainer.state.log_history if "loss" in entry]
            record["logged_losses"] = [entry["loss"] for entry in logged]
            record["grad_norms"] = [float(entry["grad_norm"]) for entry in logged]
            golden["cases"].append(record)
    # Innermost lists on one line each.
    text = re.sub(r"\[[^][{}]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), json.dumps(golden, indent=1))
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    for record in golden["cases"]:
        print(record["initial_loss"], record["logged_losses"], record["grad_norms"], record["weights_checksum"])


if __name__ == "__main__":
    main()
