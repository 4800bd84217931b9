"""
Read lines in the first pass, batch by batch and in two ways (see [`~trl_mprm.selection.passes`]), and keep their scores.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, repeat
from operator import attrgetter
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from ..data.formats import IMAGE_PLACE, parse, states_answer, to_row
from ..data.images import ImageFinder
from ..data.rows import Refused, image_list, own_text, question_key
from ..data.shards import Shard
from .bis import step_sums
from .summary import (
    IMAGE_MISSING,
    KIND,
    NO_IMAGES,
    REASONS,
    Scores,
    unique_rows,
)


REASON_NUMBERS = {reason: number for number, reason in enumerate(REASONS)}


class _Step(msgspec.Struct, gc=False):
    step: str
    score: Annotated[float, msgspec.Meta(ge=0, le=1)]
    num_mc_total: int | None = None


class _Raw(msgspec.Struct, gc=False):
    """The fields of a raw record that decide about it. A record with other types is read the careful way."""

    steps_with_score: list[_Step]
    question_orig: str | None = None
    question: msgspec.Raw = msgspec.Raw()  # long: read only where question_orig is missing
    prompt: str | None = None
    image: str | tuple[str, ...] | None = None
    images: str | tuple[str, ...] | None = None
    image_url: str | tuple[str, ...] | None = None
    source: str | None = None
    rollout_id: str | None = None


_decode = msgspec.json.Decoder(_Raw).decode

_decode_text = msgspec.json.Decoder(str | None).decode

_steps, _step, _score, _total, _rollout_id = map(
    attrgetter, ("steps_with_score", "step", "score", "num_mc_total", "rollout_id")
)


class _Columns(NamedTuple):
    """The facts kept about some lines: one entry per line, except `scores`, which has one per measured step."""

    state: list[int]
    group: list[int]
    n_steps: list[int]
    length: list[int]
    check: list[int]
    words: list[int]
    scores: list[float]


class _Arrays(NamedTuple):
    """The same as arrays; the scores of a line have become three numbers."""

    state: np.ndarray
    n_steps: np.ndarray
    n_pos: np.ndarray
    mc_sum: np.ndarray
    group: np.ndarray
    length: np.ndarray
    check: np.ndarray
    words: np.ndarray


class LineReader:
    """Collects the facts kept about the lines of a shard, batch by batch."""

    def __init__(
        self,
        source: str,
        sources: list[str],
        finder: ImageFinder,
        drop_answer_step: bool = False,
        count_words: bool = False,
    ):
        self.source, self.sources, self.finder = source, sources, finder
        self.drop_answer_step, self.count_words = drop_answer_step, count_words
        self.unread = ImageFinder(None, check=False)
        self.states: dict[tuple[str, int, int], int] = {("", -1, -1): 0}  # source, reason, unread; 0: a blank line
        # Rows of one question stand together: the last source, question and images, and their state and group.
        self.last: tuple[tuple, tuple[int, int]] = (), (0, 0)
        self.absent: dict[tuple[str, str], int] = {}  # source, folder that is not there: state of its rows
        self.n_lines = 0
        self.own_ids: dict[int, str] = {}  # by line
        self.columns = _Columns(*([] for _ in _Columns._fields))
        self.arrays: list[_Arrays] = []

    def add(self, lines: list[bytes], utf8: bool | None = None) -> None:
        """Read some lines. `utf8` says whether they are UTF-8, if that is known."""
        if utf8 is None:
            utf8 = is_utf8(b"".join(lines))
        # The narrow way does not look into the strings that it skips: they must be UTF-8 all the same.
        if utf8 and self._narrow(lines):
            return
        if len(lines) == 1:
            self._careful(lines[0])
            return
        half = len(lines) // 2  # something about them is unusual: find out which
        self.add(lines[:half], utf8 or None)
        self.add(lines[half:], utf8 or None)

    def _narrow(self, lines: list[bytes]) -> bool:
        """Read lines if none of them is unusual; else keep nothing and return False."""
        try:
            rows = list(map(_decode, lines))
            found = self._groups(rows)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        if found is None:
            return False
        counts = list(map(len, map(_steps, rows)))
        steps = list(chain.from_iterable(map(_steps, rows)))
        texts, scores, totals = (list(map(field, steps)) for field in (_step, _score, _total))
        if not all(counts) or not all(map(str.strip, texts)):
            return False
        if self.drop_answer_step or 0 in totals:
            ends = list(accumulate(counts))
            if self.drop_answer_step:
                for end in ends:
                    if states_answer(texts[end - 1]):
                        totals[end - 1] = 0
            scores = [score for score, total in zip(scores, totals, strict=True) if total != 0]
            counts = [sum(total != 0 for total in totals[end - n : end]) for end, n in zip(ends, counts, strict=True)]
            if not all(counts):
                return False
        ids = list(map(_rollout_id, rows))
        if any(ids):
            self.own_ids |= {number: own for number, own in enumerate(ids, self.n_lines) if own}
        self._append(lines, *found, counts, scores)
        if self.count_words:
            n_words = [len(text.split()) for text, total in zip(texts, totals, strict=True) if total != 0]
            ends = list(accumulate(counts))
            self.columns.words.extend(sum(n_words[end - n : end]) for end, n in zip(ends, counts, strict=True))
        return True

    def _groups(self, rows: list[_Raw]) -> tuple[list[int], list[int]] | None:
        """States and groups of rows; None if one of them has no question."""
        sources = self.sources[self.n_lines : self.n_lines + len(rows)]
        if len(sources) < len(rows):
            sources = repeat(self.source)
        states, groups = [], []
        last, (state, group) = self.last
        for row, source in zip(rows, sources, strict=False):
            images = row.images or row.image or row.image_url or ()
            key = row.source or source, row.question_orig or _question(row), images
            if key != last:
                prompt = _prompt(key[1])
                if not prompt:
                    return None
                find = self._group_of_path if isinstance(images, str) else self._group
                state, group = find(key[0], prompt, images)
                last = key
            states.append(state)
            groups.append(group)
        self.last = last, (state, group)
        return states, groups

    def _careful(self, line: bytes) -> None:
        """Read a line as `load_rollouts` does, which says why it is refused."""
        own_id, scores, texts = None, [], []
        if line.isspace():
            state, group = 0, 0
        else:
            record = parse(line)
            source = self.sources[self.n_lines] if self.n_lines < len(self.sources) else self.source
            source = own_text(record, "source") or source
            try:
                row = to_row(record, self.drop_answer_step)
            except Refused as refused:
                reason = REASONS.index(refused.reason)
                state, group = self._state(source, reason, reason), 0
            else:
                scores = [score for score in row["mc_scores"] if score is not None]
                texts = [
                    text for text, score in zip(row["completions"], row["mc_scores"], strict=True) if score is not None
                ]
                own_id = own_text(record, "rollout_id")
                state, group = self._group(source, row["prompt"], image_list(record))
        if own_id:
            self.own_ids[self.n_lines] = own_id
        self._append([line], [state], [group], [len(scores)], scores)
        if self.count_words:
            self.columns.words.append(sum(len(text.split()) for text in texts))

    def _append(
        self, lines: list[bytes], states: list[int], groups: list[int], counts: list[int], scores: list[float]
    ) -> None:
        self.n_lines += len(lines)
        self.columns.state.extend(states)
        self.columns.group.extend(groups)
        self.columns.n_steps.extend(counts)
        self.columns.length.extend(map(len, lines))
        self.columns.check.extend(map(xxhash.xxh3_64_intdigest, lines))
        self.columns.scores.extend(scores)

    def _group_of_path(self, source: str, prompt: str, image: str) -> tuple[int, int]:
        """The same for one image, faster where its folder is not on this disk: annotations often come without."""
        cut = image.rfind("/") + 1
        key = source, image[:cut]
        state = self.absent.get(key)
        if image[cut:] in ("", ".", ".."):  # not in that folder
            return self._group(source, prompt, (image,))
        if state is not None:
            return state, group_hash(source, prompt, (image,))
        state, group = self._group(source, prompt, (image,))
        if self.finder.lacks(image[:cut]):
            self.absent[key] = state
        return state, group

    def _group(self, source: str, prompt: str, images: Sequence) -> tuple[int, int]:
        """State and group of a row whose text and scores are good; its images may not be."""
        found = [*map(self.finder.look, images)]
        reason = unread = _fault(found)
        if reason == IMAGE_MISSING:  # and if images are not looked for?
            found = [*map(self.unread.look, images)]
            unread = _fault(found)
        elif reason < 0 and not found:
            unread = NO_IMAGES
        return self._state(source, reason, unread), group_hash(source, prompt, found) if unread < 0 else 0

    def _state(self, source: str, reason: int, unread: int) -> int:
        return self.states.setdefault((source, reason, unread), len(self.states))

    def to_arrays(self) -> None:
        """Turn the numbers of lines into arrays, which take a tenth of the space."""
        columns = self.columns
        n_steps, n_pos, mc_sum, _ = step_sums(
            np.fromiter(columns.scores, np.float64), np.append(0, np.cumsum(np.fromiter(columns.n_steps, np.int64)))
        )
        self.arrays.append(
            _Arrays(
                np.fromiter(columns.state, np.int32),
                n_steps,
                n_pos,
                mc_sum,
                np.fromiter(columns.group, np.uint64),
                np.fromiter(columns.length, np.uint32),
                np.fromiter(columns.check, np.uint64).astype(np.uint32),
                np.fromiter(columns.words, np.uint32),
            )
        )
        for column in columns:
            column.clear()

    def scores(self, shard: Shard) -> Scores:
        self.to_arrays()
        lines = _Arrays(*map(np.concatenate, zip(*self.arrays, strict=True)))
        first, kind = unique_rows([lines.state, lines.n_steps, lines.n_pos, lines.mc_sum])
        kinds = np.empty(len(first), KIND)
        names, reason, unread = zip(*self.states, strict=True)
        sources = {name: number for number, name in enumerate(dict.fromkeys(names[1:]))}
        source = [-1, *map(sources.get, names[1:])]
        for name, column in {"source": source, "reason": reason, "unread": unread}.items():
            kinds[name] = np.array(column)[lines.state[first]]
        for name in ("n_steps", "n_pos", "mc_sum"):
            kinds[name] = getattr(lines, name)[first]
        if len(first) and lines.state[first[0]] == 0:  # blank lines come first
            kinds, kind = kinds[1:], kind - 1
        ids = pa.array(map(self.own_ids.get, range(len(kind))), pa.string()) if self.own_ids else None
        return Scores(
            shard.index,
            shard.place,
            shard.source,
            tuple(sources),
            kinds,
            kind.astype(np.int32),
            lines.group,
            lines.length,
            lines.check,
            self.drop_answer_step,
            ids=ids,
            words=lines.words if self.count_words else None,
        )


def _question(row: _Raw) -> str | None:
    return (_decode_text(row.question) if bytes(row.question) else None) or row.prompt


def _prompt(question: str | None) -> str:
    if question is None:
        return ""
    return (IMAGE_PLACE.sub("", question) if "<image>" in question else question).strip()


def _fault(images: list) -> int:
    """The reason for refusing the first unusable one; -1 if all are usable."""
    for image in images:
        if isinstance(image, Refused):
            return REASON_NUMBERS[image.reason]
    return -1


def checksum(line: bytes) -> int:
    return xxhash.xxh3_64_intdigest(line) & 0xFFFFFFFF


def is_utf8(text: bytes) -> bool:
    """Give the same answer as `text.decode()`, several times faster."""
    if text.isascii():
        return True
    offsets = pa.py_buffer(np.array([0, len(text)], np.int64))
    try:
        pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(text)]).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def group_hash(source: str, prompt: object, images: Iterable) -> int:
    """Number the group of rollouts that share an image and a question; the number is the same on every machine."""
    try:
        text = "\0".join((source, prompt, *images))
    except TypeError:  # not all of them are paths
        text = "\0".join((source, *question_key(prompt, images)))
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))
