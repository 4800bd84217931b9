"""The same answers from a model behind a server as from one in this process, and what a server can do wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from datasets import Dataset
from helpers import Served, picture
from trl import GRPOConfig, GRPOTrainer

from trl_mprm import RemoteProcessRewardModel
from trl_mprm.cli import main
from trl_mprm.evaluation.fingerprint import fingerprint
from trl_mprm.serving.server import create_app


@pytest.fixture(scope="module")
def remote(prm):
    with Served(create_app(prm)) as server:
        yield RemoteProcessRewardModel(server.url)


QUESTION = ([picture("red"), picture("blue", (84, 28))], "How many?")
CANDIDATES = [["one is red", "So 1."], ["two are red"], ["none\nat all", "So 0.", "Answer: 0"]]


def test_the_same_answers(prm, remote):
    rows = [{"images": QUESTION[0], "prompt": QUESTION[1], "completions": steps} for steps in CANDIDATES]
    rows.append({"prompt": "no picture?", "completions": ["none"]})
    rows.append({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]})
    rows[-1]["completions"] = ["yes"]
    for own, expected in zip(remote.score_batch(rows), prm.score_batch(rows), strict=True):
        assert own == pytest.approx(expected, abs=1e-6)
    assert remote.score(*QUESTION, CANDIDATES[0]) == pytest.approx(prm.score(*QUESTION, CANDIDATES[0]), abs=1e-6)
    ranking, expected = remote.best_of_n(*QUESTION, CANDIDATES, "min"), prm.best_of_n(*QUESTION, CANDIDATES, "min")
    assert [one.index for one in ranking] == [one.index for one in expected]
    prompts, completions = ["How many?"] * 3, ["One.\n\nSo 1.", "", "word " * 5000]
    own, there = remote.as_reward_func(), prm.as_reward_func()
    assert own(prompts, completions)[0] == pytest.approx(there(prompts, completions)[0], abs=1e-6)
    assert own(prompts, completions)[1:] == [0.0, None] and own.__name__ == "prm_mean"
    (steps,) = remote.step_rewards(prompts[:1], completions[:1])
    assert [(step.start, step.end) for step in steps] == [(0, 4), (6, 11)]
    assert remote.reads_images and remote.name == "prm"


def test_a_row_that_is_refused_is_named(remote):
    row = {"prompt": "?", "completions": ["a"], "rollout_id": "geo:7"}
    with pytest.raises(ValueError, match=r"row geo:7: the server refused the row: a solution has \d+ tokens of text"):
        remote.score_batch([row | {"completions": ["word " * 20000]}])
    with pytest.raises(ValueError, match="row geo:7: step 0 contains the marker"):
        remote.score_batch([row | {"completions": ["a<prm>"]}])
    with pytest.raises(ValueError, match="row geo:7: cannot read image"):
        remote.score_batch([row | {"images": ["no-such.png"]}])


def test_two_steps_of_grpo_with_the_model_behind_http(remote, tiny_folders, tmp_path):
    answers = []
    own = remote.as_reward_func()

    def counted(*args, **kwargs):
        answers.extend(own(*args, **kwargs))
        return answers[-len(kwargs.get("completions", args[1] if len(args) > 1 else [])) :]

    args = GRPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=8,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(tiny_folders["qwen2"], counted, args, Dataset.from_dict({"prompt": ["How many?"] * 4}))
    trainer.train()
    assert trainer.state.global_step == 2 and len(answers) == 4
    assert all(reward is None or 0 <= reward <= 1 for reward in answers)


class Odd(BaseHTTPRequestHandler):
    """A server that is busy twice, then says what its class says."""

    answers: dict[str, tuple[int, object]] = {}
    busy = 0

    def do_GET(self):
        self.send(200, {"data": [{"id": "prm"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if type(self).busy:
            type(self).busy -= 1
            self.send(503, {"error": {"message": "busy"}}, {"Retry-After": "0"})
        else:
            self.send(*self.answer)

    def send(self, status, content, headers=()):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("busy", "answer", "error", "message"),
    [
        (2, (200, {"data": [{"data": [[0.75, 0.25]]}]}), None, ""),
        (9, (200, {}), ConnectionError, "is still busy after all retries"),
        (
            0,
            (200, {"data": [{"data": [0.1, 0.2, 0.3]}]}),
            RuntimeError,
            "sent 3 values for 1 steps, expected one pair",
        ),
        (0, (200, {"data": [{"data": [[0.1, 0.9]] * 4}]}), RuntimeError, "sent 4 values for 1 steps"),
        (0, (401, {"error": {"message": "no key"}}), ConnectionError, "answered 401: no key"),
        (0, (500, b"<html>oops"), ConnectionError, "answered 500: <html>oops"),
        (0, (200, b"<html>"), ConnectionError, "did not answer in JSON"),
        (
            0,
            (400, {"error": {"message": "too\nlong"}}),
            ValueError,
            "row 0 of the batch: the server refused the row: too long",
        ),
    ],
)
def test_odd_servers(busy, answer, error, message):
    handler = type("Handler", (Odd,), {"answer": answer, "busy": busy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote = RemoteProcessRewardModel(f"http://127.0.0.1:{server.server_port}", retries=3)
        remote.session.get_adapter("http://").max_retries.backoff_factor = 0.01
        rows = [{"prompt": "?", "completions": ["a"]}]
        if error is None:
            assert remote.score_batch(rows) == [[0.25]]
        else:
            with pytest.raises(error, match=message):
                remote.score_batch(rows)
    finally:
        server.shutdown()
        server.server_close()


def test_addresses_and_names(remote):
    with pytest.raises(ValueError, match="url is '127.0.0.1:8000', expected the address of a server"):
        RemoteProcessRewardModel("127.0.0.1:8000")
    with pytest.raises(ValueError, match="offers no model 'other', only prm"):
        RemoteProcessRewardModel(remote.url, model="other")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        RemoteProcessRewardModel("http://127.0.0.1:9", retries=0)


def test_commands_speak_to_a_server(prm, remote, tmp_path, capsys):
    argv = ["score", "prm", "--url", remote.url, "--question", "How many?", "--step", "One.", "--step", "So 1."]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"{score:.4g}" in shown for score in prm.score([], "How many?", ["One.", "So 1."]))
    assert main(["score", "other", *argv[2:]]) == 2
    assert "offers no model 'other', only prm" in capsys.readouterr().err
    line = {"id": "a-0", "generator": "m", "problem": "How many?", "steps": ["One.", "So 1."], "label": 1}
    (tmp_path / "gsm8k.json").write_text(json.dumps([line, line | {"id": "a-1", "label": -1}]))
    argv = ["evaluate", "--url", remote.url, "--benchmark", "processbench", "--data", str(tmp_path / "gsm8k.json")]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert records[0]["scores"] == pytest.approx(prm.score([], "How many?", ["One.", "So 1."]), abs=1e-6)


def test_another_model_behind_the_same_address_is_not_taken_for_this_one(prm, remote):
    head = prm.model.get_output_embeddings().weight
    before = fingerprint(remote, [], 8)
    assert fingerprint(remote, [], 8) == before
    with torch.no_grad():
        head[prm.step_ids.good] += 1
        changed = fingerprint(remote, [], 8)
        head[prm.step_ids.good] -= 1
    assert changed != before
