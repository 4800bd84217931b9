"""
How fast is a selection within one process? Against the obvious Hugging Face code, one read of the bytes, other parsers.

    python recipes/bench/select_peers.py                             # 120,000 rollouts, 420 MB, about 5 minutes
    python recipes/bench/select_peers.py --rows 20000 --json bench.json
    python recipes/bench/select_peers.py --ray                       # also Ray, 2 workers against 1, on 2 GB
    python recipes/bench/select_peers.py --rows 20000 --parsers      # only the parsers, one thread each

What the command costs as a whole process, and against plain Python, is measured by `select.py`. The corpus comes from a
seed, see `rollout_corpus.py`. The contestants run interleaved, forwards and backwards in turn (ABBA), so that a slow
minute of the machine hits all of them; the ratios are ratios of medians.

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
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, load_dataset
from rollout_corpus import write_corpus
from tabulate import tabulate

from trl_mprm import add_bis, load_rollouts
from trl_mprm.selection.files import select_files


FRACTION, ALPHA = 0.1, 0.2


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
    """The function that `trl-mprm select` runs."""
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
    rollouts = load_rollouts(str(corpus))
    contestants = {run.__name__: partial(run, corpus) for run in (read, ours, plain, ours_to_dataset, hf_path)}
    contestants |= {run.__name__: lambda work, run=run: run(rollouts) for run in (arrow_map, row_map)}
    seconds, results = race(contestants, repeats, root)
    check_agreement(root, results)
    if ray_gb is not None:
        write_corpus(root / "corpus-ray", int(ray_gb * 1e9 / 3500))
        write_corpus(eighth, rows // 8)
        seconds |= race_ray(root / "corpus-ray", eighth, min(repeats, 3), root)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ray_ratio = {} if ray_gb is None else {"ray_2_over_1": median["ray, 2 workers"] / median["ray, 1 worker"]}
    return {
        "plain_over_ours": median["plain"] / median["ours"],
        "ours_over_read": median["ours"] / median["read"],
        "row_map_over_arrow_map": median["row_map"] / median["arrow_map"],
        "hf_path_over_ours": median["hf_path"] / median["ours_to_dataset"],
        **ray_ratio,
        "rows": rows,
        "repeats": repeats,
        "corpus_mb": sum(path.stat().st_size for path in corpus.glob("*.jsonl")) / 1e6,
        "kept": len(results["ours_to_dataset"]),
        "kept_by_hf_path": len(results["hf_path"]),
        "seconds": seconds,
    }


TARGETS = {
    "plain_over_ours": ("plain Python / ours", ">= 5"),
    "ours_over_read": ("ours / read() of the same bytes", "<= 8"),
    "row_map_over_arrow_map": ("map(add_bis) by row / in Arrow format", ">= 15"),
    "hf_path_over_ours": ("load_dataset + map + filter / ours, to a Dataset", ">= 8"),
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
