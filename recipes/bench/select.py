"""
What does `trl-mprm select` cost? Whole processes, from start to exit, against thirty lines of plain Python.

    python recipes/bench/select.py                                   # 370 MB and 1.5 GB, about 10 minutes
    python recipes/bench/select.py --quick                           # a few MB: does it run
    python recipes/bench/select.py --before ../an-older-checkout     # race it too

The contestants:

    plain   `plain_select.py`: `json.loads` line by line, a stable sort, seek and copy; it checks nothing
    parse   the lines of the corpus through a narrow msgspec decoder (scores, question, image), one core, nothing else:
            the floor of a first pass that reads JSON
    ours    `trl-mprm select`: checks each row and each picture, takes checksums, keeps evidence

They run interleaved, forwards and backwards in turn (ABBA), so that a slow minute of the machine hits all of them. CPU
seconds are user + system of the process and all that it started; ratios are ratios of medians. CPU ratios bear other
work on the machine, wall ratios do not. ours and plain must keep the same rows, or the bench stops.
"""

import os
import sys


# This file is named like a module of the standard library: its folder goes to the end of the path, here and in workers.
sys.path.sort(key=os.path.dirname(os.path.abspath(__file__)).__eq__)
os.environ["PYTHONSAFEPATH"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import argparse
import compileall
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rollout_corpus import write_corpus
from tabulate import tabulate


PACKAGE = Path(__file__).parents[2]

# Name: (rows, kilobytes per row, rows per question, pictures on the disk)
CORPORA = {
    "370 MB, no pictures, a question per row": (69_000, 6, 1, False),
    "370 MB, pictures, a question per row": (69_000, 6, 1, True),
    "370 MB, pictures, four rows per question": (114_000, 3.5, 4, True),
    "1.5 GB, no pictures, a question per row": (280_000, 6, 1, False),
    "1.5 GB, pictures, four rows per question": (480_000, 3.5, 4, True),
}
MEMORY = ((15_000, 120_000), (60_000, 480_000))
QUICK = {"no pictures": (300, 6, 1, False), "pictures": (300, 3.5, 4, True)}, ((100, 800),)

PARSE = """
import sys
from pathlib import Path
import msgspec

class Step(msgspec.Struct):
    score: float
    num_mc_total: int | None = None

class Row(msgspec.Struct):
    steps_with_score: list[Step]
    question_orig: str | None = None
    image: str | None = None

decode = msgspec.json.Decoder(Row).decode
for path in sorted(Path(sys.argv[1]).glob("*.jsonl")):
    with open(path, "rb") as lines:
        for line in lines:
            decode(line)
"""

# VmHWM, not ru_maxrss: on exec that one starts from the peak of the process that started this one.
PEAK = """
import re, resource, sys
from trl_mprm.selection.files import select_files
select_files(sys.argv[1], sys.argv[2], fraction=0.1, alpha=0.2)
own = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

# Prints when each worker read a shard: a line (process, start, end) per shard
OVERLAP = """
import functools, os, sys, time
from trl_mprm.selection import engine
from trl_mprm.selection.files import select_files

plain = engine.score_shard

@functools.wraps(plain)
def score_shard(*args, **kwargs):
    start = time.monotonic()
    result = plain(*args, **kwargs)
    os.write(1, f"{os.getpid()} {start} {time.monotonic()}\\n".encode())
    return result

score_shard.__module__ = engine.__name__
engine.score_shard = score_shard
select_files(sys.argv[1], sys.argv[2], fraction=0.1, alpha=0.2)
"""


def commands(before: Path | None) -> dict[str, tuple[list, dict]]:
    """The command of each contestant, without corpus and output, and its environment."""
    select = ["-m", "trl_mprm.cli", "select", "--fraction", "0.1", "--alpha", "0.2"]
    found = {
        "plain": ([Path(__file__).parent / "plain_select.py"], {}),
        "parse": (["-c", PARSE], {}),
        "ours": (select, {"PYTHONPATH": str(PACKAGE)}),
    }
    return found if before is None else found | {"before": (select, {"PYTHONPATH": str(before.resolve())})}


def run(arguments: list, corpus: Path, output: Path, environment: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of a process and of all that it started, from start to exit."""
    shutil.rmtree(output, ignore_errors=True)
    places = [corpus, "--output", output] if "select" in arguments else [corpus, output]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments, *places],
        env=os.environ | environment,
        cwd=corpus,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{arguments} ended with {process.returncode} on {corpus}")
    return usage.ru_utime + usage.ru_stime, wall


