"""Scoring: one prefix for all candidates, equal to the plain path on every backbone; best of N; rewards for GRPO."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import make_rows, picture
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen2Config
from transformers.cache_utils import LinearAttentionLayer
from trl import GRPOConfig, GRPOTrainer

from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.models.loading import add_marker, load_model, load_processing_class
from trl_mprm.models.shared_prefix import _Read, can_share_prefix, shared_length
from trl_mprm.models.tiny import BUILDERS, tiny_tokenizer
from trl_mprm.prompting.published import PUBLISHED
from trl_mprm.prompting.rendering import render_rows
from trl_mprm.prompting.tokens import tokenizer_of
from trl_mprm.scoring import _tokens_read


TEXT_MODELS = ("qwen2", "llama")
BACKBONES = (*BUILDERS, *TEXT_MODELS)


def load(tiny_folders, architecture: str) -> ProcessRewardModel:
    folder = tiny_folders[architecture]
    model, processing_class = load_model(folder), load_processing_class(folder, architecture not in TEXT_MODELS)
    add_marker(model, processing_class, StepFormat())
    return ProcessRewardModel(model, processing_class)


def rollouts(architecture: str) -> list[dict]:
    """Two questions with pictures (one of two pictures), one without, one alone; solutions of different lengths."""
    images = [] if architecture in TEXT_MODELS else [[picture("red")], [picture("red"), picture("blue", (84, 28))]]
    rows = []
    for number in range(4):
        steps = [f"step {step} of {'long ' * number}" for step in range(1 + number)]
        for prompt, index in (("How many?", 0), ("Which one?", 1)):
            rows.append({"images": images[index] if images else [], "prompt": prompt, "completions": steps})
    rows.insert(3, {"images": [], "prompt": "How many?" if images else "What?", "completions": ["none", "of it"]})
    rows.append({"images": [], "prompt": rows[3]["prompt"], "completions": ["some"]})
    rows.append({"images": images[0] if images else [], "prompt": "Alone?", "completions": ["yes"]})
    return rows


def largest_difference(first: list[list[float]], second: list[list[float]]) -> float:
    assert [len(row) for row in first] == [len(row) for row in second]
    return max(abs(a - b) for row, other in zip(first, second, strict=True) for a, b in zip(row, other, strict=True))


def decoder_tokens(model: torch.nn.Module, counted: list[tuple[int, int]]):
    """Record the shape (rows, tokens) of every pass through the decoder's layers."""
    layer = model.get_decoder().layers[0]
    return layer.register_forward_hook(
        lambda _, args, kwargs, output: counted.append(
            tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])
        ),
        with_kwargs=True,
    )


@pytest.mark.parametrize("architecture", BACKBONES)
def test_shared_prefix_equals_the_plain_path(architecture, tiny_folders):
    prm, rows = load(tiny_folders, architecture), rollouts(architecture)
    plain = prm.score_batch(rows, share_prefix=False, batch_size=1)
    assert [len(row) for row in plain] == [len(row["completions"]) for row in rows]
    assert largest_difference(prm.score_batch(rows), plain) < 1e-6
    assert largest_difference(prm.score_batch(rows, max_batch_tokens=40), plain) < 1e-6
    assert largest_difference(prm.score_batch(rows, share_prefix=False, max_batch_tokens=100), plain) < 1e-6


