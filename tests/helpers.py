"""
What several test modules use. Importing it is cheap: torch, transformers and datasets are imported by what needs them,
so that tests of selection start without them.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageDraw


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import BitsAndBytesConfig

    from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer


ARCHITECTURES = ("qwen2_5_vl", "internvl", "qwen2")
TEXT_MODELS = ("qwen2", "llama")


# ---- rollouts


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


def rollouts(architecture: str, n: int = 8) -> list[dict]:
    """Three questions, two of them with pictures; some steps without label; solutions of one to four steps."""
    images = [] if architecture in TEXT_MODELS else [picture("red"), picture("blue", (84, 28))]
    rows = []
    for index in range(n):
        labels = [float((index + number) % 2) if number != 1 else -100.0 for number in range(1 + index % 4)]
        steps = [f"step {number} of {index}" for number in range(len(labels))]
        prompt = f"How many tiles, question {index % 3}?"
        row = {"images": images if index % 3 else [], "prompt": prompt, "completions": steps, "labels": labels}
        rows.append({**row, "rollout_id": f"r:{index}", "source": "ab"[index % 2]})
    return rows


def as_dataset(rows: list[dict]) -> Dataset:
    """Rows as a dataset whose columns have their types also where every list is empty."""
    import datasets
    from datasets import Dataset, Features, List, Value

    text, steps = Value("string"), {"completions": List(Value("string")), "labels": List(Value("float64"))}
    names = {"images": List(datasets.Image()), "prompt": text, **steps, "source": text, "rollout_id": text}
    return Dataset.from_list(rows, features=Features(names))


def dataset(architecture: str, n: int = 8) -> Dataset:
    return as_dataset(make_rows(images=architecture != "qwen2", n=n))


# ---- training


def nf4() -> BitsAndBytesConfig:
    """4-bit weights as QLoRA has them, computed in float32 for a CPU."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def config(folder, **kwargs) -> ProcessRewardConfig:
    from trl_mprm import ProcessRewardConfig

    defaults = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "warmup_steps": 0,
    }
    return ProcessRewardConfig(str(folder), **{**defaults, **kwargs})


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trainer_scores(trainer: ProcessRewardTrainer, rows: list[dict]) -> list[list[float]]:
    from trl_mprm import ProcessRewardModel

    return ProcessRewardModel(trainer.model, trainer.processing_class, trainer.step_format).score_batch(rows)


def flat(scores: list[list[float]]) -> list[float]:
    return [score for row in scores for score in row]


def make_trainer(tiny_folders, architecture, tmp_path, rows, peft_config=None, quantization_config=None, **kwargs):
    from datasets import Dataset

    from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer

    settings = {"per_device_train_batch_size": 8, "report_to": [], "use_cpu": True, "logging_steps": 1, **kwargs}
    args = ProcessRewardConfig(str(tmp_path), **settings)
    return ProcessRewardTrainer(
        tiny_folders[architecture], args, train_dataset=Dataset.from_list(rows), peft_config=peft_config
    )


# ---- backbones


@dataclass(frozen=True)
class Backbone:
    """What differs: the table of recipes/train.md, one line a backbone."""

    decoder: str
    quantised: int
    encoder: str | None
    projector: tuple[str, ...]
    image: str
    positions: str
    wrap: str

    def projector_of(self, name: str) -> str:
        return next((projector for projector in self.projector if name.startswith(projector)), name)


