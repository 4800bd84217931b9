"""
The miniature world: pictures, questions, a policy that slips, and Monte Carlo step scores.

A picture is a 3x3 grid of tiles. Every tile has its own colour and shows one digit. A question names some tiles:

    add red blue pink            the digits are added, modulo 10
    from 4 take red blue pink    the digits are taken away, modulo 10
    add red blue pink options 3 8         the same, with the answers to choose from in the question

The policy says where it starts (a step that only restates the question), reads one tile per step and states the running
value; the last step is the answer:

    from 0      red is 7 total 7      blue is 5 total 2      pink is 9 total 1      answer 1

The policy slips now and then, mostly on the one tile of the problem that it finds hard; a slip spoils every later value
until the policy notices ("wait blue is 5 total 2"). If its value is not among the options, it guesses one of them. With
options, a continuation from a wrong step is therefore often right by luck: the Monte Carlo score is above 0 and the label
positive although the step is wrong. This is the systematic label noise of VisualPRM400K's multiple-choice sources.

A step is right when what it states is true: the digit is the one in the picture, and the value is the value of all the
tiles so far. The score of a step is measured, never derived: 16 continuations of the same policy from that prefix.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont


COLOURS = {
    "red": (214, 48, 49), "orange": (240, 147, 43), "yellow": (249, 214, 60),
    "green": (46, 160, 67), "blue": (38, 103, 214), "purple": (136, 71, 190),
    "pink": (244, 143, 190), "brown": (128, 84, 52), "grey": (128, 136, 144),
}  # fmt: skip
NAMES = list(COLOURS)
TILE = 28  # pixels: one tile is one merged image token of Qwen2.5-VL (patch 14, merge 2)
READ, WAIT, ANSWER, OPEN = 0, 1, 2, 3  # kinds of step


def draw_tile(colour: int, digit: int) -> Image.Image:
    """Draw one 28x28 tile: a rounded coloured square with a digit."""
    tile = Image.new("RGB", (TILE, TILE), (250, 248, 242))
    pen = ImageDraw.Draw(tile)
    pen.rounded_rectangle((1, 1, TILE - 2, TILE - 2), radius=5, fill=COLOURS[NAMES[colour]])
    font = ImageFont.load_default(size=20)
    middle = (TILE / 2, TILE / 2)
    pen.text(middle, str(digit), fill="white", font=font, anchor="mm", stroke_width=1, stroke_fill="black")
    return tile


def draw_tiles() -> np.ndarray:
    """All tiles, uint8 of shape (9 colours, 10 digits, 28, 28, 3)."""
    return np.stack([np.stack([np.asarray(draw_tile(c, d)) for d in range(10)]) for c in range(len(NAMES))])


def draw_grids(colours: np.ndarray, digits: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Pictures of shape (n, 84, 84, 3) of n grids; `colours` and `digits` are (n, 9) in reading order."""
    grid = tiles[colours, digits].reshape(-1, 3, 3, TILE, TILE, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * TILE, 3 * TILE, 3)


@dataclass(frozen=True)
class Policy:
    """
    How often the scripted policy slips, notices and guesses.

    Args:
        hard_rates (`tuple[float, ...]`):
            Chance of a slip on the hard tile; each problem draws one of these.
        hard_weights (`tuple[float, ...]`):
            How often each of them is drawn.
        slip (`float`):
            Chance of a slip on any other tile.
        notice_rates (`tuple[float, ...]`):
            Chance per step of noticing an earlier slip; each problem draws one of these.
        notice_weights (`tuple[float, ...]`):
            How often each of them is drawn.
    """

    hard_rates: tuple[float, ...]
    hard_weights: tuple[float, ...]
    slip: float
    notice_rates: tuple[float, ...]
    notice_weights: tuple[float, ...]
    misread: float = 0.5  # share of slips that misread the digit; the others get the arithmetic wrong


