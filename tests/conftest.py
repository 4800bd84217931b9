import os
import secrets


# Before any Hugging Face import: no hub, no telemetry, and few threads on a small machine.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Ray is imported, which the doctests do first: nothing is reported, and no token is written to the home folder.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, ImageDraw

from trl_mprm.tiny import tiny_model


ARCHITECTURES = ("qwen2_5_vl", "internvl", "qwen2")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, str]:
    """Tiny random models saved to disk, by architecture; built when first asked for."""

    class Folders(dict):
        def __missing__(self, architecture: str) -> str:
            self[architecture] = tiny_model(architecture, tmp_path_factory.mktemp(architecture))
            return self[architecture]

    return Folders()


def picture(color: str, size: tuple[int, int] = (56, 56)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle([8, 8, 40, 40], fill=color)
    return image


def make_rows(images: bool, n: int = 8) -> list[dict]:
    """Rollouts of one to four steps; with pictures, every third row has none and every fourth has two."""
    rows = []
    for index in range(n):
        steps = [f"the tile {number} is {'red' if number % 2 else 'blue'}" for number in range(1 + index % 4)]
        pictures = [] if index % 3 == 2 else [picture("red")] + [picture("blue", (56, 28))] * (index % 4 == 3)
        rows.append(
            {
                "images": pictures if images else [],
                "prompt": f"How many tiles of {index}?",
                "completions": steps,
                "labels": [
                    (1 + (index + number) % 4) / 4 if "red" in step else 0.0 for number, step in enumerate(steps)
                ],
                "source": "ab"[index % 2],
                "rollout_id": f"{'ab'[index % 2]}:{index}",
            }
        )
    return rows


@contextmanager
def hub_on_this_machine(handler: type[BaseHTTPRequestHandler], home) -> Iterator[dict[str, str]]:
    """Serve `handler`; yield the environment of a process that takes it for the Hub (the address is read at import)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    try:
        yield clean | switches | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home)}
    finally:
        server.shutdown()
        server.server_close()