def test_shared_prefix_of_an_adapter(tiny_folders):
    prm = load(tiny_folders, "qwen2_5_vl")
    torch.manual_seed(0)
    adapter = get_peft_model(prm.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    prm = ProcessRewardModel(adapter, prm.processing_class)
    rows = rollouts("qwen2_5_vl")
    assert largest_difference(prm.score_batch(rows), prm.score_batch(rows, share_prefix=False)) < 1e-6


@pytest.mark.parametrize("architecture", BUILDERS)
def test_images_are_encoded_once_and_prefix_tokens_run_once(architecture, tiny_folders):
    prm = load(tiny_folders, architecture)
    images = [picture("red"), picture("blue", (84, 28))]
    candidates = [["a step"] * (1 + index % 3) for index in range(6)]
    vision_inputs, passes = [], []
    encoder = prm.model.get_encoder("image")
    hooks = [
        encoder.register_forward_hook(
            lambda _, args, kwargs, output: vision_inputs.append(
                (args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))).shape
            ),
            with_kwargs=True,
        ),
        decoder_tokens(prm.model, passes),
    ]
    prm.score(images, "How many?", candidates[0])
    alone = vision_inputs.pop()
    passes.clear()
    prm.best_of_n(images, "How many?", candidates)
    for hook in hooks:
        hook.remove()
    assert vision_inputs == [alone]  # one forward, of the two distinct images

    rows = [{"images": images, "prompt": "How many?", "completions": steps} for steps in candidates]
    rendered, _ = render_rows(rows, prm.processing_class, prm.step_format)
    prefix = shared_length(rendered)
    longest = max(len(row.input_ids) for row in rendered) - prefix
    assert passes == [(1, prefix), (len(candidates), longest)]
    # All candidates begin with the same step: it belongs to the prefix up to its marker.
    assert prefix == min(row.positions[0] for row in rendered)


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_flops_are_within_five_percent_of_the_ideal(architecture, n, tiny_folders):
    prm = load(tiny_folders, architecture)
    images = [] if architecture == "qwen2" else [picture("red", (84, 84))]
    question = "How many tiles are there? " * 12
    rows = [
        {"images": images, "prompt": question, "completions": [f"{index:02d} of it" * 3] * 3} for index in range(n)
    ]
    rendered, _ = render_rows(rows, prm.processing_class, prm.step_format)
    prefix, total = shared_length(rendered), len(rendered[0].input_ids)
    assert {len(row.input_ids) for row in rendered} == {total} and total - prefix < prefix
    flops = {}
    for shared in (True, False):
        with FlopCounterMode(display=False) as counter:
            prm.score_batch(rows, batch_size=n, share_prefix=shared)
        flops[shared] = counter.get_total_flops()
    ideal = (prefix + n * (total - prefix)) / (n * total)
    assert flops[True] / flops[False] <= 1.05 * ideal if n > 1 else flops[True] == flops[False]


def test_max_batch_tokens_bounds_every_forward(tiny_folders):
    prm, rows = load(tiny_folders, "qwen2"), rollouts("qwen2")
    rendered, _ = render_rows(rows, prm.processing_class, prm.step_format)
    longest = max(len(row.input_ids) for row in rendered)
    for share_prefix in (True, False):
        passes = []
        hook = decoder_tokens(prm.model, passes)
        prm.score_batch(rows, max_batch_tokens=2 * longest, share_prefix=share_prefix)
        hook.remove()
        assert max(n_rows * tokens for n_rows, tokens in passes) <= 2 * longest
        assert any(n_rows > 1 for n_rows, _ in passes)
    passes = []
    hook = decoder_tokens(prm.model, passes)
    prm.score_batch(rows, max_batch_tokens=1)
    hook.remove()
    assert all(n_rows == 1 for n_rows, _ in passes)  # what is longer than the bound runs alone


def test_max_batch_tokens_counts_an_eighth_of_the_prefix(tiny_folders, monkeypatch):
    """Short answers behind a long prefix, which stands in memory once a row while a layer runs."""
    prm, seen, update = load(tiny_folders, "qwen2"), [], _Read.update

    def recorded(self, keys, values, *args, **kwargs):
        joined = update(self, keys, values, *args, **kwargs)
        seen.append((len(keys), keys.shape[-2], joined[0].shape[-2] - keys.shape[-2]))
        return joined

    monkeypatch.setattr(_Read, "update", recorded)
    rows = [{"prompt": "long " * 80, "completions": [f"{index:02d}"]} for index in range(40)]
    shared = prm.score_batch(rows, max_batch_tokens=600)
    assert min(prefix for _, _, prefix in seen) > 400
    assert all(n_rows * (own + prefix / 8) <= 600 for n_rows, own, prefix in seen)
    assert max(n_rows for n_rows, _, _ in seen) == 600 // (max(own for _, own, _ in seen) + seen[0][2] / 8) > 4
    assert largest_difference(shared, prm.score_batch(rows[:3], share_prefix=False) + shared[3:]) < 1e-6
    # The shapes of recipes/bench/score.py run whole, or in two.
    assert 16384 // (220 + 1630 / 8) >= 32


