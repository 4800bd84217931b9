"""
How fast is `trl-mprm select`? Against the paper's algorithm in plain Python, one read of the bytes, and Hugging Face code.

    python recipes/bench/select.py                                   # 120,000 rollouts, 420 MB, about 5 minutes
    python recipes/bench/select.py --rows 20000 --json bench.json
    python recipes/bench/select.py --ray                             # also Ray, 2 workers against 1, on 2 GB
    python recipes/bench/select.py --rows 20000 --parsers            # only the parsers, one thread each

The corpus comes from a seed, in the schema of VisualPRM400K-v1.1-Raw: about 3.5 KB a row, 5.6 steps, scores k/16, 92%
of the rollouts not mixed. The contestants run interleaved, forwards and backwards in turn (ABBA), so that a slow minute
of the machine hits all of them; the ratios are ratios of medians. Nothing here is a test of time: see what it prints.

Why msgspec parses. With `--rows 20000 --parsers --repeats 5`, only the fields that decide about a row, one thread, on 2
cores that were busy with other work: 3.1 times as fast as stdlib json (ratio of medians), orjson 3.2, pysimdjson 2.9,
DuckDB's read_json 2.5, Polars' scan_ndjson 2.0, pyarrow.json 1.9; in an earlier run, on quieter cores, msgspec 3.2, orjson
2.7, DuckDB 2.2, pyarrow 2.1. msgspec also checks types and ranges on the way, and leaves the line in hand: a line that is
not what it expects goes a slower way that names the reason for refusing it, and a line that is kept is copied byte by
byte. DuckDB, Polars and pyarrow read a file as a whole: one bad row stops them or becomes nulls, and a kept row would
have to be found again in the file.
"""

import os
import sys


# This file is named like a module of the standard library: its folder goes to the end of the path, here and in workers.
sys.path.sort(key=os.path.dirname(os.path.abspath(__file__)).__eq__)
os.environ["PYTHONSAFEPATH"] = "1"

import argparse
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, load_dataset
from tabulate import tabulate

from trl_mprm import add_bis, load_rollouts
from trl_mprm.selection.files import select_files


FRACTION, ALPHA = 0.1, 0.2
SOURCES = {"ChartQA": 0.4, "Geometry3K": 0.3, "IconQA": 0.2, "VQAv2": 0.1}
WORDS = r"""therefore the angle at this vertex equals measure of opposite side which we can read from figure so subtract
both parts and divide by two to obtain value area triangle length base height chart bar shows percent total number blue
objects left right above legend axis maximum minimum answer option "ABC" \( \frac{1}{2} \) \angle = x + 90^\circ""".split()
# The smallest PNG: every row names a picture that exists.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010100000000376ef9240000000a49444154789c636800000082008177cd72b60000"
    "000049454e44ae426082"
)


