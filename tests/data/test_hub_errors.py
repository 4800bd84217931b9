"""Whatever the Hub does, a user reads one line; what an earlier run fetched is used."""

import json
import subprocess
import sys
import time

import pytest
from helpers import ReadHub, hub_on_this_machine
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trl_mprm.data.hub import is_hub_id


NAMES = [
    *(
        "Qwen/ProcessBench",
        "a/b",
        "org/name.v2",
        "org/na_me-1",
        "a" * 96 + "/b",
        "a" * 97 + "/b",
        "org/-name",
        "org/name-",
    ),
    *(
        "org/.name",
        "org/a--b",
        "org/a..b",
        "org/name.git",
        "org/",
        "/name",
        "org/a b",
        "org/é",
        "a/b/c",
        "../name",
        "./n",
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_an_id_is_what_the_hub_takes_for_one(name):
    try:
        validate_repo_id(name)
        valid = True
    except HFValidationError:
        valid = False
    assert is_hub_id(name) == valid


@pytest.mark.parametrize("name", ["gpt2", "raw/AI2D.jsonl", "raw/AI2D.parquet", "a/b.zip", "a/b.json", 5, None])
def test_names_that_are_no_id_of_ours(name):
    assert not is_hub_id(name)


def test_what_is_here_is_no_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")


class BrokenHub(ReadHub):
    """A Hub that works until `mode` names a way of being broken."""

    mode = ""
    files = {"annotations.zip": b"PK\x05\x06" + b"\0" * 18}

    def do_GET(self):
        if self.path.startswith("/mode/"):
            type(self).mode = self.path.removeprefix("/mode/")
            self.answer(b"")
        elif not self.mode or (self.mode == "cut" and "/resolve/" not in self.path):
            super().do_GET()
        else:
            getattr(self, self.mode)()

    def do_HEAD(self):
        self.do_GET() if self.mode != "cut" else super().do_GET()

    def closed(self):
        self.close_connection = True

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("ETag", '"x"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        self.wfile.write(b"PK")

    def silent(self):
        time.sleep(5)

    def page(self):
        self.answer(b"<html>Please log in to this network.</html>")

    def listing(self):
        self.answer(b"[]")

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def gated(self):
        self.refuse(403, "GatedRepo")

    def private(self):
        self.refuse(401, "RepoNotFound")

    def down(self):
        self.refuse(503, "")


MODES = {
    "closed": "no such file or folder here, and the Hub cannot be reached or breaks off (Server disconnected",
    "cut": "no such file or folder here, and the Hub cannot be reached or breaks off (",
    "silent": "no such file or folder here, and the Hub cannot be reached or breaks off (",
    "page": "the answer of the Hub cannot be read (Expecting value",
    "listing": "the answer of the Hub cannot be read (",
    "gated": "access to this dataset must be requested at https://huggingface.co/datasets/org/rollouts; you are not logged",
    "private": "no such file or folder here, and no such dataset on the Hub, or a private one; you are not logged in: hf",
    "down": "the Hub answers 503 Service Unavailable: try again later",
}

ASK = """
import json, os, sys, urllib.request
from trl_mprm.data import hub
hub.TIME_LIMIT = 0.5
def mode(name):
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(os.environ["HF_ENDPOINT"] + "/mode/" + name).read()
def ask():
    try:
        return str(hub.hub_annotations.__wrapped__("org/rollouts"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
answers = {}
for name in json.loads(sys.argv[1]):
    mode(name)
    answers[name] = ask()
mode("")
there = ask()
for name in json.loads(sys.argv[1]):
    mode(name)
    assert ask() == there, (name, ask())
print(json.dumps([there, answers]))
"""


def test_every_way_of_being_broken_is_one_line_and_the_cache_is_used(tmp_path):
    handler = type("OneHub", (BrokenHub,), {})
    with hub_on_this_machine(handler, tmp_path / "home") as env:
        command = [sys.executable, "-c", ASK, json.dumps(list(MODES))]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    there, answers = json.loads(done.stdout.splitlines()[-1])
    assert there.endswith("annotations.zip")
    for mode, words in MODES.items():
        assert answers[mode].startswith(f"FileNotFoundError: org/rollouts: {words}"), mode
        assert "\n" not in answers[mode]
    # of a download that is cut short nothing is noticed where nothing is left to download
    assert done.stderr.count("using the copy that an earlier run fetched") == len(MODES) - 1
