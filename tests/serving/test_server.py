"""Our server over real HTTP on this machine: the scores of the model, and every way in which a client can be a burden."""

import base64
import io
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from helpers import Served, picture
from PIL import Image

from trl_mprm import StepFormat
from trl_mprm.serving.limits import BoundedConnections
from trl_mprm.serving.messages import data_url, pooling_request
from trl_mprm.serving.pictures import Limits, Pictures
from trl_mprm.serving.server import create_app


SMALL = Limits(body_bytes=200_000, body_seconds=0.5, images=2, image_pixels=10_000, tokens=60, candidates=4, waiting=6)


@pytest.fixture(scope="module")
def served(prm, tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    picture("red").save(root / "red.png")
    (root.parent / "secret.png").write_bytes((root / "red.png").read_bytes())
    with Served(create_app(prm, limits=SMALL, pictures=Pictures(SMALL, str(root)), ui=True)) as server:
        yield server


def row(**change):
    return {"images": [picture("red")], "prompt": "How many?", "completions": ["one is red", "So 1."]} | change


def test_scores_are_those_of_the_model(prm, served):
    for one in (row(), row(images=[], completions=["alone"]), row(images=[picture("red"), picture("blue", (84, 28))])):
        answer = requests.post(
            f"{served.url}/pooling", json=pooling_request(one, StepFormat(), "prm"), timeout=30
        ).json()
        pairs = answer["data"][0]["data"]
        assert [good for _, good in pairs] == pytest.approx(prm.score_batch([one])[0], abs=1e-6)
        assert [bad + good for bad, good in pairs] == pytest.approx([1.0] * len(pairs))
    named = row(images=[])
    body = pooling_request(named, StepFormat(), "prm")
    url = {"type": "image_url", "image_url": {"url": "red.png"}}
    body["messages"][0]["content"] = [url, {"type": "text", "text": "How many?"}]
    pairs = requests.post(f"{served.url}/pooling", json=body, timeout=30).json()["data"][0]["data"]
    assert [good for _, good in pairs] == pytest.approx(prm.score_batch([row()])[0], abs=1e-6)


def test_best_of_n(prm, served):
    candidates = [["one is red", "So 1."], "two are red\n\nSo 2.", ["none"]]
    body = {
        "question": "How many?",
        "images": [data_url(picture("red"))],
        "candidates": candidates,
        "aggregate": "min",
    }
    ranking = requests.post(f"{served.url}/best_of_n", json=body, timeout=30).json()["ranking"]
    expected = prm.best_of_n([picture("red")], "How many?", candidates, aggregate="min", split="blank_line")
    assert [entry["index"] for entry in ranking] == [candidate.index for candidate in expected]
    assert [entry["score"] for entry in ranking] == pytest.approx(
        [candidate.score for candidate in expected], abs=1e-6
    )
    assert ranking[0]["steps"] == (
        ["two are red", "So 2."] if ranking[0]["index"] == 1 else candidates[ranking[0]["index"]]
    )


def test_what_arrives_together_is_scored_together(prm):
    """While the model works on the first request, six of one question come; their picture is encoded once."""
    busy, release, calls = threading.Event(), threading.Event(), []

    def score_batch(rows):
        calls.append(len(rows))
        busy.set()
        assert len(calls) > 1 or release.wait(20)
        return own(rows)

    own, encoded = prm.score_batch, []
    prm.score_batch = score_batch
    hook = prm.model.get_encoder("image").register_forward_hook(lambda *_: encoded.append(1))
    try:
        with Served(create_app(prm)) as server, ThreadPoolExecutor(8) as pool:
            bodies = [pooling_request(row(completions=[f"{n} are red"]), StepFormat(), "prm") for n in range(7)]
            post = lambda body: requests.post(f"{server.url}/pooling", json=body, timeout=60).json()  # noqa: E731
            first = pool.submit(post, bodies[0])
            assert busy.wait(20)
            rest = [pool.submit(post, body) for body in bodies[1:]]
            while "trl_mprm_waiting 6.0" not in requests.get(f"{server.url}/metrics", timeout=30).text:
                time.sleep(0.02)
            release.set()
            answers = [job.result()["data"][0]["data"][0][1] for job in (first, *rest)]
    finally:
        hook.remove()
        del prm.score_batch
    assert calls == [1, 6] and len(encoded) == 2
    expected = [scores[0] for scores in prm.score_batch([row(completions=[f"{n} are red"]) for n in range(7)])]
    assert answers == pytest.approx(expected, abs=1e-6)


def bomb() -> str:
    """A PNG of a few hundred bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def with_image(url):
    body = pooling_request(row(images=[]), StepFormat(), "prm")
    body["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return body


def with_steps(content):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}


LARGE = data_url(Image.new("RGB", (200, 60)))
BAD = [
    (with_image(bomb()), "pixels"),
    (with_image(LARGE), "an image has 200 x 60 pixels, at most 10,000 are read"),
    (with_image("data:image/png;base64,AAAA"), "not a whole picture"),
    (with_image("data:image/png;base64,!"), "not valid base64"),
    (with_image("data:text/html,<b>"), "expected data:image/png;base64"),
    (with_image("../secret.png"), "image_outside_root"),
    (with_image("file:///etc/passwd"), "image_missing"),
    (with_image("http://127.0.0.1:1/a.png"), "images are not fetched from 127.0.0.1"),
    (
        with_steps("no marker at all"),
        "expected the marker '<prm>' after every step, got an assistant turn without one",
    ),
    (with_steps("one<prm>\n\nunfinished"), "the last step has none"),
    (with_steps("<prm>"), "step 0 is '', expected text"),
    (with_steps("word " * 80 + "<prm>"), "tokens of text, at most 60 are read: shorten it"),
    ({"messages": [{"role": "user", "content": "?"}]}, "expected a user turn with the question"),
    ({"messages": [{"role": "tool", "content": "?"}]}, "messages.0.role"),
    ({"messages": with_steps("a<prm>")["messages"], "task": "embed"}, "task"),
    ({}, "messages"),
    ([], "the body"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_a_bad_request_gets_one_sentence(body, message, served):
    answer = requests.post(f"{served.url}/pooling", json=body, timeout=30)
    text = answer.json()["error"]["message"]
    assert answer.status_code == 400 and message in text and "\n" not in text
    assert str(served.port) not in text and "/tmp" not in text


def test_bad_candidates(served):
    def post(**change):
        answer = requests.post(
            f"{served.url}/best_of_n", json={"question": "?", "candidates": ["a"]} | change, timeout=30
        )
        return answer.status_code, answer.json()["error"]["message"]

    assert post(candidates=[]) == (400, "candidates: List should have at least 1 item after validation, not 0")
    assert post(candidates=["a"] * 5) == (400, "5 candidates came, at most 4 are ranked")
    assert post(images=["x"] * 3) == (400, "3 images came, at most 2 are read")
    assert post(aggregate="median")[0] == 400 and post(candidates=["a", " "])[0] == 400
    assert post(split="words")[0] == 400


def test_other_routes(served):
    assert requests.get(f"{served.url}/health", timeout=30).json() == {"status": "ok"}
    (model,) = requests.get(f"{served.url}/v1/models", timeout=30).json()["data"]
    assert (model["id"], model["step_marker"], model["reads_images"]) == ("prm", "<prm>", True)
    body = pooling_request(row(images=[]), StepFormat(), "another")
    answer = requests.post(f"{served.url}/pooling", json=body, timeout=30)
    assert answer.status_code == 404 and "only 'prm'" in answer.json()["error"]["message"]
    text = requests.get(f"{served.url}/metrics", timeout=30).text
    assert re.search(r'trl_mprm_requests_total\{route="/pooling",status="404"\} 1', text)
    assert requests.get(f"{served.url}/nowhere/{'x' * 50}", timeout=30).status_code == 404
    assert 'route="other"' in requests.get(f"{served.url}/metrics", timeout=30).text
    assert "Score the steps" in requests.get(served.url, timeout=30).text
    assert requests.get(f"{served.url}/openapi.json", timeout=30).json()["info"]["title"] == "trl-mprm"


def test_a_key_is_asked_for(prm):
    with Served(create_app(prm, api_key="k3y")) as server:
        body = pooling_request(row(images=[]), StepFormat(), "prm")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "k3y2"}):
            assert requests.post(f"{server.url}/pooling", json=body, headers=headers, timeout=30).status_code == 401
        headers = {"Authorization": "Bearer k3y"}
        assert requests.post(f"{server.url}/pooling", json=body, headers=headers, timeout=30).status_code == 200
        assert requests.get(f"{server.url}/metrics", timeout=30).status_code == 401
        assert requests.get(f"{server.url}/health", timeout=30).status_code == 200


def raw(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(data)
    connection.settimeout(20)
    return connection


def test_large_and_slow_requests_are_given_up(served):
    head = b"POST /pooling HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    # a gigabyte that is announced is refused before it comes; one that is not announced, when it is too much
    assert b" 413 " in raw(served.port, head + b"Content-Length: 1073741824\r\n\r\n{").recv(100)
    endless = raw(served.port, head + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(30):
        try:
            endless.sendall(b"2710\r\n" + b" " * 10000 + b"\r\n")
        except OSError:  # closed while we were still writing
            break
    assert b" 413 " in endless.recv(100)
    assert b" 408 " in raw(served.port, head + b'Content-Length: 100\r\n\r\n{"mess').recv(100)
    assert requests.get(f"{served.url}/health", timeout=30).status_code == 200


def test_connections_are_bounded(prm):
    class Few(BoundedConnections):
        most, seconds = 5, 1.0

    with Served(create_app(prm), Few) as server:
        idle = [raw(server.port, b"POST /pooling HT") for _ in range(5)]
        beyond = raw(server.port, b"")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # closed at once
            beyond.sendall(b"x")
            assert beyond.recv(1) == b""
            raise ConnectionResetError
        for connection in idle:  # half a request each, given up after a second
            try:
                assert connection.recv(1) == b""
            except ConnectionResetError:
                pass
        assert requests.get(f"{server.url}/health", timeout=30).status_code == 200


def test_one_bad_request_fails_alone_and_too_many_wait_in_vain(prm):
    busy, release = threading.Event(), threading.Event()
    own = prm.score_batch

    def score_batch(rows):
        busy.set()
        assert release.wait(20)
        return own(rows)

    prm.score_batch = score_batch
    try:
        with Served(create_app(prm, limits=SMALL)) as server, ThreadPoolExecutor(8) as pool:
            post = lambda body: requests.post(f"{server.url}/pooling", json=body, timeout=60)  # noqa: E731
            good = pooling_request(row(images=[]), StepFormat(), "prm")
            bad = with_steps("a<prm>")
            bad["messages"][0]["content"] = "<|im_end|>"
            jobs = [pool.submit(post, good)]
            assert busy.wait(20)
            jobs += [pool.submit(post, body) for body in (good, bad, good, good, good, good)]
            while "trl_mprm_waiting 6.0" not in requests.get(f"{server.url}/metrics", timeout=30).text:
                time.sleep(0.02)
            refused = post(good)
            assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
            assert "6 solutions are already waiting" in refused.json()["error"]["message"]
            release.set()
            assert [job.result().status_code for job in jobs] == [200, 200, 400, 200, 200, 200, 200]
    finally:
        del prm.score_batch


def test_the_page_escapes_nothing_into_html(served):
    """What users type is set as text, never as HTML."""
    page = requests.get(served.url, timeout=30).text
    written = re.findall(r"innerHTML = ([^;]+);", page)
    assert written and not [text for text in written if "${" in text.replace("${number}", "")]
    assert "http" not in page.split("<script>")[1]  # nothing is loaded from elsewhere


def test_pixels_survive_the_journey():
    image = picture("blue", (33, 17))
    data = base64.b64decode(data_url(image).partition(",")[2])
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() == image.tobytes()
