"""
How many requests per second does `trl-mprm serve` answer? Against the same server scoring one candidate after the other.

    python recipes/bench/serve.py --json serve.json
    python recipes/bench/serve.py --vllm http://127.0.0.1:8000     # also a vLLM that serves the exported model

A request is one question with its picture and N candidate solutions, each client with questions of its own. Contestants
take turns (ABBA): `ours` runs picture and question once for all candidates, and what arrives together together;
`one by one` runs each candidate from its first token, in the same process behind the same routes. Weights are random,
shapes are those of `score.py`. Then small requests in text show whether memory grows: resident bytes of the server after
the first thousand and after ten thousand.
"""

import sys


sys.path.pop(0)  # this folder, whose select.py would hide the standard library's

import argparse
import importlib.util
import json
import socket
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests
from PIL import Image
from tabulate import tabulate

from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.serving.messages import data_url, pooling_request
from trl_mprm.serving.server import create_app, run


WORDS = "red orange yellow green blue purple pink brown grey total left 0 1 2 3 4 5 6 7 8 9".split()


def build(folder: str, image_tokens: int) -> None:
    """Save the model of `score.py`."""
    spec = importlib.util.spec_from_file_location("score", Path(__file__).with_name("score.py"))
    score = importlib.util.module_from_spec(spec)
    sys.path.insert(0, "")  # which that file takes off again
    spec.loader.exec_module(score)
    score.build("tiny", image_tokens, "cpu").save_pretrained(folder)


def serve(folder: str, port: int, one_by_one: bool) -> None:
    """The process of a server."""
    prm = ProcessRewardModel.from_pretrained(folder)
    if one_by_one:
        together = prm.score_batch
        prm.score_batch = lambda rows: [together([row])[0] for row in rows]
    run(create_app(prm), "127.0.0.1", port)


@contextmanager
def served(folder: str, one_by_one: bool):
    """Address and process of a server that answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, __file__, "--serve", folder, str(port), "one_by_one" if one_by_one else "ours"]
    process, url = subprocess.Popen(argv), f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(f"{url}/health", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def question(number: int, n: int, image_tokens: int, answer_tokens: int) -> dict:
    """One question: a picture of its own and `n` candidates of nine steps."""
    side = 28 * round(image_tokens**0.5)
    image = Image.effect_noise((side, side), 64 + number % 50).convert("RGB")
    length = max(1, answer_tokens // 9 - 1)
    candidates = [
        [
            " ".join(WORDS[(n_ * 7 + step * 3 + at * (1 + n_)) % len(WORDS)] for at in range(length))
            for step in range(9)
        ]
        for n_ in range(n)
    ]
    return {"question": "look at the picture ?", "images": [data_url(image)], "candidates": candidates}


def load(post, bodies: list[dict], clients: int) -> dict[str, float]:
    """Send all requests from so many clients at once; return requests per second, and seconds of the median and the 95th."""
    seconds, errors = [], 0

    def timed(body: dict) -> None:
        nonlocal errors
        start = time.perf_counter()
        try:
            post(body)
        except (requests.RequestException, KeyError) as error:
            print(error, file=sys.stderr)
            errors += 1
        seconds.append(time.perf_counter() - start)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(timed, bodies))
    whole = time.perf_counter() - start
    p95 = statistics.quantiles(seconds, n=20)[-1] if len(seconds) > 1 else seconds[0]
    return {"per_second": len(bodies) / whole, "p50": statistics.median(seconds), "p95": p95, "errors": errors}


def best_of_n(url: str):
    session = requests.Session()

    def post(body: dict) -> None:
        answer = session.post(f"{url}/best_of_n", json=body, timeout=600)
        answer.raise_for_status()

    return post


def memory(url: str, process: psutil.Process, requests_sent: list[int], clients: int = 8) -> dict[int, int]:
    """Resident bytes of the server after so many small requests in text."""
    session, sent, resident = requests.Session(), 0, {}

    def post(number: int) -> None:
        body = {"question": f"how many {number % 97} ?", "candidates": [["red 1", f"total {number % 9}"]]}
        session.post(f"{url}/best_of_n", json=body, timeout=600).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        for goal in requests_sent:
            list(pool.map(post, range(sent, goal)))
            sent, resident[goal] = goal, process.memory_info().rss
    return resident


def vllm_pooling(url: str, step_format: StepFormat):
    session = requests.Session()

    def post(body: dict) -> None:  # vLLM takes one solution per request
        for steps in body["candidates"]:
            request = pooling_request({"prompt": body["question"], "completions": steps}, step_format, "prm")
            image = {"type": "image_url", "image_url": {"url": body["images"][0]}}
            request["messages"][0]["content"] = [image, {"type": "text", "text": body["question"]}]
            session.post(f"{url}/pooling", json=request, timeout=600).raise_for_status()

    return post


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "one_by_one")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=16, help="per contestant, number of clients and turn")
    parser.add_argument("--n", type=int, default=16, help="candidates per question")
    parser.add_argument("--image-tokens", type=int, default=196)
    parser.add_argument("--answer-tokens", type=int, default=63)
    parser.add_argument("--memory", type=int, nargs="*", default=[1000, 10000], help="small requests before each look")
    parser.add_argument("--vllm", help="address of a vLLM that serves the exported model")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        build(folder, args.image_tokens)
        step_format = ProcessRewardModel.from_pretrained(folder).step_format
        bodies = [question(i, args.n, args.image_tokens, args.answer_tokens) for i in range(args.requests)]
        turns: dict[tuple[str, int], list[dict]] = {}
        with served(folder, False) as (ours, process), served(folder, True) as (plain, _):
            contestants = {"ours": best_of_n(ours), "one by one": best_of_n(plain)}
            if args.vllm:
                contestants["vLLM"] = vllm_pooling(args.vllm, step_format)
            for post in contestants.values():
                load(post, bodies[:2], 1)  # warm
            for clients in args.clients:
                for name in [*contestants, *reversed(contestants)]:
                    turns.setdefault((name, clients), []).append(load(contestants[name], bodies, clients))
                print(f"{clients} clients: done", file=sys.stderr)
            resident = memory(ours, process, args.memory)
    rows, results = [], {}
    for (name, clients), measured in turns.items():
        mean = {key: statistics.mean(turn[key] for turn in measured) for key in measured[0]}
        results[f"{name}, {clients} clients"] = mean
        rows.append([name, clients, mean["per_second"], mean["p50"], mean["p95"], mean["errors"]])
    print(tabulate(rows, ["contestant", "clients", "requests/s", "p50 s", "p95 s", "errors"], floatfmt=".3g"))
    ratios = {
        clients: results[f"ours, {clients} clients"]["per_second"]
        / results[f"one by one, {clients} clients"]["per_second"]
        for clients in args.clients
    }
    print()
    for clients, ratio in ratios.items():
        print(f"requests per second, ours / one by one, {clients} clients: {ratio:.2f}")
    for sent, size in resident.items():
        print(f"resident memory of the server after {sent:,} small requests: {size / 1e6:,.0f} MB")
    if args.json:
        report = {"arguments": vars(args), "results": results, "ratios": ratios, "resident_bytes": resident}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
