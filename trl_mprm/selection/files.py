"""Select from files, and write files."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.shards import Paths, plan_shards
from ..data.splits import local_inputs
from ..files import work_folder
from .bis import ALPHA
from .engine import find_engine
from .report import all_wrong_warning, build_report, describe_refused
from .rules import CutSpec, column_to_cut_by
from .summary import merge
from .threshold import find_cut, settle
from .writer import SelectionWriter


logger = logging.getLogger(__name__)


def select_files(
    inputs: Paths,
    output: str | os.PathLike,
    rule: str = "bis",
    *,
    fraction: float,
    alpha: float = ALPHA,
    ties: str = "first",
    seed: int = 0,
    by: str = "source",
    column: str | None = None,
    image_root: str | os.PathLike | None = None,
    drop_answer_step: bool = False,
    strict: bool = False,
    save_to_disk: bool = False,
    push_to_hub: str | None = None,
    license: str | None = None,
    engine: str = "local",
    page: str | os.PathLike | None = None,
    split: str = "train",
) -> dict:
    """
    Select from files, and write files: keep the rows that [`select`] keeps of [`load_rollouts`], in their own format.

    Writes, each whole or not at all, the kept rows, `selection.json` beside them, and `refused.jsonl` (file, line,
    reason) if any row was refused. A `*.jsonl` output holds the kept lines unchanged, byte for byte; a `*.parquet`
    output holds them in the row type of [`load_rollouts`], with all other fields as text; any other name is a folder
    with one JSONL file per input file. An interrupted run leaves nothing under these names, and running it again gives
    the same bytes.

    Args:
        inputs (`str`, path, or `list` of paths):
            As in [`load_rollouts`].
        output (`str` or path):
            `*.jsonl`, `*.parquet`, or a folder.
        by (`str`, *optional*, defaults to `"source"`):
            `"source"` keeps the top fraction of each source, `"corpus"` that of all rows together.
        column (`str`, *optional*):
            For the rule `column`: the field of a row to rank by, highest first. A row without a number there is
            refused as `no_score`.
        image_root (`str` or path, *optional*):
            Folder of the images. Defaults to the folder of each file; if no image at all is found there, the
            annotations are taken to have come without images, which are then not checked (the report says so).
        drop_answer_step (`bool`, *optional*, defaults to `False`):
            Treat a last step that states the final answer as not measured. JSONL lines stay unchanged, so pass the same
            value to [`load_rollouts`].
        strict (`bool`, *optional*, defaults to `False`):
            Raise if any row is refused, and write nothing.
        save_to_disk (`bool`, *optional*, defaults to `False`):
            Make `output` a folder for `datasets.load_from_disk`.
        push_to_hub (`str`, *optional*):
            Also publish the kept rows, with their images and a card, as this dataset on the Hub.
        license (`str`, *optional*):
            Licence on that card, as a Hub identifier. Defaults to that of the source if it is a dataset on the Hub.
        engine (`str`, *optional*, defaults to `"local"`):
            `"local"` runs one process per core, `"ray"` the workers of a Ray cluster. Both give the same bytes.
        page (`str` or path, *optional*):
            Also write an HTML page about the selection to this path, see [`~trl_mprm.selection.page`].
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset on the Hub, or of a folder with splits in its names, as in [`load_rollouts`].

    Returns:
        `dict`: The content of `selection.json`. [`report_table`] turns it into table rows.

    Examples:
    ```python
    >>> import json, pathlib, tempfile
    >>> from trl_mprm.selection.files import select_files
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> rows = [{"prompt": "?", "completions": ["a", "b"], "labels": labels} for labels in ([1, 1], [1, 0], ["1", 0])]
    >>> _ = (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    >>> report = select_files(folder / "toy.jsonl", folder / "kept", fraction=0.5)
    >>> print((folder / "kept" / "toy.jsonl").read_text().strip())
    {"prompt": "?", "completions": ["a", "b"], "labels": [1, 0]}
    >>> report["total"]["read"], report["total"]["refused"], report["total"]["kept"]
    (3, {'score_not_a_number': 1}, 1)

    ```
    """
    spec = CutSpec(rule, fraction=fraction, alpha=alpha, ties=ties, seed=seed, by=column_to_cut_by(by), column=column)
    if push_to_hub is not None:
        from . import publish

        publish.check_name(push_to_hub)
    shards = plan_shards(local_inputs(inputs, split))
    writer = SelectionWriter(Path(output), shards, inputs, save_to_disk, image_root, page)

    with find_engine(engine)(shards, image_root, drop_answer_step, spec=spec) as run:
        summary = merge(run.summaries(strict))
        cut = find_cut(summary, spec, images_required=image_root is not None)
        refused = describe_refused(summary, cut)
        if strict and refused:
            raise ValueError(f"{inputs}: {refused[0]}, and strict allows none")
        for line in refused:
            logger.warning(line)
        if not cut.check_images:
            logger.warning("%s: not one image of these rollouts is on this disk: selecting without them", inputs)
        if not cut.valid.any():
            raise ValueError(f"{inputs}: no row can be used. {'; '.join(refused) or 'No rows at all.'}")
        while not cut.settled:
            cut = settle(cut, run.ties(cut))
        writer.folder.mkdir(parents=True, exist_ok=True)
        with _room_left(writer.folder), work_folder(writer.folder, "select") as parts:
            emitted = run.emit(cut, parts)
            kept = merge(shard.summary for shard in emitted)
            report = build_report(cut, summary, kept) | {
                "inputs": writer.inputs,
                "images": "checked" if cut.check_images else "not checked",
                "drop_answer_step": drop_answer_step,
                **({} if split == "train" else {"split": split}),
            }
            if warning := all_wrong_warning(report):
                logger.warning(warning)
            text = None
            if page is not None:
                from .page import draw_selection_report

                text = draw_selection_report(report, summary, kept, cut, run)
            writer.write(report, emitted, parts, text)
            if push_to_hub is not None:
                publish.push_to_hub(writer, push_to_hub, report, emitted, parts, license)
    return report


@contextmanager
def _room_left(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            f"{folder}: expected room for the kept rows and for a copy of them, got {error.strerror!r}: free some and "
            "run again; no output was touched"
        ) from error
