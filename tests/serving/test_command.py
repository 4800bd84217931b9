"""`trl-mprm serve` as a process: it answers, finishes what is under way when it is told to stop, and says what is wrong."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from trl_mprm import StepFormat
from trl_mprm.cli import main
from trl_mprm.serving.messages import pooling_request


@pytest.mark.slow
def test_a_served_folder_answers_and_stops(prm, tmp_path):
    prm.save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "trl_mprm.cli", "serve", str(tmp_path / "model"), "--port", str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 200
    while True:
        try:
            assert requests.get(f"{url}/health", timeout=5).ok
            break
        except requests.ConnectionError:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.2)
    row = {"prompt": "How many?", "completions": ["one is red", "So 1."]}
    body = pooling_request(row, StepFormat(), "prm")
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(requests.post, f"{url}/pooling", json=body, timeout=60) for _ in range(16)]
        while not any(job.done() for job in jobs):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        answers = [job.exception() or job.result() for job in jobs]
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in err
    answered = [answer for answer in answers if isinstance(answer, requests.Response)]
    assert answered and all(answer.status_code == 200 for answer in answered)  # none is cut off in the middle
    good = [pair[1] for pair in answered[0].json()["data"][0]["data"]]
    assert good == pytest.approx(prm.score_batch([row])[0], abs=1e-6)
    assert f"POST {url}/pooling" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: set a key (--api-key, or TRL_MPRM_API_KEY)"),
        (["--image-root", "no-such-folder"], "--image-root no-such-folder: no such folder"),
        ([], "no/such-model/here: no such folder"),
    ],
)
def test_mistakes_are_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.delenv("TRL_MPRM_API_KEY", raising=False)
    assert main(["serve", "no/such-model/here", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(prm, tmp_path, capsys, monkeypatch):
    prm.save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "model"), "--port", str(port)]) == 2
    assert f"error: 127.0.0.1:{port} is in use: name another --port" in capsys.readouterr().err