# Decoder (all of its linear layers are what QLoRA quantises, and LoRA adapts), vision encoder (frozen), projector and
# kin (trained in full fine-tuning), placeholder of an image in the prompt, positions, class that FSDP wraps.
FACTS = {
    "qwen2_5_vl": Backbone(
        "model.language_model",
        14,
        "model.visual",
        ("model.visual.merger",),
        "<|image_pad|>",
        "M-RoPE",
        "Qwen2_5_VLDecoderLayer",
    ),
    "qwen3_vl": Backbone(
        "model.language_model",
        14,
        "model.visual",
        ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "<|image_pad|>",
        "M-RoPE",
        "Qwen3VLTextDecoderLayer",
    ),
    "internvl": Backbone(
        "model.language_model",
        14,
        "model.vision_tower",
        ("model.multi_modal_projector",),
        "<IMG_CONTEXT>",
        "RoPE",
        "Qwen2DecoderLayer",
    ),
    "internvl_llama": Backbone(
        "model.language_model",
        14,
        "model.vision_tower",
        ("model.multi_modal_projector",),
        "<IMG_CONTEXT>",
        "RoPE",
        "LlamaDecoderLayer",
    ),
    "idefics3": Backbone(
        "model.text_model", 14, "model.vision_model", ("model.connector",), "<image>", "RoPE", "LlamaDecoderLayer"
    ),
    "llava_onevision": Backbone(
        "model.language_model",
        14,
        "model.vision_tower",
        ("model.multi_modal_projector", "model.image_newline"),
        "<image>",
        "RoPE",
        "Qwen2DecoderLayer",
    ),
    "gemma3": Backbone(
        "model.language_model",
        14,
        "model.vision_tower",
        ("model.multi_modal_projector",),
        "<start_of_image>",
        "RoPE, two bases",
        "Gemma3DecoderLayer",
    ),
    "qwen2": Backbone("model", 14, None, (), "", "RoPE", "Qwen2DecoderLayer"),
    "llama": Backbone("model", 14, None, (), "", "RoPE", "LlamaDecoderLayer"),
}


# ---- benchmarks and a scorer


def record(steps, labels, **changes):
    return {
        "image": ["images/red.png"],
        "question": "How many?",
        "answer": "2",
        "response": {"steps": steps, "process_correctness": labels},
        "policy_model": "GPT-4o",
        "data_source": "DynaMath",
        **changes,
    }


GOOD = record(["good", "bad"], [1, -1])


def write(folder, *records):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def processbench(folder, **changes):
    from trl_mprm.evaluation.benchmarks import BENCHMARKS

    row = {"id": "gsm8k-0", "generator": "Qwen2-7B-Instruct", "problem": "2+2?", "steps": ["a", "b", "c"], "label": 1}
    for name in BENCHMARKS["processbench"].files:
        stem = name.removesuffix(".json")
        (folder / name).write_text(json.dumps([{**row, "id": f"{stem}-0", "final_answer_correct": False}]))
    rows = [row, {**row, "id": "gsm8k-1", "label": -1}, {**row, "id": "gsm8k-2", **changes}]
    (folder / "gsm8k.json").write_text(json.dumps(rows))
    return folder


def best_of_n_line(*candidates, **changes):
    return {"question": "How many?", "images": ["images/red.png"], "candidates": list(candidates), **changes}


