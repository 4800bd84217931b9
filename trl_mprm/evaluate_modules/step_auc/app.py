"""Widget of the metric in a Space of the Hub."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


if __name__ == "__main__":
    launch_gradio_widget(evaluate.load(str(Path(__file__).parent / "step_auc.py")))
