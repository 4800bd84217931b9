"""
Losses and gradient norms of a short training, kept in `curve.json` with the environment that it was made in:

    {"command": ..., "environment": {"torch": ..., "cpu": ..., "threads": 1}, "curve": {"loss": [...], "grad_norm": [...]}}

Made by `python tests/golden/make_curve.py`. On the same machine a run repeats it to the last bit; other CPUs and other
versions of the libraries add up in another order, and may differ by `TOLERANCE`.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import as_dataset, config, make_rows

from trl_mprm import ProcessRewardTrainer  # noqa: E402
from trl_mprm.models.tiny import tiny_model  # noqa: E402


GOLDEN = Path(__file__).with_name("curve.json")
TOLERANCE = 1e-4


def curve(folder: Path, seed: int = 0) -> dict[str, list[float]]:
    """Six steps of a tiny Qwen2.5-VL in two epochs of nine rows with and without pictures, in full, soft labels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = ProcessRewardTrainer(
        model=tiny_model("qwen2_5_vl", Path(folder) / "base"),
        args=config(
            Path(folder) / "run",
            num_train_epochs=2,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            loss_type="soft",
            seed=seed,
        ),
        train_dataset=as_dataset(make_rows(images=True, n=9)),
    )
    trainer.train()
    torch.set_num_threads(threads)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in logged] for name in ("loss", "grad_norm")}


def main() -> None:
    import accelerate
    import datasets
    import transformers

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    with tempfile.TemporaryDirectory() as folder:
        golden = {
            "command": "python tests/golden/make_curve.py",
            "environment": {
                **{module.__name__: module.__version__ for module in (torch, transformers, accelerate, datasets)},
                "python": platform.python_version(),
                "machine": platform.machine(),
                "cpu": cpu,
                "threads": 1,
            },
            "curve": curve(folder),
        }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(golden["curve"])


if __name__ == "__main__":
    main()