@dataclass
class Problems:
    """Arrays of n problems; `path` holds grid positions, -1 after the end, `truth[:, i]` the value after i tiles."""

    picture: np.ndarray  # (n,) number of the picture
    colours: np.ndarray  # (n, 9) colour of each grid position
    digits: np.ndarray  # (n, 9) digit of each grid position
    path: np.ndarray  # (n, longest)
    length: np.ndarray  # (n,)
    sign: np.ndarray  # (n,) +1 add, -1 take away
    truth: np.ndarray  # (n, longest + 1)
    options: np.ndarray  # (n,) 0 open, else how many options
    offered: np.ndarray  # (n, 10) bool: the values offered
    reference: np.ndarray  # (n,) the answer that the data set believes in, not always the true one
    hard: np.ndarray  # (n,) index into the path
    hard_rate: np.ndarray  # (n,)
    notice_rate: np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.length)

    def source(self, i: int) -> str:
        """Name of the question family, the file that the problem is written to."""
        kind = "sum" if self.sign[i] > 0 else "countdown"
        return kind if self.options[i] == 0 else f"{kind}-{self.options[i]}"

    def question(self, i: int) -> str:
        tiles = " ".join(NAMES[self.colours[i, p]] for p in self.path[i, : self.length[i]])
        text = f"add {tiles}" if self.sign[i] > 0 else f"from {self.truth[i, 0]} take {tiles}"
        if self.options[i]:
            text += " options " + " ".join(str(v) for v in np.flatnonzero(self.offered[i]))
        return text


def make_problems(
    n: int,
    policy: Policy,
    rng: np.random.Generator,
    lengths: tuple[int, ...] = (3, 4, 5, 6),
    options: tuple[tuple[int, float], ...] = ((0, 0.6), (2, 0.2), (4, 0.2)),
    wrong_reference: float = 0.0,
    per_picture: int = 4,
) -> Problems:
    """
    Draw `n` problems.

    Args:
        n (`int`):
            Number of problems.
        policy (`Policy`):
            Policy, which determines how hard each problem is.
        rng (`numpy.random.Generator`):
            Source of randomness.
        lengths (`tuple[int, ...]`):
            Numbers of tiles, equally likely.
        options (`tuple[tuple[int, float], ...]`):
            Pairs of a number of options (0: open question) and its share.
        wrong_reference (`float`, *optional*, defaults to `0.0`):
            Share of problems whose reference answer is wrong, as happens in real data.
        per_picture (`int`, *optional*, defaults to `4`):
            Consecutive problems that ask about one picture.
    """
    longest, rows = max(lengths), np.arange(n)
    picture = rows // per_picture
    colours = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[picture]
    digits = rng.integers(1, 10, (n, 9))[picture]
    length = rng.choice(lengths, n)
    path = rng.permuted(np.tile(np.arange(9), (n, 1)), axis=1)[:, :longest]
    path[np.arange(longest) >= length[:, None]] = -1
    sign = rng.choice([1, -1], n)
    start = np.where(sign > 0, 0, rng.integers(0, 10, n))
    moves = np.where(path >= 0, np.take_along_axis(digits, path.clip(0), axis=1), 0) * sign[:, None]
    truth = (start[:, None] + np.concatenate([np.zeros((n, 1), int), moves.cumsum(axis=1)], axis=1)) % 10
    answer = truth[rows, length]
    counts, shares = zip(*options, strict=True)
    number = rng.choice(counts, n, p=shares)
    order = rng.random((n, 10))
    order[rows, answer] = -1.0  # the true answer is always among the options
    offered = np.argsort(np.argsort(order, axis=1), axis=1) < number[:, None]
    # A wrong reference is another offered value, or any other value where the question is open.
    others = np.where(offered | (number == 0)[:, None], rng.random((n, 10)), -1.0)
    others[rows, answer] = -1.0
    reference = np.where(rng.random(n) < wrong_reference, others.argmax(axis=1), answer)
    return Problems(
        picture, colours, digits, path, length, sign, truth, number, offered, reference,
        hard=(rng.random(n) * length).astype(int),
        hard_rate=rng.choice(policy.hard_rates, n, p=policy.hard_weights),
        notice_rate=rng.choice(policy.notice_rates, n, p=policy.notice_weights),
    )  # fmt: skip


@dataclass
class State:
    """The state of m rollouts: `done` tiles read, the stated `value`, the tile of the last slip, the final answer."""

    problem: np.ndarray  # (m,) index into Problems
    done: np.ndarray
    value: np.ndarray
    slipped: np.ndarray  # index into the path
    answer: np.ndarray  # -1 until given

    @classmethod
    def start(cls, problems: Problems, problem: np.ndarray) -> "State":
        zero = np.zeros(len(problem), int)
        return cls(problem, zero.copy(), problems.truth[problem, 0].copy(), zero.copy(), zero - 1)

    def take(self, index: np.ndarray) -> "State":
        return State(*(getattr(self, name)[index] for name in ("problem", "done", "value", "slipped", "answer")))