def test_pictures_in_memory_share_by_their_pixels(tiny_folders, tmp_path):
    prm = load(tiny_folders, "internvl")
    picture("red").save(tmp_path / "red.png")
    rows = Dataset.from_list(
        [{"images": [picture("red")], "prompt": "How many?", "completions": [step]} for step in ("one", "two")]
    )
    passes = []
    hook = decoder_tokens(prm.model, passes)
    scores = prm.score_batch(rows)
    hook.remove()
    assert [n_rows for n_rows, _ in passes] == [1, 2]
    assert scores == [prm.score([str(tmp_path / "red.png")], "How many?", [step]) for step in ("one", "two")] or (
        largest_difference(
            scores, [prm.score([str(tmp_path / "red.png")], "How many?", [step]) for step in ("one", "two")]
        )
        < 1e-6
    )


def test_layers_without_keys_and_values_are_scored_plainly(tiny_folders, monkeypatch):
    prm, rows = load(tiny_folders, "qwen2"), rollouts("qwen2")
    assert can_share_prefix(prm.model)
    monkeypatch.setattr(
        "trl_mprm.models.shared_prefix.DynamicCache",
        lambda config: type("Cache", (), {"layers": [*DynamicCache(config=config).layers, LinearAttentionLayer()]}),
    )
    assert not can_share_prefix(prm.model)
    assert largest_difference(prm.score_batch(rows), prm.score_batch(rows, share_prefix=False)) == 0