def items_of(n, group_size=2):
    return [
        {
            "id": f"a:{index}",
            "images": [],
            "prompt": f"question {index // group_size}",
            "completions": ["good", "bad"][: 1 + index % 2],
            "labels": [1, -1][: 1 + index % 2],
            "source": "ab"[(index // group_size) % 2],
            "group": f"g{index // group_size}",
        }
        for index in range(n)
    ]


class Steady:
    """The same scores for the same rows, after `seconds`; `log` gets a line for each row."""

    def __init__(self, log, seconds=0.0):
        self.log, self.seconds = log, seconds

    def score_batch(self, rows, batch_size=8):
        time.sleep(self.seconds)
        with open(self.log, "a") as log:
            log.writelines(row["rollout_id"] + "\n" for row in rows)
        return [[(len(row["prompt"]) * 7 + n) % 10 / 10 for n in range(len(row["completions"]))] for row in rows]


# ---- processes


# One process that has imported the libraries; each child is a fork of it.
FORKSERVER = multiprocessing.get_context("forkserver")


def run_processes(function: Callable, *args: Any, n: int = 1, log: Path) -> list[int]:
    """Run `function(*args)` in `n` processes that know of each other as under a launcher; return their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in launcher.items()} if n > 1 else {}
        child = FORKSERVER.Process(target=_child, args=(function, args, environment, str(log)))
        child.start()
        children.append(child)
    for child in children:
        child.join(100)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung, f"{len(hung)} processes hung: {log.read_text()[-3000:]}"
    return [child.exitcode for child in children]


def _child(function: Callable, args: tuple, environment: dict[str, str], log: str) -> None:
    import torch

    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    torch.set_num_threads(1)
    try:
        function(*args)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# ---- Hubs on this machine


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


class ReadHub(BaseHTTPRequestHandler):
    """The few answers of a ReadHub that a client needs to read the files of one public dataset."""

    files = {}
    sha = "a" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}").get("paths", [])
        self.answer(json.dumps([self.entry(name) for name in wanted if name in self.files]).encode())

    def listed(self, path):
        """Files below a folder, or with `recursive=false` what lies in it."""
        _, _, folder = path.partition("/tree/")[2].partition("/")
        below = {name for name in self.files if name.startswith(folder)}
        if "recursive=false" not in self.path:
            return sorted(below)
        start = len(folder) + 1 if folder else 0
        return sorted({name[:start] + name[start:].split("/")[0] for name in below})

    def entry(self, name):
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": self.sha}
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": self.sha}

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            self.answer(self.files.get(name), code="EntryNotFound")
        elif path.startswith("/api/datasets/org/rollouts"):
            entries = [self.entry(name) for name in self.listed(path)]
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/rollouts", "sha": self.sha, "siblings": siblings, "private": False, "tags": []}
            info["cardData"] = {"license": "mit"}
            self.answer(json.dumps(entries if "/tree/" in path else info).encode())
        else:
            self.answer(None, code="RepoNotFound")

    def answer(self, body, code=""):
        self.send_response(404 if body is None else 200)
        for name, value in {
            "X-Error-Code": code if body is None else "",
            "X-Repo-Commit": self.sha,
            "ETag": f'"{hash(body)}"',
            "Content-Length": str(len(body or b"")),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


PUSH = """
import sys
from trl_mprm.selection.files import select_files
select_files(sys.argv[1], sys.argv[2], "mixed", fraction=0.5, seed=4, push_to_hub="someone/kept-rollouts")
"""


class CommitHub(BaseHTTPRequestHandler):
    """The dataset side of the commit API: small files inline, large ones by LFS; `commits[n][path] = bytes`."""

    commits: list[dict[str, bytes]]
    lfs: dict[str, bytes]

    def do_GET(self):
        self._answer({"name": "someone", "auth": {"accessToken": {"role": "write"}}})

    def do_PUT(self):
        self.lfs[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer({})

    def do_POST(self):
        body = self._body()
        if self.path.endswith("/repos/create"):
            assert json.loads(body)["type"] == "dataset"
            self._answer({"url": f"{self._address()}/datasets/someone/kept-rollouts"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(".parquet") else "regular") for name in names]
            self._answer({"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{self._address()}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            values = [json.loads(line) for line in body.splitlines()]
            files = {v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in values if v["key"] == "file"}
            files |= {v["value"]["path"]: self.lfs[v["value"]["oid"]] for v in values if v["key"] == "lfsFile"}
            self.commits.append(files)
            url = f"{self._address()}/datasets/someone/kept-rollouts/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:  # validation of the card
            self._answer({"warnings": [], "errors": []})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, value: dict) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args) -> None:
        pass


class Served:
    """A server in a thread of this process, on a free port."""

    def __init__(self, app, protocol=None):
        import uvicorn

        from trl_mprm.serving.limits import BoundedConnections

        self.server = uvicorn.Server(
            uvicorn.Config(app, port=0, http=protocol or BoundedConnections, log_level="critical")
        )
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def write_jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path
