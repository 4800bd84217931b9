"""
Multimodal process reward models on the Hugging Face stack: select rollouts, train, score, evaluate, publish.

Names are imported when they are first used, so that selecting data does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_NAMES = {
    "load_rollouts": "rollouts",
    "add_bis": "bis",
    "top_fraction": "selection",
    "select": "selection",
    "ProcessRewardConfig": "config",
    "ProcessRewardTrainer": "trainer",
    "DataCollatorForProcessReward": "collator",
    "ProcessRewardModel": "scoring",
    "StepFormat": "step_format",
    "step_metrics": "metrics",
    "evaluate_model": "evaluation",
    "read_benchmark": "benchmarks",
    "load_benchmark": "benchmarks",
    "split_steps": "splitting",
}
__all__ = list(_NAMES)

if TYPE_CHECKING:
    from .benchmarks import load_benchmark, read_benchmark
    from .bis import add_bis
    from .collator import DataCollatorForProcessReward
    from .config import ProcessRewardConfig
    from .evaluation import evaluate_model
    from .metrics import step_metrics
    from .rollouts import load_rollouts
    from .scoring import ProcessRewardModel
    from .selection import select, top_fraction
    from .splitting import split_steps
    from .step_format import StepFormat
    from .trainer import ProcessRewardTrainer


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module 'trl_mprm' has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)