def test_best_of_n(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    candidates = [["a", "b"], ["c"], ["d", "e", "f"]]
    scores = [prm.score([], "q", steps) for steps in candidates]
    reduce = {"mean": lambda row: sum(row) / len(row), "min": min, "product": math.prod, "last": lambda row: row[-1]}
    for aggregate, function in reduce.items():
        ranking = prm.best_of_n([], "q", candidates, aggregate=aggregate)
        expected = sorted(range(3), key=lambda index: -function(scores[index]))
        assert [candidate.index for candidate in ranking] == expected
        assert ranking[0].score == pytest.approx(function(scores[expected[0]]), abs=1e-6)
    texts = ["a\n\nb", "c", "d\n\ne\nAnswer: f"]
    ranking = prm.best_of_n([], "q", texts, split="blank_line")
    by_index = {candidate.index: candidate.step_scores for candidate in ranking}
    assert by_index[0] == pytest.approx(scores[0], abs=1e-6) and len(by_index[2]) == 3
    same = prm.best_of_n([], "q", [["a"], ["a"]])
    assert [candidate.index for candidate in same] == [0, 1]


@pytest.mark.parametrize(
    ("candidates", "kwargs", "message"),
    [
        (["a"], {}, "candidate 0 is one string, expected a list of steps: split it first"),
        ([], {}, "`candidates` is empty"),
        ([["a"], ["b", " "]], {}, "row candidate 1: step 1 is ' ', expected text"),
        (["a", "\n"], {"split": "blank_line"}, "row candidate 1: `completions` is empty"),
        ([["a"]], {"aggregate": "median"}, "aggregate is 'median', expected one of mean, min, product, last"),
        (["a"], {"split": "words"}, "by is 'words', expected one of blank_line, numbered"),
        ([["a"], ["b " * 600]], {}, "row candidate 1 has 1.*tokens and this model reads 512: shorten"),
    ],
)
def test_bad_candidates(candidates, kwargs, message, tiny_folders):
    with pytest.raises(ValueError, match=message):
        load(tiny_folders, "qwen2").best_of_n([], "q", candidates, **kwargs)


@pytest.mark.parametrize("architecture", ["qwen2", "internvl"])
def test_how_many_tokens_a_model_reads(architecture, tiny_folders):
    prm = load(tiny_folders, architecture)
    long = ["word " * 110]
    with pytest.raises(ValueError, match=r"row 0 has 5\d\d tokens and this model reads 512: shorten the solution"):
        prm.score([], "q", long)
    prm.model.config.get_text_config().rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    assert len(prm.score([], "q", long)) == 1
    prm.processing_class = tokenizer_of(prm.processing_class)
    prm.processing_class.model_max_length = 300
    with pytest.raises(ValueError, match="this model reads 300"):
        prm.score([], "q", long)


@pytest.mark.parametrize(
    ("positions", "rope", "expected"),
    [
        (512, {"rope_type": "default"}, 512),
        (512, {"rope_type": "linear", "factor": 2.0}, 1024),
        # Qwen2.5 with YaRN as its card says, and Llama 3.1, whose positions are those of the scaled model.
        (512, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (2048, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    ],
)
def test_rope_scaling_extends_what_a_model_reads(positions, rope, expected):
    config = Qwen2Config(max_position_embeddings=positions, rope_parameters={"rope_theta": 1e4, **rope})
    assert _tokens_read(config, tiny_tokenizer("qwen2")) == expected


def test_what_is_no_list_of_steps(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    for steps in ("abc", None, 3):
        with pytest.raises(ValueError, match=f"row 0: `completions` is {steps!r}, expected a list of steps: split"):
            prm.score([], "q", steps)
    with pytest.raises(ValueError, match="`candidates` is one string, expected a list of solutions"):
        prm.best_of_n([], "q", "abc", split="blank_line")
    with pytest.raises(ValueError, match="row candidate 1: `completions` is None, expected a list of steps"):
        prm.best_of_n([], "q", [["a"], None])
    for row, missing in (({"prompt": "q"}, "completions"), ({"completions": ["a"]}, "prompt")):
        with pytest.raises(ValueError, match=f"row 1: no `{missing}`, expected `prompt`, `completions` and optional"):
            prm.score_batch([{"prompt": "q", "completions": ["a"]}, row])


def test_text_that_is_no_unicode(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    with pytest.raises(
        ValueError, match=r"row 0: step 1 holds a lone surrogate \('.udcff'\), which no tokenizer can read"
    ):
        prm.score([], "q", ["a", "a\udcff"])
    with pytest.raises(ValueError, match="row 0: the prompt holds a lone surrogate"):
        prm.score([], "a\udcff", ["a"])
    rlhflow = ProcessRewardModel(prm.model, prm.processing_class, PUBLISHED["rlhflow"])
    with pytest.raises(ValueError, match="row 0: step 0 holds a lone surrogate"):
        rlhflow.score([], "q", ["\udcff"])


def test_bad_pictures(tiny_folders):
    with pytest.raises(ValueError, match="1 images came with a text-only model"):
        load(tiny_folders, "qwen2").score([picture("red")], "q", ["a"])
    prm = load(tiny_folders, "qwen2_5_vl")
    with pytest.raises(ValueError, match="`images` is one Image, expected a list"):
        prm.score_batch([{"images": picture("red"), "prompt": "q", "completions": ["a"]}])
    message = r"row 0: Number of images provided \(1\) does not match .* \(2\): give `images` one picture for each"
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "q"}]}]
    with pytest.raises(ValueError, match=message):
        prm.score_batch([{"images": [picture("red")], "prompt": prompt, "completions": ["a"]}])
    with pytest.raises(ValueError, match="row 0: .*aspect ratio"):  # the processor's own words
        prm.score([picture("red", (1, 4000))], "q", ["a"])
    for image in (None, 3, {"bytes": None, "path": None}, {}):
        with pytest.raises(ValueError, match="row 0: image is .*, expected a PIL image, a path, or a dict"):
            prm.score([image], "q", ["a"])


def test_reward_function_takes_what_trl_hands_over(tiny_folders):
    prm = load(tiny_folders, "qwen2_5_vl")
    reward = prm.as_reward_func(aggregate="min")
    image = picture("red")
    plain = reward(prompts=["q", "q"], completions=["a\n\nb", " "], images=[[image], [image]], trainer_state=None)
    assert plain == [pytest.approx(min(prm.score([image], "q", ["a", "b"])), abs=1e-6), 0.0]
    prompt = [{"role": "system", "content": "be good"}, {"role": "user", "content": [{"type": "text", "text": "q"}]}]
    chat = reward(
        prompts=[prompt], completions=[[{"role": "assistant", "content": "a\n\nb"}]], image=[image], other=[1]
    )
    assert chat == [pytest.approx(plain[0], abs=1e-6)]
    assert reward(prompts=["q"], completions=["a"]) == [pytest.approx(prm.score([], "q", ["a"])[0], abs=1e-6)]
    assert reward.__name__ == f"{Path(tiny_folders['qwen2_5_vl']).name}_min"
    with pytest.raises(ValueError, match="2 prompts came with images for 1: expected as many"):
        reward(prompts=["q", "q"], completions=["a", "b"], images=[[image]])
    with pytest.raises(ValueError, match="by is 'lines'"):
        prm.as_reward_func(split="lines")


@pytest.mark.parametrize("unscored", [None, -1.0])
def test_nothing_that_a_policy_writes_stops_a_reward_function(unscored, tiny_folders, caplog):
    prm = load(tiny_folders, "qwen2_5_vl")
    reward, shares = prm.as_reward_func(unscored=unscored), []
    call = [{"role": "assistant", "content": None, "tool_calls": []}]
    odd = [
        "x" * 600,
        "y" * 700,
        None,
        call,
        [{"role": "assistant"}],
        [3],
        3,
        [{"role": "tool", "content": "a"}],
        "\udcff",
    ]
    good = ["a\n\nb", "a<|im_end|>\n\n<prm>", "<|image_pad|>", [{"role": "assistant", "content": "a\n\nb"}], ""]
    completions = [*odd, *good]
    images = [[picture("red")]] * len(completions)
    with caplog.at_level("WARNING", "trl_mprm.rewards"):
        earned = reward(["q"] * len(completions), completions, images, log_metric=lambda *pair: shares.append(pair))
        reward(["q"] * 2, ["z" * 800, "a"])
    assert earned[: len(odd)] == [unscored] * len(odd)
    alone = [reward(["q"], [completion], images[:1])[0] for completion in good]
    assert earned[len(odd) :] == pytest.approx(alone, abs=1e-6) and alone[-1] == 0.0 and all(alone[:-1])
    assert shares == [(f"{reward.__name__}/unscored", len(odd) / len(completions))]
    assert sum(reward.unscored.values()) == len(odd) + 1
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == len(reward.unscored) == 3  # too long, said nothing, a lone surrogate
    assert max(reward.unscored.values()) == 6 and any("and this model reads 512" in line for line in logged)
    assert all(f"cannot be scored and earns {unscored}" in line for line in logged)


def test_a_reward_function_of_a_model_that_is_not_a_number(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    torch.nn.init.constant_(prm.model.lm_head.weight, math.nan)
    reward = prm.as_reward_func()
    assert reward(["q"], ["a"]) == [None] and list(reward.unscored) == ["the model's scores are not numbers (NaN)"]


def test_reward_functions_have_names_of_their_own(tiny_folders):
    one, other = load(tiny_folders, "qwen2"), load(tiny_folders, "qwen2")
    first = one.as_reward_func()
    functions = [first, one.as_reward_func("min"), one.as_reward_func(split="numbered"), other.as_reward_func()]
    assert len({function.__name__ for function in functions}) == 4
    assert one.as_reward_func().__name__ == first.__name__ == f"{Path(tiny_folders['qwen2']).name}_mean"
    assert one.as_reward_func(name="mine").__name__ == "mine"


def test_step_rewards_have_their_places(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    policy = tiny_tokenizer("qwen2")
    texts = ["  A is réd 🟥.\r\n \r\nSo one.\nFinal answer: 1 ", "", "x" * 600, "B."]
    ids = [policy.encode(text) + [policy.eos_token_id] for text in texts]
    rewards = prm.step_rewards(["q"] * 4, ids, tokenizer=policy)
    assert rewards[1] == [] and rewards[2] is None and len(rewards[3]) == 1
    steps = ["A is réd 🟥.", "So one.", "Final answer: 1"]
    assert [texts[0][step.start : step.end] for step in rewards[0]] == steps
    assert [policy.decode(ids[0][step.token_start : step.token_end]) for step in rewards[0]] == steps
    assert [step.score for step in rewards[0]] == pytest.approx(prm.score([], "q", steps), abs=1e-6)
    chat = [{"role": "assistant", "content": "A.\n\nB."}]
    for completion in ("A.\n\nB.", chat):
        ((first, second),) = prm.step_rewards(["q"], [completion])
        assert (first.start, first.end, second.start, second.end) == (0, 2, 4, 6)
        assert first.token_start is None and first.token_end is None


@pytest.mark.slow
def test_reward_function_trains_a_policy_with_grpo(tiny_folders, tmp_path):
    prm = load(tiny_folders, "qwen2_5_vl")
    rows = [
        {"images": row["images"] or [picture("green")], "prompt": [{"role": "user", "content": row["prompt"]}]}
        for row in make_rows(images=True, n=4)
    ]
    reward = prm.as_reward_func(name="process_reward")
    trainer = GRPOTrainer(
        model=tiny_folders["qwen2_5_vl"],
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            learning_rate=0.1,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=1,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processing_class(tiny_folders["qwen2_5_vl"], vision=True),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/process_reward/mean" in entry]
    assert [entry["process_reward/unscored"] for entry in logged] == [0, 0] and not reward.unscored
    assert len(logged) == 2 and all(0 < entry["rewards/process_reward/mean"] < 1 for entry in logged)
    assert any(entry["rewards/process_reward/std"] > 0 for entry in logged)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_an_adapter_for_another_base(tiny_folders, tmp_path):
    prm = load(tiny_folders, "qwen2_5_vl")
    adapter = get_peft_model(prm.model, LoraConfig(target_modules=["q_proj"]))
    ProcessRewardModel(adapter, prm.processing_class).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="is an adapter of a Qwen2_5_VLForCond.*is a InternVLForCond.*: name the base"
    ):
        ProcessRewardModel.from_pretrained(tmp_path / "adapter", base_model=tiny_folders["internvl"])
    small = load(tiny_folders, "qwen2_5_vl").model.config
    small.text_config.num_key_value_heads = small.text_config.num_attention_heads = 1
    small.text_config.head_dim = None
    model = type(prm.model.get_base_model() if hasattr(prm.model, "get_base_model") else prm.model)
    small.text_config.rope_parameters["mrope_section"] = [8, 12, 12]
    small.text_config.hidden_size, small.vision_config.out_hidden_size = 32, 32
    small.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    model._from_config(small).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="of another size: name the base"):
        ProcessRewardModel.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "small"))


