"""Publish kept rows as a dataset on the Hub."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..data.hub import is_hub_id, public_name
from ..data.rollouts import chunks
from ..files import write_json
from .dataset_card import dataset_card
from .passes import KeptRows
from .writer import SelectionWriter, hashes


PARQUET_BYTES = 2**29  # per file


def check_name(repo_id: str) -> None:
    """Raise before a selection runs if it cannot be published under this name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"push_to_hub: expected the name of a dataset on the Hub, as you/kept, got {repo_id!r}: {error}"
        ) from error


def push_to_hub(
    writer: SelectionWriter,
    repo_id: str,
    report: dict,
    emitted: list[KeptRows],
    parts: Path,
    license: str | None = None,
) -> None:
    """Publish the kept rows with their images, a card and `selection.json` in one commit."""
    folder = parts / "hub"
    files = _write_parquet(writer, report, emitted, parts, folder / "data")
    api = HfApi()
    try:
        infos = {item: api.dataset_info(item) for item in writer.inputs if is_hub_id(item)}
        public = report | {
            "inputs": list(map(public_name, writer.inputs)),
            "input_revisions": {item: info.sha for item, info in infos.items()},
            "output": {f"data/{name}": facts for name, facts in hashes(files).items()},
        }
        licenses = {info.card_data and info.card_data.license for info in infos.values()} - {None}
        write_json(public, folder / "selection.json")
        card = dataset_card(repo_id, public, license or (licenses.pop() if len(licenses) == 1 else None))
        card.save(folder / "README.md")
        api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo_id, repo_type="dataset", commit_message="Rollouts of trl-mprm select"
        )
    except (HTTPError, OSError) as error:
        raise OSError(
            f"dataset {repo_id} was not published ({type(error).__name__}: {error}). The kept rollouts are in "
            f"{writer.output}, with their evidence: when the Hub can be reached and you are logged in (hf auth login), "
            "run the same command again"
        ) from error


def _write_parquet(
    writer: SelectionWriter, report: dict, emitted: list[KeptRows], parts: Path, folder: Path
) -> list[Path]:
    rows = writer.rows(emitted, parts, report, resolve=True)
    schema = writer.features(rows()).arrow_schema
    folder.mkdir(parents=True)
    files: list[Path] = []
    parquet = None
    for chunk in chunks(rows(), 100):
        if parquet is None:
            files.append(folder / f"{len(files)}.parquet")
            parquet = pq.ParquetWriter(files[-1], schema)
        parquet.write_table(embed_table_storage(pa.Table.from_pylist(chunk, schema=schema)))
        if files[-1].stat().st_size > PARQUET_BYTES:
            parquet.close()
            parquet = None
    if parquet is not None:
        parquet.close()
    return [
        file.rename(folder / f"train-{number:05d}-of-{len(files):05d}.parquet") for number, file in enumerate(files)
    ]
