"""
Multimodal process reward models on the Hugging Face stack: select rollouts, train, score, evaluate, publish.

Each name is imported on first use, so that selecting data does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_NAMES = {
    "load_rollouts": "data.rollouts",
    "add_bis": "selection.bis",
    "top_fraction": "selection.datasets",
    "annotate": "annotation.annotate",
    "select": "selection.datasets",
    "ProcessRewardConfig": "training.config",
    "ProcessRewardTrainer": "training.trainer",
    "DataCollatorForProcessReward": "training.collator",
    "ProcessRewardModel": "scoring",
    "RemoteProcessRewardModel": "serving.client",
    "StepFormat": "prompting.step_format",
    "step_metrics": "evaluation.metrics",
    "evaluate_model": "evaluation.run",
    "read_benchmark": "evaluation.benchmarks",
    "load_benchmark": "evaluation.benchmarks",
    "load_zero_shot": "evaluation.zero_shot",
    "split_steps": "data.splitting",
}
__all__ = list(_NAMES)

if TYPE_CHECKING:
    from .annotation.annotate import annotate
    from .data.rollouts import load_rollouts
    from .data.splitting import split_steps
    from .evaluation.benchmarks import load_benchmark, read_benchmark
    from .evaluation.metrics import step_metrics
    from .evaluation.run import evaluate_model
    from .evaluation.zero_shot import load_zero_shot
    from .prompting.step_format import StepFormat
    from .scoring import ProcessRewardModel
    from .selection.bis import add_bis
    from .selection.datasets import select, top_fraction
    from .serving.client import RemoteProcessRewardModel
    from .training.collator import DataCollatorForProcessReward
    from .training.config import ProcessRewardConfig
    from .training.trainer import ProcessRewardTrainer


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'trl_mprm' has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)
