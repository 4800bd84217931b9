"""
Draw continuations of steps, and pay for each only once.

    visit   rollout "AI2D:3", steps 0, 1 and 2, four draws each
    ->      three requests to the policy, less the draws that the progress file already holds
    ->      every text is checked: right, wrong, or None if it was cut off
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .budget import Tally
from .checkers import Checker
from .policies import STOP, Parked, Policy, Reply, Request
from .progress import Progress
from .questions import Rollout


BATCH = 512  # rollouts that a policy gets at once


def draw_seed(seed: int, rollout: str, step: int) -> int:
    """Return the seed of the first draw of a step; draw `i` adds `i` to it. It is below 2**31, which every server accepts."""
    digest = hashlib.blake2b(f"{seed}\0{rollout}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**31 - 2**16)


class Drawing:
    """
    Draws continuations through a policy, and records them.

    Args:
        policy ([`Policy`]):
            The policy that continues solutions.
        checker (`Callable`):
            See [`~trl_mprm.annotation.checkers`].
        progress ([`Progress`]):
            The draws that were paid for so far.
        seed (`int`):
            Seed of all draws.
        bar (`tqdm`):
            Shows draws, tokens and cost.
        price (`float`, *optional*):
            Price of a million computed tokens.
    """

    def __init__(
        self, policy: Policy, checker: Checker, progress: Progress, seed: int, bar: tqdm, price: float | None = None
    ):
        self.policy, self.checker, self.progress, self.seed, self.bar = policy, checker, progress, seed, bar
        self.price = price
        self.parked: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()

    def solve(self, questions: Sequence[Rollout], n: int, max_steps: int) -> tuple[list[Rollout], Counter[str]]:
        """Sample `n` solutions of each question; return them as rollouts, and the number of lost ones by finish reason."""
        missing = [question for question in questions if (question.id, question.key) not in self.progress.solutions]
        requests = [Request(f"row {q.id}", q.images, q.prompt, (), n, draw_seed(self.seed, q.id, -1)) for q in missing]
        for place, _, reply in self.policy.run([[request] for request in requests]):
            if isinstance(reply, Parked):
                self.parked[reply.reason] += 1
                continue
            self._count(reply)
            draws = [{"text": d.text, "finish": d.finish, "tokens": d.tokens} for d in reply.draws]
            record = {"rollout": missing[place].id, "row": missing[place].key, "seed": requests[place].seed}
            self.progress.add_solutions(record | {"solutions": draws})
        rollouts: list[Rollout] = []
        lost: Counter[str] = Counter()
        for question in questions:
            found = self.progress.solutions.get((question.id, question.key), {"solutions": []})["solutions"]
            for number, solution in enumerate(found):
                if solution["finish"] != STOP:
                    lost[f"solution_{solution['finish']}"] += 1
                elif not solution["text"].strip():
                    lost["solution_empty"] += 1
                else:
                    rollouts.append(question.with_solution(number, solution["text"], max_steps))
        return rollouts, lost

    def tallies(self, rollouts: Sequence[Rollout], n: int) -> list[Tally]:
        """Make the tallies for `n` draws per step; only the steps that are checked have draws yet."""
        tallies = [Tally.new(len(rollout.steps), n) for rollout in rollouts]
        for rollout, tally in zip(rollouts, tallies, strict=True):
            self._check_answer_step(rollout, tally)
        self.bar.reset(sum(n * rollout.sampled for rollout in rollouts))
        return tallies

    def _check_answer_step(self, rollout: Rollout, tally: Tally) -> None:
        """Count a last step that states the answer as `n` draws, all right or all wrong, without paying for any."""
        if rollout.sampled < len(rollout.steps):
            tally.add(rollout.sampled, [self._right(rollout, "")] * tally.n)

    def draw(self, visits: Sequence[tuple[Rollout, Tally, Sequence[tuple[int, int]]]]) -> list[bool]:
        """
        Make the draws `(step, number)` of each visit and add them to the tally of its rollout. Returns for each visit
        whether all draws came; the others are parked.
        """
        requests: list[list[Request]] = []
        for rollout, tally, steps in visits:
            visit = []
            for step, count in steps:
                known = len(self.progress.outcomes(rollout.id, rollout.key, step))
                missing = max(0, tally.asked[step] + count - known)
                self.bar.update(count - missing)
                if missing:
                    name = f"row {rollout.id}, step {step}"
                    seed = draw_seed(self.seed, rollout.id, step) + known
                    prefix = rollout.steps[: step + 1]
                    visit.append(Request(name, rollout.images, rollout.prompt, prefix, missing, seed))
            requests.append(visit)
        parked = set()
        asked = [place for place, visit in enumerate(requests) if visit]
        for number, request, reply in self.policy.run([requests[place] for place in asked]):
            place = asked[number]
            if isinstance(reply, Parked):
                self.parked[reply.reason] += 1
                parked.add(place)
            else:
                self._keep(visits[place][0], requests[place][request], reply)
        for place, (rollout, tally, steps) in enumerate(visits):
            for step, count in steps if place not in parked else ():
                start = tally.asked[step]
                tally.add(step, self.progress.outcomes(rollout.id, rollout.key, step)[start : start + count])
        return [place not in parked for place in range(len(visits))]

    def draw_all(self, rollouts: Sequence[Rollout], tallies: Sequence[Tally]) -> list[int]:
        """Make all draws of every step. Returns the rollouts with at least one measured step."""
        for start in range(0, len(rollouts), BATCH):
            pairs = zip(rollouts[start : start + BATCH], tallies[start : start + BATCH], strict=True)
            self.draw([(r, tally, [(step, tally.n) for step in range(r.sampled)]) for r, tally in pairs])
        return [index for index, tally in enumerate(tallies) if tally.known]

    def stop_if_parked(self, output: Path) -> None:
        """Raise `OSError` if a request is without an answer."""
        if self.parked:
            reasons = "; ".join(f"{count} requests: {reason}" for reason, count in self.parked.most_common(3))
            raise OSError(
                f"{output} is not written: the policy left {self.parked.total()} requests without an answer ({reasons})."
                f" The answers are kept in {self.progress.path}: run again to finish"
            )

    def _keep(self, rollout: Rollout, request: Request, reply: Reply) -> None:
        right = [self._right(rollout, d.text, request.steps) if d.finish == STOP else None for d in reply.draws]
        step = len(request.steps) - 1
        self._count(reply)
        self.bar.update(request.n)
        self.progress.add(
            {
                "rollout": rollout.id,
                "row": rollout.key,
                "step": step,
                "first": request.seed - draw_seed(self.seed, rollout.id, step),
                "seed": request.seed,
                "right": [None if value is None else int(value) for value in right],
                "finish": [draw.finish for draw in reply.draws],
                "tokens": [draw.tokens for draw in reply.draws],
                "prompt_tokens": reply.prompt_tokens,
                "cached_tokens": reply.cached_tokens,
            }
        )

    def _right(self, rollout: Rollout, text: str, steps: Sequence[str] | None = None) -> bool:
        solution = "\n\n".join([*(rollout.steps if steps is None else steps), *([text] if text else [])])
        try:
            return bool(self.checker(solution, rollout.answer))
        except Exception as error:  # of any kind: a checker may be the user's own code
            raise ValueError(
                f"row {rollout.id}: the checker raised {type(error).__name__} ({error}) on {solution[-60:]!r} and "
                f"answer {rollout.answer!r:.60}: correct it and run again; the draws so far are kept"
            ) from error

    def _count(self, reply: Reply) -> None:
        self.spent["draws"] += len(reply.draws)
        self.spent["tokens"] += reply.tokens or sum(draw.tokens or 0 for draw in reply.draws)
        self.spent["prompt_tokens"] += reply.prompt_tokens or 0
        self.spent["cached_tokens"] += reply.cached_tokens or 0
        shown: dict[str, Any] = {"tokens": f"{self.spent['tokens']:,}"}
        if self.price is not None:
            shown["cost"] = f"{cost(self.spent, self.price):.2f}"
        self.bar.set_postfix(shown, refresh=False)


def cost(spent: Counter[str] | dict[str, int], price: float) -> float:
    """Compute the cost of all generated tokens and of the prefix tokens that were not cached."""
    return (spent["tokens"] + spent["prompt_tokens"] - spent["cached_tokens"]) * price / 1e6
