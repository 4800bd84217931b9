"""
Use a process reward model behind a server like a model in this process.

    prm = RemoteProcessRewardModel("http://127.0.0.1:8000")
    prm.best_of_n(["a.png"], "How many?", [["A and C.", "So 2."], ["One."]])

The client speaks vLLM's `/pooling` protocol, which `trl-mprm serve` understands too: one request per solution, many at
once. Our server runs the picture and the question of solutions that wait together only once.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm.auto import tqdm
from urllib3.util import Retry

from ..prompting.step_format import StepFormat
from ..prompting.tokens import errors_name_row
from ..step_scorer import StepScorer
from .messages import GOOD, pooling_request


API_KEY = "TRL_MPRM_API_KEY"


class RemoteProcessRewardModel(StepScorer):
    """
    Scores steps through a server: `trl-mprm serve`, or vLLM with a model from `trl-mprm export`.

    Args:
        url (`str`):
            Address of the server, e.g. `http://127.0.0.1:8000`.
        model (`str`, *optional*):
            Name under which the server offers the model. Defaults to the first one it offers.
        api_key (`str`, *optional*):
            Key of the server. Defaults to the environment variable `TRL_MPRM_API_KEY`.
        step_format ([`StepFormat`], *optional*):
            Marker and joiner of the model. Defaults to those that our server reports, else to `<prm>` and a blank line.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for one answer.
        retries (`int`, *optional*, defaults to `5`):
            How often a request is sent again, at growing intervals, while the server is busy or away.

    Raises:
        `ConnectionError`: the server cannot be reached, or answers with an internal error. `ValueError`: an invalid
        address, or a model that the server does not offer.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        step_format: StepFormat | None = None,
        timeout: float = 120.0,
        retries: int = 5,
    ):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url is {url!r}, expected the address of a server, as http://127.0.0.1:8000")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.session = requests.Session()
        # The answers of a server that is busy or starting; failed connections are retried as well.
        again = Retry(retries, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
        again.respect_retry_after_header = True
        adapter = HTTPAdapter(pool_maxsize=256, max_retries=again)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        api_key = api_key or os.environ.get(API_KEY)
        if api_key:
            self.session.headers["Authorization"] = f"Bearer {api_key}"
        offered = {entry["id"]: entry for entry in self._answer("GET", "/v1/models")["data"]}
        self.name = model or next(iter(offered))
        if self.name not in offered:
            raise ValueError(f"{self.url} offers no model {self.name!r}, only {', '.join(offered)}")
        entry = offered[self.name]
        told = {"marker": entry.get("step_marker"), "joiner": entry.get("step_joiner")}
        own = StepFormat(**{key: value for key, value in told.items() if value is not None})
        self.step_format = step_format or own
        self.reads_images = entry.get(
            "reads_images", True
        )  # vLLM does not report this, but refuses rows that it cannot read

    def score_batch(self, rows: Sequence[dict[str, Any]], batch_size: int = 16) -> list[list[float]]:
        """
        Score many solutions.

        Args:
            rows (`Sequence[dict]`):
                Rows with `prompt`, `completions` and optional `images`, as in training.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of concurrent requests.

        Returns:
            `list[list[float]]`: P(step good) of each step of each row, in the order of `rows`.

        Raises:
            `ValueError`: a row cannot be scored; the message names it and quotes the server. `ConnectionError`: the
            server fails or cannot be reached. `RuntimeError`: the server does not read at the markers.
        """
        with ThreadPoolExecutor(batch_size) as pool, tqdm(total=len(rows), desc="Scoring", unit="row", delay=2) as bar:
            scores = []
            for own in pool.map(self._score, rows, range(len(rows))):
                scores.append(own)
                bar.update()
        return scores

    def _score(self, row: dict[str, Any], index: int) -> list[float]:
        with errors_name_row(row, index):
            answer = self._answer("POST", "/pooling", pooling_request(row, self.step_format, self.name))
        pairs, steps = answer["data"][0]["data"], row["completions"]
        if len(pairs) != len(steps) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise RuntimeError(
                f"{self.url} sent {len(pairs)} values for {len(steps)} steps, expected one pair per step: serve the folder "
                "of `trl-mprm export` with the command of its SERVE.md, by vLLM 0.32 or newer"
            )
        return [pair[GOOD] for pair in pairs]

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self.session.request(method, self.url + path, json=body, timeout=self.timeout)
        except requests.exceptions.RetryError as error:
            raise ConnectionError(f"{self.url} is still busy after all retries: try again later") from error
        except requests.RequestException as error:
            reason = type(error).__name__
            raise ConnectionError(f"{self.url} cannot be reached ({reason}): is the server running?") from error
        if answer.status_code in (400, 413, 422):
            raise ValueError(f"the server refused the row: {_message(answer)}")
        if not answer.ok:
            raise ConnectionError(f"{self.url}{path} answered {answer.status_code}: {_message(answer)}")
        try:
            return answer.json()
        except ValueError as error:
            raise ConnectionError(
                f"{self.url}{path} did not answer in JSON: is this a server for process reward models?"
            ) from error


def _message(answer: requests.Response) -> str:
    """Extract the message of an error answer, in the form of OpenAI's API or in that of the server."""
    try:
        content = answer.json()
    except ValueError:
        content = answer.text
    if isinstance(content, dict):
        content = content.get("error", content)
    if isinstance(content, dict):
        content = content.get("message", content)
    return " ".join(str(content).split())[:300]
