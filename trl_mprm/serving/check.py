"""
Compare the scores of a server with those stored beside the exported model.

It needs only Python, so it can be shipped in the folder of the model as `check.py`:

    python check.py http://127.0.0.1:8000

`parity.json` beside it holds requests and the scores to expect:

    {"model": "prm", "good": 1, "cases": [{"request": {...}, "scores": [0.93, 0.11]}, ...]}
"""

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path


PARITY = "parity.json"
# The largest differences of scores that rounding explains, with weights in float32 and in bfloat16.
FLOAT32, BFLOAT16 = 1e-4, 3e-2


def check(url: str, folder: str | os.PathLike, api_key: str | None = None, timeout: float = 120.0) -> dict:
    """
    Score the stored solutions on a server and compare.

    Args:
        url (`str`):
            Address of the server, e.g. `http://127.0.0.1:8000`.
        folder (`str` or path):
            Folder with `parity.json`.
        api_key (`str`, *optional*):
            Key of the server, sent as a bearer token.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for one answer.

    Returns:
        `dict`: `solutions`, `steps`, `rows` (pairs that came back), `largest_difference` of P(step good) (None if the
        numbers of rows and steps differ), and `verdict`, one sentence.

    Raises:
        `OSError`: the server cannot be reached or refuses; the message quotes its answer.
    """
    parity = json.loads(Path(folder, PARITY).read_text(encoding="utf-8"))
    steps = rows = 0
    differences = []
    for case in parity["cases"]:
        answer = _post(url.rstrip("/") + "/pooling", case["request"], api_key, timeout)
        pairs = answer["data"][0]["data"]
        steps += len(case["scores"])
        rows += len(pairs)
        if len(pairs) == len(case["scores"]) and all(isinstance(pair, list) for pair in pairs):
            differences += [
                abs(pair[parity["good"]] - score) for pair, score in zip(pairs, case["scores"], strict=True)
            ]
    whole = len(differences) == steps
    largest = max(differences) if whole else None
    return {
        "solutions": len(parity["cases"]),
        "steps": steps,
        "rows": rows,
        "largest_difference": largest,
        "verdict": _verdict(rows, steps, largest),
    }


def _verdict(rows: int, steps: int, largest: float | None) -> str:
    if largest is None:
        return (
            f"DIFFERENT: {rows} rows came back for {steps} steps. Either the server does not read at the step marker "
            "(vLLM before September 2026 ignores STEP pooling for converted models: update it), or --pooler-config "
            "lacks step_tag_id, or the prefix cache is read (leave skip_reading_prefix_cache on)"
        )
    if largest <= FLOAT32:
        return "EQUAL: every score agrees to float32 rounding"
    if largest <= BFLOAT16:
        return "CLOSE: the scores agree to bfloat16 rounding; start the server with --dtype float32 for equal scores"
    return (
        "DIFFERENT: the scores do not agree. Check that the server uses the chat template of this folder, that it reads "
        "pictures at the size of this folder's processor, and that no other adapter or quantisation is loaded"
    )


def _post(url: str, body: dict, api_key: str | None, timeout: float) -> dict:
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} answered {error.code}: {error.read(500).decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        raise OSError(f"{url} cannot be reached ({error.reason}): is the server running?") from error


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python check.py URL")
    try:
        result = check(sys.argv[1], Path(__file__).parent, os.environ.get("API_KEY"))
    except OSError as problem:
        sys.exit(f"error: {problem}")
    for name, value in result.items():
        print(f"{name.replace('_', ' ')}: {value}")
    sys.exit(result["verdict"].startswith("DIFFERENT"))
