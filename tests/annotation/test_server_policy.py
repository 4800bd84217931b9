"""Over real HTTP against llama.cpp's server, which runs in this process on a tiny model made here; and its bad days."""

import json
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import numpy as np
import pytest
import xllamacpp

from trl_mprm.annotation.annotate import annotate
from trl_mprm.annotation.policies import STOP, Parked, Request
from trl_mprm.annotation.server_policy import ServerPolicy
from trl_mprm.cli import main


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(path) -> None:
    """A Llama of one layer whose tokens are bytes; it ends a turn after some ten of them."""
    hidden, feed_forward, heads = 32, 64, 2
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(2048)
    file.add_embedding_length(hidden)
    file.add_block_count(1)
    file.add_feed_forward_length(feed_forward)
    file.add_head_count(heads)
    file.add_head_count_kv(heads)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(hidden // heads)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("llama")
    file.add_token_list(tokens)
    file.add_token_scores([0.0] * len(tokens))
    file.add_token_types([2, 3, 3, 3, 3] + [6] * 256)
    file.add_eos_token_id(4)
    file.add_add_bos_token(False)
    file.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden)}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (feed_forward, hidden) for name in ("gate", "up")}
    shapes |= {"blk.0.ffn_down": (hidden, feed_forward)}
    weights = {name: rng.normal(size=shape) * 0.1 for name, shape in shapes.items()}
    weights["token_embd"][:, 0] = 1.0
    weights["output"][4, 0] = 0.6  # <|im_end|>
    weights |= {name: np.ones(hidden) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    for name, values in weights.items():
        file.add_tensor(f"{name}.weight", values.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_model(path)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 8192, 8, False, -1
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    yield server.listening_address
    del server


def right(text: str, answer: str) -> bool:
    return len(text) % 3 > 0


def rows(n: int) -> list[dict]:
    steps = [f"step {number}: " + "the red tile and the blue tile " * 3 for number in range(5)]
    return [
        {"prompt": f"question {i}?", "answer": "1", "completions": steps[: 2 + i % 3], "rollout_id": f"a:{i}"}
        for i in range(n)
    ]


def test_steps_are_scored_and_the_prefix_is_computed_once(url, tmp_path):
    policy = ServerPolicy(url, max_new_tokens=64, top_k=0, workers=1)
    data = annotate(rows(4), policy, checker=right, n=16, output=tmp_path / "a.jsonl")
    assert [len(row["mc_scores"]) for row in data] == [2, 3, 4, 2]
    draws = [draws for row in data for draws in row["draws"]]
    assert all(len(draw["finish"]) == 16 for draw in draws)
    finish = {finish for draw in draws for finish in draw["finish"]}
    assert STOP in finish and finish <= {STOP, "length"}
    lines = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    for row in lines:
        totals = row["mc_total"] if isinstance(row["mc_total"], list) else [row["mc_total"]] * len(row["completions"])
        assert totals == [draw["finish"].count(STOP) for draw in row["draws"]]
    assert len({count for row in data for count in row["mc_counts"]}) > 2
    # By the server's own figures: what it computed of prefixes, and the longest prefix of each rollout, once.
    computed = sum(draw["prompt_tokens"] - draw["cached_tokens"] for draw in draws)
    two_requests = 16 // policy.most_at_once  # it has eight slots: a step takes two requests
    unique = sum(row["draws"][-1]["prompt_tokens"] // two_requests for row in data)
    assert 0 < computed <= 1.2 * unique


def test_draw_is_the_same_alone_and_in_company(url):
    policy = ServerPolicy(url, max_new_tokens=32, top_k=0, workers=1)

    def texts(n, seed):
        [(_, _, reply)] = policy.run([[Request("r", [], "question?", ["one"], n, seed)]])
        return [draw.text for draw in reply.draws]

    together = texts(5, 70)
    assert len(set(together)) > 1
    assert together == [texts(1, 70 + i)[0] for i in range(5)]
    assert not together[0].startswith("one")


def test_questions_without_solutions_and_the_command_line(url, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{i}?", "answer": "1"}) + "\n" for i in range(3))
    )
    command = ["annotate", str(tmp_path / "in.jsonl"), "--policy", url, "--output", str(tmp_path / "out.jsonl")]
    command += ["--n", "4", "--solutions", "2", "--max-new-tokens", "200", "--price", "2", "--checker", "exact"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "draws with all" in shown and "cost of this run" in shown
    assert all(row["rollout_id"].startswith("in:") for row in map(json.loads, open(tmp_path / "out.jsonl")))


@contextmanager
def proxy(url, misbehave):
    """A server before the real one; `misbehave(handler, number)` may answer in its place, and then returns True."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.forward(None)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked = json.loads(body)
            seen.append(self.asked)
            if not misbehave(self, len(seen)):
                self.forward(body)

        def forward(self, body):
            request = urllib.request.Request(url + self.path, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                self.answer(answer.status, answer.read())

        def answer(self, status, content, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_bad_days_are_survived(url, tmp_path):
    def misbehave(handler, number):
        if number == 5:
            handler.answer(429, b"slow down", Retry_After=0)
        elif number == 7:
            handler.answer(503, b"loading")
        elif number == 9:
            handler.answer(200, b"<html>rubbish")
        elif number == 11:
            handler.answer(200, b'{"choices": []}')
        elif number == 13:
            handler.connection.close()
        elif number == 15:
            handler.connection.settimeout(None)
            threading.Event().wait(2.5)  # too late for the client
        else:
            return False
        return True

    with proxy(url, misbehave) as (address, seen):
        policy = ServerPolicy(address, max_new_tokens=32, workers=2, wait=0.01, timeout=2.0)
        data = annotate(rows(6), policy, checker=right, n=4, output=tmp_path / "a.jsonl")
    n_steps = sum(map(len, data["completions"]))
    assert len(data) == 6 and len(seen) >= 3 + n_steps + 6  # the check, each step once, and the six bad answers
    assert len(open(tmp_path / "a.draws.jsonl").readlines()) == 1 + n_steps  # each step paid for once
    assert {len(draws["finish"]) for row in data for draws in row["draws"]} == {4}


def test_server_that_dies_leaves_its_draws_to_the_next_run(url, tmp_path):
    def dies(handler, number):
        if number > 8:
            handler.connection.close()
        return number > 8

    output = tmp_path / "a.jsonl"
    options = {"max_new_tokens": 32, "workers": 2, "wait": 0.01, "retries": 2}
    with proxy(url, dies) as (address, seen):
        policy = ServerPolicy(address, **options)
        with pytest.raises(OSError, match="is not written.*ConnectionError.*run again to finish"):
            annotate(rows(6), policy, checker=right, n=4, output=output)
        assert len(seen) < 40 and not output.exists()
    with proxy(url, lambda handler, number: False) as (address, seen):
        policy = ServerPolicy(address, **options)
        data = annotate(rows(6), policy, checker=right, n=4, output=output)
    assert len(seen) == 3 + sum(map(len, data["completions"])) - 5


def test_refused_request_is_a_lost_draw(url, tmp_path):
    long = rows(1)[0] | {"completions": ["short", "long " * 2000]}
    policy = ServerPolicy(url, max_new_tokens=16, top_k=0, workers=1)
    data = annotate([long], policy, checker=right, n=2, output=tmp_path / "a.jsonl")
    assert data[0]["draws"][1]["finish"] == ["refused"] * 2
    assert data[0]["mc_scores"][1] is None and data[0]["labels"][1] == -100


def test_server_that_opens_a_new_message_is_told_from_one_that_continues(url):
    def opens_a_new_message(handler, number):
        body = handler.asked
        if body["messages"][-1]["role"] == "assistant":
            del body["continue_final_message"], body["add_generation_prompt"]
            body["messages"].append({"role": "user", "content": "."})
        handler.forward(json.dumps(body).encode())
        return True

    with proxy(url, opens_a_new_message) as (address, _):
        policy = ServerPolicy(address, wait=0.01)
        with pytest.raises(ValueError, match="opens a new message instead of continuing the assistant's"):
            list(policy.run([[Request("r", [], "q?", ["one"], 1, 0)]]))


def test_no_server_is_one_line():
    with pytest.raises(OSError, match="http://127.0.0.1:9/v1/models: ConnectionError.*is this the address"):
        ServerPolicy("http://127.0.0.1:9", retries=1, wait=0.01)


def test_parked_reply_names_the_reason(url):
    with proxy(url, lambda handler, number: number > 3 and (handler.answer(503, b"busy"), True)[1]) as (address, _):
        policy = ServerPolicy(address, workers=1, wait=0.01, retries=1)
        [(_, _, reply)] = policy.run([[Request("r", [], "q?", ["one"], 1, 0)]])
    assert isinstance(reply, Parked) and "503 Service Unavailable" in reply.reason and "busy" in reply.reason