def test_palettes_and_undecoded_pictures(tiny_folders, tmp_path):
    """Two pictures with the same palette indices are two pictures; an undecoded one is the picture it holds."""
    prm = load(tiny_folders, "qwen2_5_vl")
    indices = picture("red").convert("P")
    other = indices.copy()
    other.putpalette([255 - value for value in indices.getpalette()])
    rows = [{"images": [image], "prompt": "q", "completions": ["a"]} for image in (indices, other)]
    first, second = prm.score_batch(rows)
    assert first != second and second == pytest.approx(prm.score([other.convert("RGB")], "q", ["a"]), abs=1e-6)
    indices.save(tmp_path / "p.png")
    undecoded = {"bytes": (tmp_path / "p.png").read_bytes(), "path": None}
    assert prm.score([undecoded], "q", ["a"]) == pytest.approx(first, abs=1e-6)
    assert prm.score([{"bytes": None, "path": str(tmp_path / "p.png")}], "q", ["a"]) == pytest.approx(first, abs=1e-6)


def test_bad_rows_are_called_by_their_place(tiny_folders):
    prm = load(tiny_folders, "qwen2")
    rows = [{"prompt": f"q{index}", "completions": ["a"]} for index in range(20)]
    for change, message in (
        ({"completions": "two"}, "row 13: `completions` is 'two', expected a list of steps"),
        ({"completions": None}, "row 13: `completions` is None, expected a list of steps"),
        ({"prompt": None}, "row 13: `prompt` is None, expected the question"),
    ):
        with pytest.raises(ValueError, match=message):
            prm.score_batch([row | change if index == 13 else row for index, row in enumerate(rows)])
    # Chat messages as a column of parts holds them.
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "q0"}]
    prompt = [{"role": "user", "content": parts}]
    assert prm.as_reward_func()([prompt], ["a"], image=[None]) == [
        pytest.approx(prm.score([], "q0", ["a"])[0], abs=1e-6)
    ]


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(FileNotFoundError, match="^org/nowhere: no such folder here, and the Hub cannot be reached$"):
        ProcessRewardModel.from_pretrained("org/nowhere")
