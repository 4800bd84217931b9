"""A model in this process draws what plain sampling draws, and runs every prefix once."""

import json
import random

import pytest
import torch
from helpers import picture

from trl_mprm.annotation.annotate import annotate
from trl_mprm.annotation.model_policy import ModelPolicy
from trl_mprm.annotation.policies import STOP, Request
from trl_mprm.cli import main
from trl_mprm.prompting.rendering import render_prefixes


STEPS = ["the red tile is one", "the blue tile is two", "so there are three"]


def policy_of(folder: str, **sampling) -> ModelPolicy:
    policy = ModelPolicy.from_pretrained(folder, **{"max_new_tokens": 6, "top_k": 0, **sampling})
    policy.ends |= set(range(0, 400, 4))  # a random model hardly ever ends by itself
    return policy


def requests_of(images: bool, steps: list[str] = STEPS, n: int = 5) -> list[Request]:
    pictures = [picture("red"), picture("blue", (56, 28))] if images else []
    return [Request("r", pictures, "How many?", steps[: i + 1], n, 100 * i) for i in range(len(steps))]


@torch.no_grad()
def plain_draw(policy: ModelPolicy, request: Request, seed: int) -> list[int]:
    """The whole text run anew for every token, no cache, one draw at a time."""
    row = {"images": list(request.images), "prompt": request.prompt}
    [prefix], images = render_prefixes([row], policy.processing_class)
    text = "\n\n".join(request.steps) + "\n\n"
    tokens = policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    dice, drawn = random.Random(seed), []
    while len(drawn) < policy.max_new_tokens and (not drawn or drawn[-1] not in policy.ends):
        more = tokens + drawn
        inputs = {name: values + (more if name == "input_ids" else [0] * len(more)) for name, values in prefix.items()}
        inputs = {name: torch.tensor([values]) for name, values in inputs.items()}
        for module in policy.model.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None
        logits = policy.model(**inputs, **images).logits[:, -1].float()
        chances = policy.processors(None, logits).softmax(-1).double().cumsum(-1)[0]
        drawn.append(int(torch.searchsorted(chances, dice.random() * chances[-1], right=True)))
    return drawn


@pytest.mark.parametrize(
    "architecture", ["qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3", "qwen2", "llama"]
)
def test_draws_are_those_of_plain_sampling(tiny_folders, architecture):
    policy, plain = (
        policy_of(tiny_folders[architecture], temperature=0.7, top_k=40, top_p=0.95) for _ in ("shared", "plain")
    )
    visit = requests_of(architecture not in ("qwen2", "llama"))
    finishes = set()
    for _, number, reply in policy.run([visit]):
        request = visit[number]
        for i in (0, 4):
            expected = plain._draw(plain_draw(plain, request, request.seed + i))
            assert reply.draws[i] == expected
        finishes |= {draw.finish for draw in reply.draws}
    assert STOP in finishes


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2"])
def test_draws_do_not_hang_on_company_order_or_what_ran_before(tiny_folders, architecture):
    visit = requests_of(architecture == "qwen2_5_vl")
    together = {number: reply.draws for _, number, reply in policy_of(tiny_folders[architecture]).run([visit])}
    policy = policy_of(tiny_folders[architecture])
    alone = [[r._replace(n=1, seed=r.seed + i)] for r in visit[::-1] for i in (3, 0, 4)]
    for (place, _, reply), i in zip(policy.run(alone), [3, 0, 4] * 3, strict=True):
        assert reply.draws == [together[len(visit) - 1 - place // 3][i]]


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "internvl", "qwen2"])
def test_every_prefix_is_run_once_and_the_figures_are_true(tiny_folders, architecture):
    policy = policy_of(tiny_folders[architecture])
    run = []
    hook = policy.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: run.append(args[0].numel())
    )
    long = [f"{step} " * 4 for step in STEPS]
    visits = [requests_of(architecture != "qwen2", long, n=16), requests_of(architecture != "qwen2", long[::-1], n=16)]
    replies = [[] for _ in visits]
    for place, _, reply in policy.run(visits):
        replies[place].append(reply)
    hook.remove()
    prefill = sum(reply.prompt_tokens - reply.cached_tokens for visit in replies for reply in visit)
    # the last token of a draw is not run
    assert sum(run) == prefill + sum(draw.tokens - 1 for visit in replies for reply in visit for draw in reply.draws)
    unique = sum(visit[-1].prompt_tokens for visit in replies)
    assert prefill <= 1.2 * unique
    assert prefill < unique  # the second solution keeps picture and question of the first
    plain = sum(16 * reply.prompt_tokens for visit in replies for reply in visit)
    assert plain > 16 * prefill


def test_annotates_with_pictures_and_gets_lost_draws_right(tiny_folders, tmp_path):
    rows = [
        {"images": [picture("red")], "prompt": f"q{i}?", "answer": "1", "completions": STEPS[: 1 + i]}
        for i in range(3)
    ]
    policy = policy_of(tiny_folders["qwen2_5_vl"])
    data = annotate(rows, policy, checker=lambda text, answer: len(text) % 2, n=6, output=tmp_path / "a.parquet")
    for row in data:
        for step, draws in enumerate(row["draws"]):
            measured = draws["finish"].count(STOP)
            assert len(draws["finish"]) == 6 and draws["right"].count(None) == 6 - measured
            assert row["mc_scores"][step] == (sum(v or 0 for v in draws["right"]) / measured if measured else None)


def test_command_line_with_a_model_folder(tiny_folders, tmp_path):
    rows = [{"prompt": f"q{i}?", "answer": "1", "completions": ["one", "Answer: 1"]} for i in range(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["annotate", str(tmp_path / "in.jsonl"), "--policy", tiny_folders["qwen2"], "--n", "3"]
    command += ["--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "4", "--checker", "exact"]
    assert main(command) == 0
    made = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert [row["draws"][0]["finish"] for row in made] == [["length"] * 3] * 2
    assert [row["labels"] for row in made] == [[-100.0, 1.0]] * 2


def test_model_without_a_chat_template_is_refused(tiny_folders):
    policy = policy_of(tiny_folders["qwen2"])
    policy.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="my-model has no chat template.*save one with it"):
        ModelPolicy(policy.model, policy.tokenizer, "my-model")