def write_corpus(folder: Path, rows: int, seed: int = 0) -> None:
    """Four files of raw annotations; four rollouts to a question and its picture."""
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(14, 42))) + "." for _ in range(4096)]
    sentences[::50] = [f"{sentence} ∠ABC ≤ 90°, naïve “三角形”" for sentence in sentences[::50]]
    instruction = "<image>\n" + " ".join(sentences[1:3])
    for source, share in SOURCES.items():
        (folder / source).mkdir(parents=True)
        for number in range(64):
            (folder / source / f"{number}.png").write_bytes(PNG)
        with open(folder / f"{source}.jsonl", "w", encoding="utf-8") as file:
            for row in range(max(4, int(rows * share))):
                question = f"Question {row // 4} of {source}: {sentences[row // 4 % 4096]}"
                counts = random_counts(rng, min(16, max(2, round(rng.gauss(5.6, 2.2)))))
                steps = [f"Step {number + 1}: {rng.choice(sentences)}" for number in range(len(counts))]
                record = {
                    "image": f"{source}/{row // 4 % 64}.png",
                    "question": f"{instruction}\n{question}",
                    "question_orig": question,
                    "answer": str(row % 97),
                    "response": "\n\n".join(steps),
                    "steps_with_score": [
                        {"step": step, "score": count / 16, "num_mc_correct": count, "num_mc_total": 16}
                        for step, count in zip(steps, counts, strict=True)
                    ],
                    "num_mc_sequences": 16,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def random_counts(rng: random.Random, n_steps: int) -> list[int]:
    """Correct continuations, of 16, for each step: 8% of the rollouts mixed, 1% all wrong, half of the rest perfect."""
    kind, lowest = rng.random(), rng.choice((1, 6, 10, 14, 16, 16, 16, 16))
    if kind < 0.01:
        return [0] * n_steps
    n_good = rng.randint(1, n_steps - 1) if kind < 0.09 else n_steps
    return [rng.randint(lowest, 16) for _ in range(n_good)] + [0] * (n_steps - n_good)


# ---- the contestants: each reads the corpus and leaves what it kept in an empty folder of its own


def plain_bis(scores: list[float]) -> float:
    positive = [score for score in scores if score > 0]
    p_pos = len(positive) / len(scores)
    return (p_pos * (1 - p_pos) + ALPHA) * (sum(positive) / len(positive) if positive else 1.0)


def plain(corpus: Path, work: Path) -> None:
    """The paper's algorithm in plain Python: a file's lines in memory, `json.loads`, a stable sort, one thread."""
    for path in sorted(corpus.glob("*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        scores = [plain_bis([step["score"] for step in json.loads(line)["steps_with_score"]]) for line in lines]
        best = sorted(range(len(lines)), key=lambda index: -scores[index])[: max(1, int(len(lines) * FRACTION))]
        (work / path.name).write_bytes(b"".join(lines[index] for index in sorted(best)))


def ours(corpus: Path, work: Path) -> None:
    """What `trl-mprm select` runs."""
    select_files(str(corpus), work, fraction=FRACTION, alpha=ALPHA)


def read(corpus: Path, work: Path) -> None:
    """The floor: the bytes of the corpus, read once into one buffer."""
    buffer = bytearray(4 << 20)
    for path in sorted(corpus.glob("*.jsonl")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def hf_path(corpus: Path, work: Path) -> Dataset:
    """The obvious Hugging Face code, the score a plain Python function. It keeps every tie at the threshold."""
    files = [str(path) for path in sorted(corpus.glob("*.jsonl"))]
    rows = load_dataset("json", data_files=files, split="train", cache_dir=str(work))
    rows = rows.map(lambda row: {"bis": plain_bis([step["score"] for step in row["steps_with_score"]])})
    threshold = sorted(rows["bis"], reverse=True)[int(len(rows) * FRACTION)]
    return rows.filter(lambda row: row["bis"] >= threshold)


def ours_to_dataset(corpus: Path, work: Path) -> Dataset:
    select_files(str(corpus), work, fraction=FRACTION, alpha=ALPHA)
    return load_rollouts(str(work), image_root=corpus)


def row_map(rollouts: Dataset) -> Dataset:
    return rollouts.map(add_bis, fn_kwargs={"alpha": ALPHA}, load_from_cache_file=False)


def arrow_map(rollouts: Dataset) -> Dataset:
    arrow = rollouts.with_format("arrow")
    return arrow.map(add_bis, batched=True, fn_kwargs={"alpha": ALPHA}, load_from_cache_file=False)


# ---- the clock


def race(contestants: dict[str, Callable[[Path], object]], repeats: int, root: Path) -> tuple[dict, dict]:
    """Seconds of each contestant in each repeat, in the order A B .. B A .. ; and what each returned last."""
    seconds, results = {name: [] for name in contestants}, {}
    for repeat in range(repeats):
        for name in list(contestants)[:: 1 if repeat % 2 == 0 else -1]:
            work = root / name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            start = time.perf_counter()
            results[name] = contestants[name](work)
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


# VmHWM, not ru_maxrss: on exec that one starts from the peak of the process that started this one.
PEAK = """
import re, resource, sys
from trl_mprm.selection.files import select_files
select_files(sys.argv[1], sys.argv[2], fraction=0.1, alpha=0.2)
assert "torch" not in sys.modules
own = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(corpus: Path, work: Path) -> float:
    """Peak MB of a process that selects, its largest worker process added."""
    run = subprocess.run([sys.executable, "-c", PEAK, corpus, work], check=True, capture_output=True, text=True)
    return int(run.stdout.split()[-1]) / 1024


def race_ray(corpus: Path, small: Path, repeats: int, root: Path) -> dict[str, list[float]]:
    """Seconds of a selection on a Ray cluster of one and of two workers, once they are up."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    seconds = {1: [], 2: []}
    for repeat in range(repeats):
        for workers in (1, 2) if repeat % 2 == 0 else (2, 1):
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
            try:
                select_files(str(small), root / "ray-small", fraction=FRACTION, alpha=ALPHA, engine="ray")
                start = time.perf_counter()
                select_files(str(corpus), root / f"ray-{workers}", fraction=FRACTION, alpha=ALPHA, engine="ray")
                seconds[workers].append(time.perf_counter() - start)
            finally:
                ray.shutdown()
    for path in (root / "ray-1").glob("*.jsonl"):
        if path.read_bytes() != (root / "ray-2" / path.name).read_bytes():
            raise ValueError("one and two workers kept different rows")
    return {f"ray, {workers} worker{'s' * (workers > 1)}": times for workers, times in seconds.items()}


# ---- parsers


def parsers() -> dict[str, Callable[[list[Path]], object]]:
    """Ways to read the scores, the question and the image of every row, in one thread: those that are installed."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # read at import
    import msgspec
    import pyarrow.json

    class Step(msgspec.Struct):
        score: float
        num_mc_total: int | None = None

    class Row(msgspec.Struct):
        steps_with_score: list[Step]
        question_orig: str | None = None
        image: str | None = None

    def by_line(parse: Callable[[bytes], object]) -> Callable[[list[Path]], None]:
        def run(files: list[Path]) -> None:
            for path in files:
                with open(path, "rb") as lines:
                    for line in lines:
                        parse(line)

        return run

    def by_orjson() -> Callable[[list[Path]], None]:
        import orjson

        return by_line(orjson.loads)

    def by_simdjson() -> Callable[[list[Path]], None]:
        import simdjson

        parse = simdjson.Parser().parse

        def read(line: bytes) -> None:  # lazy: what is not asked for is not built
            row = parse(line)
            [(step.get("score"), step.get("num_mc_total")) for step in row["steps_with_score"]]
            row.get("question_orig"), row.get("image")

        return by_line(read)

    def by_polars() -> Callable[[list[Path]], None]:
        import polars

        step = polars.Struct({"score": polars.Float64, "num_mc_total": polars.Int64})
        schema = {"steps_with_score": polars.List(step), "question_orig": polars.String, "image": polars.String}
        return lambda files: polars.scan_ndjson(files, schema=schema).collect()

    def by_duckdb() -> Callable[[list[Path]], None]:
        import duckdb

        columns = (
            "{steps_with_score: 'STRUCT(score DOUBLE, num_mc_total INT)[]', question_orig: 'TEXT', image: 'TEXT'}"
        )
        form = f"format='newline_delimited', columns={columns}"

        def run(files: list[Path]) -> None:
            query = f"FROM read_json({[str(path) for path in files]}, {form})"
            duckdb.connect(config={"threads": 1}).sql(query).to_arrow_table()

        return run

    def by_pyarrow(files: list[Path]) -> None:
        step = pa.struct([("score", pa.float64()), ("num_mc_total", pa.int64())])
        schema = pa.schema(
            [("steps_with_score", pa.list_(step)), ("question_orig", pa.string()), ("image", pa.string())]
        )
        parse = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        for path in files:
            pyarrow.json.read_json(path, pyarrow.json.ReadOptions(use_threads=False, block_size=2**23), parse)

    found = {
        "json": by_line(json.loads),
        "msgspec": by_line(msgspec.json.Decoder(Row).decode),
        "pyarrow": by_pyarrow,
    }
    for name, make in {"orjson": by_orjson, "simdjson": by_simdjson, "polars": by_polars, "duckdb": by_duckdb}.items():
        try:
            found[name] = make()
        except ImportError:
            print(f"{name}: not installed, left out")
    return found


def bench_parsers(rows: int, repeats: int, root: Path) -> None:
    write_corpus(root / "corpus", rows)
    files = sorted((root / "corpus").glob("*.jsonl"))
    contestants = {name: lambda work, run=run: run(files) for name, run in parsers().items()}
    seconds, _ = race(contestants, repeats, root)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    table = [[name, min(times), median[name], median["json"] / median[name]] for name, times in seconds.items()]
    print(tabulate(table, headers=["", "min s", "median s", "json / this"], floatfmt=".3f"))


# ---- the whole


def check_agreement(root: Path, results: dict[str, Dataset]) -> None:
    """All kept the same rows, or the times say nothing. The obvious code keeps these and the ties that lie there."""
    kept = {path.name: path.read_bytes() for path in (root / "plain").glob("*.jsonl")}
    questions = [json.loads(line)["question_orig"] for name in sorted(kept) for line in kept[name].splitlines()]
    if any((root / "ours" / name).read_bytes() != lines for name, lines in kept.items()):
        raise ValueError(f"ours and plain kept different rows, see {root}")
    if results["ours_to_dataset"]["prompt"][:] != questions or len(results["hf_path"]) < 0.9 * len(questions):
        raise ValueError("the Hugging Face code kept other rows")
    if results["row_map"]["bis"][:] != results["arrow_map"].with_format(None)["bis"][:]:
        raise ValueError("map by row and map in Arrow format found different scores")


def bench(rows: int, repeats: int, ray_gb: float | None, root: Path) -> dict:
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    datasets.disable_progress_bars()
    corpus, eighth = root / "corpus", root / "corpus-eighth"
    write_corpus(corpus, rows)
    write_corpus(eighth, rows // 8)
    rollouts = load_rollouts(str(corpus))
    contestants = {run.__name__: partial(run, corpus) for run in (read, ours, plain, ours_to_dataset, hf_path)}
    contestants |= {run.__name__: lambda work, run=run: run(rollouts) for run in (arrow_map, row_map)}
    seconds, results = race(contestants, repeats, root)
    check_agreement(root, results)
    memory = {"1x": [], "8x": []}
    for repeat in range(min(repeats, 3)):
        for name, folder in (("1x", eighth), ("8x", corpus)):
            memory[name].append(peak_memory(folder, root / f"memory-{name}-{repeat}"))
    if ray_gb is not None:
        write_corpus(root / "corpus-ray", int(ray_gb * 1e9 / 3500))
        seconds |= race_ray(root / "corpus-ray", eighth, min(repeats, 3), root)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ray_ratio = {} if ray_gb is None else {"ray_2_over_1": median["ray, 2 workers"] / median["ray, 1 worker"]}
    return {
        "plain_over_ours": median["plain"] / median["ours"],
        "ours_over_read": median["ours"] / median["read"],
        "row_map_over_arrow_map": median["row_map"] / median["arrow_map"],
        "hf_path_over_ours": median["hf_path"] / median["ours_to_dataset"],
        "rss_8x_over_1x": statistics.median(memory["8x"]) / statistics.median(memory["1x"]),
        **ray_ratio,
        "rows": rows,
        "repeats": repeats,
        "corpus_mb": sum(path.stat().st_size for path in corpus.glob("*.jsonl")) / 1e6,
        "kept": len(results["ours_to_dataset"]),
        "kept_by_hf_path": len(results["hf_path"]),
        "seconds": seconds,
        "peak_mb": memory,
    }


TARGETS = {
    "plain_over_ours": ("plain Python / ours", ">= 5"),
    "ours_over_read": ("ours / read() of the same bytes", "<= 8"),
    "row_map_over_arrow_map": ("map(add_bis) by row / in Arrow format", ">= 15"),
    "hf_path_over_ours": ("load_dataset + map + filter / ours, to a Dataset", ">= 8"),
    "rss_8x_over_1x": ("peak memory, 8x the rows / 1x", "<= 1.15"),
    "ray_2_over_1": ("Ray, 2 workers / 1 worker", "<= 0.65"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ray", type=float, nargs="?", const=2.0, metavar="GB", help="also Ray, on so many GB")
    parser.add_argument("--parsers", action="store_true", help="only the parsers, those that are installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-select-") as root:
        if args.parsers:
            return bench_parsers(args.rows, args.repeats, Path(root))
        results = bench(args.rows, args.repeats, args.ray, Path(root))
    times = [[name, min(times), statistics.median(times)] for name, times in results["seconds"].items()]
    print(
        f"{results['rows']:,} rollouts, {results['corpus_mb']:.0f} MB, {args.repeats} repeats, {os.cpu_count()} cores"
    )
    print(tabulate(times, headers=["", "min s", "median s"], floatfmt=".3f"), end="\n\n")
    ratios = [[what, results[key], target] for key, (what, target) in TARGETS.items() if key in results]
    print(tabulate(ratios, headers=["ratio of medians", "measured", "wanted"], floatfmt=".2f"))
    print(f"\nkept: {results['kept']:,}; by the obvious code, with its ties: {results['kept_by_hf_path']:,}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
