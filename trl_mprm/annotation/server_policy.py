"""
A policy behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp), over plain HTTP.

    POST /v1/chat/completions {"model": "qwen", "n": 16, "seed": 1163, "temperature": 1.0, "max_tokens": 2048,
      "messages": [{"role": "user", "content": [{"type": "image_url", ...}, {"type": "text", "text": "Find x."}]},
                   {"role": "assistant", "content": "x = 5.\\n\\n"}],
      "continue_final_message": true, "add_generation_prompt": false}

One request asks for all draws of a step, so that the server computes the prefix once; the steps of a rollout follow each
other in rising order, so that its prefix cache serves the next step. vLLM and llama.cpp give draw `i` of a request the
seed `seed + i`. Servers batch requests as they come, so that two runs may differ in some tokens.
"""

import base64
import io
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from ..data.images import open_image
from .policies import Draw, Parked, Policy, Reply, Request


class ServerPolicy(Policy):
    """
    Continues the assistant's message on a server.

    Args:
        url (`str`):
            Address of the server, with or without `/v1`. A key in the environment variable `OPENAI_API_KEY` is sent along.
        temperature, top_p, top_k, max_new_tokens:
            Parameters of the sampling; `top_k` 0 means all tokens.
        workers (`int`, *optional*, defaults to 8):
            Number of rollouts that are continued at the same time.
        timeout (`float`, *optional*, defaults to 600):
            Seconds to wait for an answer.
        retries (`int`, *optional*, defaults to 5), wait (`float`, *optional*, defaults to 0.5):
            A request without a proper answer is sent again up to `retries` times, at first after `wait` seconds and then
            after twice as long each time. After that it is parked.

    Raises:
        `ValueError`: at the first draw, if the server refuses or does not continue a message. `OSError`: if it does not
        answer.
    """

    def __init__(
        self,
        url: str,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        max_new_tokens: int = 2048,
        workers: int = 8,
        timeout: float = 600,
        retries: int = 5,
        wait: float = 0.5,
    ):
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
        self.sampling |= {"top_k": top_k} if top_k else {}
        self.workers, self.timeout, self.retries, self.wait = workers, timeout, retries, wait
        self.most_at_once: int | None = None  # draws that the server gives in one answer, once it has refused more
        self.parked_in_a_row = 0
        self.checked = False
        self.local = threading.local()  # a session each: they are not made for several threads
        try:
            models = self._send("GET", "/models", None)["data"]
            self.model = models[0]["id"]
        except (_NoAnswer, _Refusal) as error:
            raise OSError(
                f"{self.url}/models: {error}: is this the address of an OpenAI-compatible server?"
            ) from error
        except (LookupError, TypeError) as error:
            raise ValueError(f"{self.url}/models names no model: expected an OpenAI-compatible server") from error
        self.name = self.model  # not the address: a server may come back at another one

    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply | Parked]]:
        self.parked_in_a_row = 0
        if not self.checked and any(visits):
            self._check_that_it_continues()
            self.checked = True
        results: queue.Queue = queue.Queue()
        stop = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for place, visit in enumerate(visits):
                    pool.submit(self._visit, place, visit, results, stop)
                for _ in range(sum(map(len, visits))):
                    result = results.get()
                    if isinstance(result, BaseException):
                        raise result
                    yield result
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _visit(self, place: int, visit: Sequence[Request], results: queue.Queue, stop: threading.Event) -> None:
        try:
            pictures = _pictures(visit[0]) if visit else []
            for number, request in enumerate(visit):
                if stop.is_set():
                    return
                results.put((place, number, self._reply(request, pictures)))
        except BaseException as error:  # handed to the thread that waits for this result
            results.put(error)

    def _reply(self, request: Request, pictures: list[dict]) -> Reply | Parked:
        draws: list[Draw] = []
        prompt_tokens = cached_tokens = tokens = None
        messages = _messages(pictures, request)
        while len(draws) < request.n:
            n = min(request.n - len(draws), self.most_at_once or request.n)
            if self.parked_in_a_row >= 2 * self.workers:
                return Parked("the server no longer answers")
            try:
                answer = self._complete(messages, n, request.seed + len(draws))
                new = [_draw(choice, request.steps) for choice in answer["choices"]][:n]
                usage = answer.get("usage") or {}
            except _Refusal as error:
                if n > 1:  # some servers limit the number of draws per request
                    self.most_at_once = n // 2
                    continue
                new, usage = [Draw("", "refused")], {"refusal": str(error)}
            except _NoAnswer as error:
                self.parked_in_a_row += 1
                return Parked(str(error))
            self.parked_in_a_row = 0
            if len(new) < n:
                self.most_at_once = len(new)
            draws += new if len(new) > 1 else [new[0]._replace(tokens=usage.get("completion_tokens"))]
            tokens = _plus(tokens, usage.get("completion_tokens"))
            prompt_tokens = _plus(prompt_tokens, usage.get("prompt_tokens"))
            cached_tokens = _plus(cached_tokens, (usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        return Reply(draws, prompt_tokens, cached_tokens, tokens)

    def _complete(self, messages: list[dict], n: int, seed: int, **other: Any) -> dict[str, Any]:
        body = {"model": self.model, "messages": messages, "n": n, "seed": seed, **self.sampling, **other}
        if messages[-1]["role"] == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return self._send("POST", "/chat/completions", body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request. Raises [`_Refusal`] if the server will never answer it, [`_NoAnswer`] after all retries."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            if key := os.environ.get("OPENAI_API_KEY"):
                self.local.session.headers["Authorization"] = f"Bearer {key}"
        reason, pause = "", self.wait
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, 60)
            try:
                answer = self.local.session.request(method, self.url + path, json=body, timeout=(10, self.timeout))
            except requests.RequestException as error:
                reason = f"{type(error).__name__} from {self.url}"
                continue
            if answer.status_code in (400, 413, 422):
                raise _Refusal(f"{answer.status_code}: {' '.join(answer.text.split())[:200]}")
            try:
                value = answer.json() if answer.ok else None
            except requests.exceptions.JSONDecodeError:
                value = None
            if isinstance(value, dict) and (value.get("choices") or body is None):
                return value
            reason = f"{answer.status_code} {answer.reason} from {self.url}: {' '.join(answer.text.split())[:80]}"
            if answer.status_code in (401, 403, 404):
                break  # asking again would not help
            later = answer.headers.get("Retry-After", "")
            pause = max(pause, min(float(later), 60)) if later.isdecimal() else pause
        raise _NoAnswer(reason)

    def _check_that_it_continues(self) -> None:
        """
        Ask for one token after nothing, after "1 2 3" and after "1 2 3 1 2 3": a server that closes the message and
        opens a new one counts more tokens at the first step than at the second.
        """
        question = {"role": "user", "content": "Count."}
        texts = ("", "1 2 3", "1 2 3 1 2 3")
        try:
            answers = [
                self._complete([question] + [{"role": "assistant", "content": text}] * bool(text), 1, 0, max_tokens=1)
                for text in texts
            ]
            bare, once, twice = [answer["usage"]["prompt_tokens"] for answer in answers]
        except _Refusal as error:
            raise ValueError(
                f"{self.url} refuses to continue the assistant's message ({error}): serve a model with a chat template "
                "on vLLM, SGLang or llama.cpp"
            ) from error
        except _NoAnswer as error:
            raise OSError(f"{self.url} does not answer ({error}): start it and run again") from error
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not report `usage.prompt_tokens`: expected an OpenAI-compatible server"
            ) from error
        if once - bare > twice - once + 2:
            raise ValueError(
                f"{self.url} opens a new message instead of continuing the assistant's (of {bare}, {once} and {twice} "
                "tokens): it must know `continue_final_message`, as vLLM, SGLang and llama.cpp do"
            )


class _Refusal(Exception):
    """The server will not answer this request, however often it is sent."""


class _NoAnswer(Exception):
    """The server has not answered this request, but may do so later."""


def _messages(pictures: list[dict], request: Request) -> list[dict]:
    question = {"type": "text", "text": request.prompt}
    user = {"role": "user", "content": [*pictures, question] if pictures else request.prompt}
    if not request.steps:
        return [user]
    return [user, {"role": "assistant", "content": _prefix(request.steps)}]


def _prefix(steps: Sequence[str]) -> str:
    return "\n\n".join(steps) + "\n\n"


def _pictures(request: Request) -> list[dict]:
    parts = []
    for image in request.images:
        file = io.BytesIO()
        open_image(image).save(file, "PNG", compress_level=1)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return parts


def _draw(choice: dict[str, Any], steps: Sequence[str]) -> Draw:
    try:
        text, finish = choice["message"]["content"] or "", choice["finish_reason"] or "unknown"
        prefix = _prefix(steps) if steps else ""
        return Draw(text.removeprefix(prefix), finish)  # llama.cpp repeats what it continues, vLLM does not
    except (LookupError, TypeError, AttributeError) as error:
        raise _NoAnswer(f"a choice has no text ({error!r})") from error


def _plus(total: int | None, value: int | None) -> int | None:
    return total if value is None else (total or 0) + value
