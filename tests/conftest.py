import os
import secrets


# Before any Hugging Face import: no hub, no telemetry, and few threads on a small machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Ray is imported, which the doctests do first: nothing is reported, and no token is written to the home folder.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


import json

import pytest
from PIL import Image as PILImage


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, str]:
    """Tiny random models saved to disk, by architecture; built when first asked for."""
    from trl_mprm.models.tiny import tiny_model  # here, so that tests of selection do not wait for torch

    class Folders(dict):
        def __missing__(self, architecture: str) -> str:
            self[architecture] = tiny_model(architecture, tmp_path_factory.mktemp(architecture))
            return self[architecture]

    return Folders()


@pytest.fixture
def corpus(tmp_path):
    """Twelve rollouts of two sources with pictures, and one that is refused."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(3):
        PILImage.new("RGB", (3 + number, 2)).save(folder / f"{number}.png")
    for source in ("AI2D", "GEOS"):
        rows = [
            {"image": f"{i % 3}.png", "question": f"<image>\nq{i}", "answer": "5" if i % 2 else 5}
            | {"steps_with_score": [{"step": "s", "score": (i + j) % 3 / 2, "num_mc_total": 16} for j in range(2)]}
            for i in range(6)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{source}.jsonl").write_text(text + "{\n" * (source == "GEOS"))
    return folder
