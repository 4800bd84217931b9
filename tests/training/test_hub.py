"""Publishing with the real huggingface_hub client, against a server on this machine that speaks the commit API."""

import base64
import json
import subprocess
import sys

import pytest
from datasets import Dataset
from helpers import CommitHub, hub_on_this_machine, make_rows


TOKEN = "hf_" + "secret" * 5
TRAIN = """
import sys
from datasets import load_from_disk
from peft import LoraConfig
from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer

trainer = ProcessRewardTrainer(
    model=sys.argv[1],
    args=ProcessRewardConfig(
        sys.argv[3], hub_model_id="someone/tiny-mprm", push_to_hub=True, hub_token=sys.argv[4], report_to="none",
        use_cpu=True, per_device_train_batch_size=4, save_strategy="steps", save_steps=1,
    ),
    train_dataset=load_from_disk(sys.argv[2]),
    peft_config=LoraConfig(r=4),
)
trainer.train()
trainer.push_to_hub(dataset_name="org/rollouts", license="mit")
"""


class Hub(CommitHub):
    """The model side of the commit API: takes every file inline."""

    def do_POST(self):
        body = self._body()
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{self._address()}/someone/tiny-mprm"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            values = [json.loads(line) for line in body.splitlines()]
            files = [value["value"] for value in values if value["key"] == "file"]
            self.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            url = f"{self._address()}/someone/tiny-mprm/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:  # validation of the card
            self._answer({"warnings": [], "errors": []})


@pytest.mark.slow
def test_push_to_hub(tiny_folders, tmp_path):
    handler = type("OneHub", (Hub,), {"commits": []})
    rows = [{key: row[key] for key in ("prompt", "completions", "labels")} for row in make_rows(images=False)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    argv = [sys.executable, "-c", TRAIN, tiny_folders["qwen2"], tmp_path / "rows", tmp_path / "out", TOKEN]
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(handler.commits) >= 2  # while training, and at the end
    needed = {"README.md", "adapter_model.safetensors", "adapter_config.json", "process_reward_config.json"}
    for commit in handler.commits:
        assert not [name for name in commit if name.endswith((".bin", ".pt", ".pth"))]
        for secret in (TOKEN, str(tmp_path), tiny_folders["qwen2"]):
            assert not [name for name, content in commit.items() if secret.encode() in content]
    for commit in (handler.commits[0], handler.commits[-1]):
        assert needed <= set(commit)
    card = handler.commits[-1]["README.md"].decode()
    assert "license: mit" in card and "datasets: org/rollouts" in card
    assert 'from_pretrained("someone/tiny-mprm", base_model="' in card  # its base is in a local folder
    assert str(tmp_path) not in card