def advance(problems: Problems, state: State, policy: Policy, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """
    Let every rollout (none of them finished) take one step, in place.

    Returns:
        `tuple`: arrays kind, tile (index into the path), digit, value, right (is what the step states true?).
    """
    p, m = state.problem, len(state.problem)
    truth = problems.truth[p, state.done]
    astray = state.value != truth
    wait = astray & (rng.random(m) < problems.notice_rate[p])
    final = ~wait & (state.done == problems.length[p])
    read = ~wait & ~final

    tile = np.where(read, state.done, state.slipped)
    shown = problems.digits[p, problems.path[p, tile]]
    rate = np.where(tile == problems.hard[p], problems.hard_rate[p], policy.slip)
    slip = read & (rng.random(m) < rate)
    misread = slip & (rng.random(m) < policy.misread)
    digit = np.where(misread, (shown - 1 + rng.integers(1, 9, m)) % 9 + 1, shown)
    miscount = np.where(slip & ~misread, rng.integers(1, 10, m), 0)
    stepped = (state.value + problems.sign[p] * digit + miscount) % 10

    # The answer is the value, or a guess among the options where the value is not one of them.
    lost = (problems.options[p] > 0) & ~problems.offered[p, state.value]
    guess = np.where(problems.offered[p], rng.random((m, 10)), -1.0).argmax(axis=1)
    answer = np.where(lost, guess, state.value)

    value = np.where(read, stepped, np.where(wait, truth, answer))
    state.done = state.done + read
    state.value = np.where(final, state.value, value)
    state.slipped = np.where(slip, tile, state.slipped)
    state.answer = np.where(final, answer, state.answer)
    right = ~misread & (value == problems.truth[p, state.done])
    kind = np.where(final, ANSWER, np.where(wait, WAIT, READ))
    return kind, tile, digit, value, right


def finish(problems: Problems, state: State, policy: Policy, rng: np.random.Generator) -> np.ndarray:
    """Play every rollout to its end and return the answers; `state` is left as it was."""
    answers = state.answer.copy()
    open_ = np.flatnonzero(answers < 0)
    running = state.take(open_)
    while len(open_):
        advance(problems, running, policy, rng)
        answers[open_] = running.answer
        left = running.answer < 0
        open_, running = open_[left], running.take(left)
    return answers


@dataclass
class Steps:
    """Arrays (m rollouts, most steps), kind -1 after the end; `correct` counts right continuations out of `num_mc`."""

    problem: np.ndarray
    kind: np.ndarray
    tile: np.ndarray
    digit: np.ndarray
    value: np.ndarray
    right: np.ndarray
    correct: np.ndarray
    num_mc: int


def roll_out(
    problems: Problems, problem: np.ndarray, policy: Policy, rng: np.random.Generator, num_mc: int = 16
) -> Steps:
    """Roll the policy out once for each entry of `problem`; after every step play `num_mc` continuations."""
    state, m = State.start(problems, problem), len(problem)
    columns: list[np.ndarray] = []
    running = np.arange(m)
    while len(running):
        record = np.full((5, m), -1)
        if not columns:
            record[:] = [np.full(m, OPEN), *np.zeros((2, m), int), state.value, np.ones(m, int)]
        else:
            part = state.take(running)
            record[:, running] = advance(problems, part, policy, rng)
            for name in ("done", "value", "slipped", "answer"):
                getattr(state, name)[running] = getattr(part, name)
        correct = np.zeros(m, int)
        if num_mc:
            many = state.take(np.repeat(running, num_mc))
            hit = finish(problems, many, policy, rng) == problems.reference[many.problem]
            correct[running] = hit.reshape(-1, num_mc).sum(axis=1)
        columns.append(np.concatenate([record, correct[None]]))
        running = running[state.answer[running] < 0]
    kind, tile, digit, value, right, correct = np.stack(columns, axis=2)
    return Steps(problem, kind, tile, digit, value, right == 1, correct, num_mc)


def step_texts(problems: Problems, steps: Steps, j: int) -> list[str]:
    """The steps of rollout `j` in words."""
    i = steps.problem[j]
    word = "total" if problems.sign[i] > 0 else "left"
    texts = []
    for kind, tile, digit, value in zip(steps.kind[j], steps.tile[j], steps.digit[j], steps.value[j], strict=True):
        if kind < 0:
            break
        colour = NAMES[problems.colours[i, problems.path[i, tile]]]
        stated = f"{colour} is {digit} {word} {value}"
        texts.append([stated, f"wait {stated}", f"answer {value}", f"from {value}"][kind])
    return texts


def true_labels(steps: Steps, j: int) -> list[int]:
    """1 where the step states the truth, 0 where it does not, -1 where it states nothing."""
    kinds = steps.kind[j][steps.kind[j] >= 0]
    return [-1 if kind == OPEN else int(right) for kind, right in zip(kinds, steps.right[j], strict=False)]