def race(corpus: Path, contestants: dict, repeats: int, root: Path) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each contestant."""
    seconds: dict[str, list] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name in list(contestants)[:: 1 if repeat % 2 == 0 else -1]:
            arguments, environment = contestants[name]
            seconds[name].append(run(arguments, corpus, root / name, environment))
    for file in (root / "plain").glob("*.jsonl"):
        if file.read_bytes() != (root / "ours" / file.name).read_bytes():
            raise ValueError(f"ours and plain kept different rows of {file.name}")
    medians = {name: map(statistics.median, zip(*times, strict=True)) for name, times in seconds.items()}
    return {name: dict(zip(("cpu", "wall"), values, strict=True)) for name, values in medians.items()}


def script(code: str, corpus: Path, output: Path) -> str:
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    argv = [sys.executable, "-c", code, corpus, output]
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True, cwd=corpus).stdout


def overlap(corpus: Path, output: Path) -> float:
    """Share of the first pass, from its first start to its last end, in which two workers or more were reading."""
    marks = []
    for line in script(OVERLAP, corpus, output).splitlines():
        _, start, end = line.split()
        marks += [(float(start), 1), (float(end), -1)]
    marks.sort()
    together, working = 0.0, 0
    for (moment, step), (after, _) in zip(marks, marks[1:], strict=False):
        working += step
        together += (after - moment) * (working > 1)
    return together / (marks[-1][0] - marks[0][0])


def bench(quick: bool, before: Path | None, repeats: int, root: Path) -> dict:
    corpora, memory = QUICK if quick else (CORPORA, MEMORY)
    contestants, results = commands(before), {"corpora": {}, "memory": {}}
    for package in (PACKAGE, before):
        if package is not None:
            compileall.compile_dir(package / "trl_mprm", quiet=1)  # as pip does when it installs
    for name, (rows, kilobytes, per_question, pictures) in corpora.items():
        corpus = root / "corpus"
        write_corpus(corpus, rows, kilobytes, per_question, pictures)
        seconds = race(corpus, contestants, repeats, root)
        results["corpora"][name] = {
            "rows": rows,
            "mb": sum(path.stat().st_size for path in corpus.glob("*.jsonl")) / 1e6,
            "seconds": seconds,
            "overlap": overlap(corpus, root / "ours"),
        }
        shutil.rmtree(corpus)
        shares = {other: f"{times['cpu'] / seconds['plain']['cpu']:.2f}" for other, times in seconds.items()}
        print(f"{name}: CPU / plain {shares}", file=sys.stderr)
    write_corpus(root / "corpus", 1000)
    small = {name: contestants[name] for name in contestants if name != "parse"}
    results["1,000 rows"] = race(root / "corpus", small, max(repeats, 3), root)
    for sizes in memory:
        peaks = []
        for rows in sizes:
            shutil.rmtree(root / "corpus")
            write_corpus(root / "corpus", rows)
            peaks.append(int(script(PEAK, root / "corpus", root / "ours").split()[-1]) / 1024)
        results["memory"]["{:,} to {:,}".format(*sizes)] = {"mb": peaks, "ratio": peaks[1] / peaks[0]}
    return results


def show(results: dict) -> None:
    names = list(results["1,000 rows"])
    ours = [name for name in ("ours", "before") if name in names]
    rows, ratios = [], []
    for corpus, row in results["corpora"].items():
        seconds = row["seconds"]
        for name, times in seconds.items():
            rows.append([f"{corpus}, {row['mb']:.0f} MB", name, times["cpu"], times["wall"]])
        for name in ours:
            ratio = [seconds[name][what] / seconds["plain"][what] for what in ("cpu", "wall")]
            ratios.append([corpus, name, *ratio, row["overlap"] if name == "ours" else None])
    for name, times in results["1,000 rows"].items():
        rows.append(["1,000 rows", name, times["cpu"], times["wall"]])
    print(tabulate(rows, headers=["corpus", "", "CPU s", "wall s"], floatfmt=".2f"), end="\n\n")
    headers = ["ratio of medians", "", "CPU / plain", "wall / plain", "both workers at work"]
    print(tabulate(ratios, headers=headers, floatfmt=".2f"), end="\n\n")
    for sizes, peak in results["memory"].items():
        print(f"peak memory, {sizes} rows: {peak['mb'][0]:.0f} to {peak['mb'][1]:.0f} MB, {peak['ratio']:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few MB in place of 370 MB and 1.5 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an older checkout that is raced too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-select-") as root:
        results = bench(args.quick, args.before, args.repeats, Path(root))
    show(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
