"""
The base of the miniature: a Qwen2.5-VL of one million parameters that has the skill but not the task.

    python -m trl_mprm.demo.base --output trl_mprm/demo/qwen2.5-vl-miniature

It is trained in two stages. First it learns to read tiles, to add, and to judge single statements about a tile and a sum:

    user       <picture> check 4 blue add         (some idle words, so that nothing hangs on absolute positions)
    assistant  red 7 blue 2 given 3 , pink is 4 total 7 ? look add 9 the grey is 5 left 6 check from ...

After each statement it is asked whether the statement is true, and one word later whether all statements so far were
sound. The words around are idle, so that the answers depend on the statements and not on a question mark.

Then it learns to follow an error through a solution, and to answer "Yes" or "No" where it is asked with "?":

    user       <picture> from 4 take blue pink grey
    assistant  from 4 ? blue is 2 left 2 ? pink is 4 left 7 ? grey is 5 left 2 ?

Behind any other word than "?" the two answers are a toss of a coin there. The base never sees a marker, options, a
correction or an answer step. As in a real model, "Yes" and "No" have their meaning, and the marker has none: as a process
reward model it is near chance until it is trained as one, like the bases of the paper (Table 2: 52.28 and 49.68).
"""

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm.auto import trange
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from .world import NAMES, TILE, Policy, draw_tile, make_problems, roll_out


BASE_MODEL = Path(__file__).parent / "qwen2.5-vl-miniature"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<|unknown|>"]  # fmt: skip
WORDS = [
    *"system user assistant Yes No true false sound spoilt".split(), *(str(d) for d in range(10)), *NAMES,
    *"add take from options is total left answer wait look at the picture check given , ?".split(),
]  # fmt: skip
IDLE = "add take from options answer wait look at the picture check given , ?".split()
CHAT_TEMPLATE = (  # Qwen's form, without its default system turn
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor() -> Qwen2_5_VLProcessor:
    """Build the real Qwen2.5-VL processor from parts, around a tokenizer of whole words."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|unknown|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "start_token": "<|im_start|>", "vision_start_token": "<|vision_start|>",
                              "vision_end_token": "<|vision_end|>"},
    )  # fmt: skip
    pixels = {"patch_size": 14, "merge_size": 2, "min_pixels": TILE * TILE, "max_pixels": 9 * TILE * TILE}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """Build the model with fresh weights; seed torch before."""
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }.items()}  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "use_sliding_window": False, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128,
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [0, 1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def tile_pixels(processor: Qwen2_5_VLProcessor) -> torch.Tensor:
    """
    Pixel values of every tile, shape (9 colours, 10 digits, 4 patches, 1176).

    A tile is exactly one merged token, so the pixel values of a grid are those of its tiles one after the other. This
    spares the base training its pictures.
    """
    tiles = [draw_tile(c, d) for c in range(len(NAMES)) for d in range(10)]
    return processor.image_processor(tiles, return_tensors="pt")["pixel_values"].reshape(len(NAMES), 10, 4, -1)


def draw_batch(
    n: int, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, readings: int = 3, statements: int = 5
) -> dict[str, np.ndarray]:
    """
    Draw `n` grids, each with some readings and some statements about other tiles, some of them false.

    Returns:
        `dict`: `colours`, `digits` (n, 9); `idle` (n, some) token ids for the question; `text` (n, length) token ids
        of the assistant; `asked` positions of the text, and `target` (n, asked) what should follow there. Inside a
        statement that is the true digit, then whether the stated one is right, and the same for the value: without
        these hints "true or false" stays a coin toss for a thousand updates. Behind it: is it true, and is all so far
        sound. No verdict is ever part of the text, so the second cannot be read off the first.
    """
    word = {w: i for w, i in tokenizer.get_vocab().items()}
    number = np.array([word[str(d)] for d in range(10)])
    name = np.array([word[c] for c in NAMES])
    grids = np.tile(np.arange(9), (n, 1))
    colours, digits = rng.permuted(grids, axis=1), rng.integers(1, 10, (n, 9))
    order = rng.permuted(grids, axis=1)  # readings and statements are about different tiles
    tile_colour = np.take_along_axis(colours, order, axis=1)
    tile_digit = np.take_along_axis(digits, order, axis=1)

    idle_words = [word[w] for w in IDLE]
    columns, asked, target = [], [], []
    slip_rate, spoilt = rng.choice([0.1, 0.3, 0.6], n), np.zeros(n, bool)
    for k in range(readings):
        columns.append(name[tile_colour[:, k]])
        asked.append(len(columns) - 1)
        target.append(number[tile_digit[:, k]])
        columns.append(target[-1])
    for k in range(readings, readings + statements):
        shown, given = tile_digit[:, k], rng.integers(0, 10, n)
        sign = rng.choice([1, -1], n)
        slip, misread = rng.random(n) < slip_rate, rng.random(n) < 0.5
        spoilt = spoilt | slip
        digit = np.where(slip & misread, (shown - 1 + rng.integers(1, 9, n)) % 9 + 1, shown)
        result = (given + sign * digit) % 10
        value = (result + np.where(slip & ~misread, rng.integers(1, 10, n), 0)) % 10
        around = rng.choice(idle_words, (4, n))
        columns += [around[0], number[given], around[1], name[tile_colour[:, k]], np.full(n, word["is"]),
                    number[digit], np.where(sign > 0, word["total"], word["left"]), number[value],
                    around[2], around[3]]  # fmt: skip
        end = len(columns) - 1
        asked += range(end - 5, end + 1)  # after "is", the digit, "total" or "left", the value, two words behind it
        verdicts = [np.where(wrong, word["false"], word["true"]) for wrong in (misread & slip, slip & ~misread, slip)]
        so_far = np.where(spoilt, word["spoilt"], word["sound"])
        target += [number[shown], verdicts[0], number[result], verdicts[1], verdicts[2], so_far]
    idle = rng.choice([word[w] for w in WORDS[9:]], (n, rng.integers(0, 12)))
    return {"colours": colours, "digits": digits, "idle": idle, "text": np.stack(columns, axis=1),
            "asked": np.array(asked), "target": np.stack(target, axis=1)}  # fmt: skip


def prompt_around(processor: Qwen2_5_VLProcessor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the prompt "<picture> check", n rows: up to its last word, and from the end of the user's turn."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "check"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    ids = torch.tensor(processor.tokenizer(prompt.replace("<|image_pad|>", " <|image_pad|>" * 9)).input_ids)
    return ids.expand(n, -1).split([len(ids) - 3, 3], dim=1)


def logits_of(
    model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor, batch: dict[str, np.ndarray], head: torch.Tensor,
    tail: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Logits at the asked positions of a batch with pictures, shape (n, asked, vocabulary)."""
    n = len(batch["text"])
    grid = torch.tensor([[1, 6, 6]]).expand(n, 3)
    before = torch.cat([head, torch.from_numpy(batch["idle"]), tail], dim=1)
    ids = torch.cat([before, torch.from_numpy(batch["text"])], dim=1)
    kinds = (ids == model.config.image_token_id).int()
    # Every row of a batch has the same layout, so one row gives the positions of all.
    positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=kinds[:1], image_grid_thw=grid[:1])
    return model(
        input_ids=ids, position_ids=positions.expand(-1, n, -1), mm_token_type_ids=kinds, image_grid_thw=grid,
        pixel_values=pixels[batch["colours"], batch["digits"]].reshape(-1, pixels.shape[-1]),
        logits_to_keep=torch.from_numpy(batch["asked"]) + before.shape[1],
    ).logits  # fmt: skip


def train_base(output: Path, updates: tuple[int, int], seed: int = 0) -> None:
    """Train the base from fresh weights, the two stages one after the other, and save it in half precision to `output`."""
    torch.manual_seed(seed)
    processor = build_processor()
    model = build_model(processor)
    judge_statements(model, processor, updates[0], seed)
    forget_reward_tokens(model, processor)
    follow_errors(model.half().float(), processor, updates[1], seed)  # the first stage was kept in half precision
    save(model, processor, output)


def judge_statements(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, updates: int, seed: int = 0,
    batch_size: int = 64, learning_rate: float = 2e-3,
) -> None:  # fmt: skip
    """The first stage: reading, adding, and judging single statements."""
    rng, tokenizer, pixels = np.random.default_rng(seed), processor.tokenizer, tile_pixels(processor)
    head, tail = prompt_around(processor, batch_size)  # the idle words go between
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    begin, log = time.time(), []
    for step in trange(updates, desc="judging statements", mininterval=10):
        for group in optimizer.param_groups:  # warm up, then flat, then down from the half
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / updates))
        # Reading and adding first, in turn and each alone: the statements alone teach neither in a thousand updates.
        warm_up = step < 400
        sums_only = warm_up and step % 2 == 1
        if sums_only:
            batch = draw_batch(256, rng, tokenizer, readings=0, statements=2)
            ids, asked, target = (torch.from_numpy(batch[name]) for name in ("text", "asked", "target"))
            asked, target = asked[2::6], target[:, 2::6]
            logits = model(input_ids=ids, logits_to_keep=asked).logits
        else:
            parts = {"readings": 9, "statements": 0} if warm_up else {"readings": 3, "statements": 5}
            batch = draw_batch(batch_size, rng, tokenizer, **parts)
            logits = logits_of(model, pixels, batch, head, tail)
            target = torch.from_numpy(batch["target"])
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # Share of right guesses: readings, then in statements: digit, right?, value, right?, true?, all so far sound?
        guess = logits.argmax(-1)
        for pair in (("true", "false"), ("sound", "spoilt")):
            one, other = tokenizer.convert_tokens_to_ids(pair)
            asked_pair = (target == one) | (target == other)
            guess = torch.where(asked_pair, torch.where(logits[..., one] > logits[..., other], one, other), guess)
        hit = (guess == target).float()
        shares = [hit] if warm_up else [hit[:, :3], *(hit[:, k::6] for k in range(3, 9))]
        log.append([loss.item(), *(share.mean().item() for share in shares)])
        if step % 50 == 49:
            recent = (log[-50::2], log[-49::2]) if warm_up else (log[-50:],)
            means = [np.mean(rows, axis=0).round(3).tolist() for rows in recent]
            print(f"{time.time() - begin:5.0f} s, update {step + 1}:", *means, flush=True)


def draw_chains(n: int, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """
    Draw `n` solutions of open questions in which an error spoils all later values, with a word behind each statement.

    Behind "?" the base answers "Yes" if the statement and all that it builds on are right, else "No". Behind any other
    word "Yes" and "No" are a toss of a coin, so that nothing but "?" asks for a verdict. There are no options, no
    corrections and no answer step, which the corpus has.

    Returns:
        `dict`: as of [`draw_batch`]; `idle` is the question.
    """
    word = tokenizer.get_vocab()
    number, name = np.array([word[str(d)] for d in range(10)]), np.array([word[c] for c in NAMES])
    idle = np.array([word[w] for w in IDLE if w != "?"])
    rate, length = rng.choice([0.05, 0.15, 0.3]), int(rng.integers(3, 7))
    policy = Policy((rate,), (1.0,), rate, (0.0,), (1.0,))
    problems = make_problems(n, policy, rng, lengths=(length,), options=((0, 1.0),), per_picture=1)
    steps = roll_out(problems, np.arange(n), policy, rng, num_mc=0)
    start, rows, adds = problems.truth[:, 0], np.arange(n), problems.sign > 0
    columns: list[np.ndarray] = []
    if rng.random() < 0.5:
        columns += [np.full(n, word["from"]), number[start], np.full(n, word["?"])]
    asked, target = [], []
    for k in range(length):
        digit, value, right = (array[:, k + 1] for array in (steps.digit, steps.value, steps.right))
        before = start if k == 0 else steps.value[:, k]
        colour = name[problems.colours[rows, problems.path[:, k]]]
        total = np.where(adds, word["total"], word["left"])
        columns += [colour, np.full(n, word["is"]), number[digit], total, number[value]]
        asks = rng.random(n) < 0.75
        columns.append(np.where(asks, word["?"], rng.choice(idle, n)))
        end = len(columns) - 1
        asked += [end - 4, end - 2, end]  # after "is", after "total" or "left", and the verdict
        coin = rng.random(n) < 0.5
        verdict = np.where(np.where(asks, right, coin), word["Yes"], word["No"])
        target += [number[problems.digits[rows, problems.path[:, k]]],
                   number[(before + problems.sign * digit) % 10], verdict]  # fmt: skip
    tiles = np.stack([name[problems.colours[rows, problems.path[:, k]]] for k in range(length)], axis=1)
    idle_word, other_word = rng.choice(idle, (n, 1)), rng.choice(idle, (n, 1))
    add = np.concatenate([idle_word, other_word, np.full((n, 1), word["add"]), tiles], axis=1)
    take = [np.full((n, 1), word["from"]), number[start][:, None], np.full((n, 1), word["take"])]
    question = np.where(adds[:, None], add, np.concatenate([*take, tiles], axis=1))
    return {"colours": problems.colours, "digits": problems.digits, "idle": question,
            "text": np.stack(columns, axis=1), "asked": np.array(asked), "target": np.stack(target, axis=1)}  # fmt: skip


def follow_errors(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, updates: int, seed: int = 0,
    batch_size: int = 32, learning_rate: float = 1e-3,
) -> None:  # fmt: skip
    """The second stage: three batches of chains for each batch of single statements."""
    rng, tokenizer, pixels = np.random.default_rng([seed, 2]), processor.tokenizer, tile_pixels(processor)
    head, tail = prompt_around(processor, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in trange(updates, desc="following errors", mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / updates))
        chains = step % 4 != 3
        batch = draw_chains(batch_size, rng, tokenizer) if chains else draw_batch(batch_size, rng, tokenizer)
        logits = logits_of(model, pixels, batch, head[:, :-1] if chains else head, tail)  # a question of its own
        loss = cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch["target"]).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"update {step + 1}: loss {loss.item():.3f}", flush=True)


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, output: Path) -> None:
    """Save a copy in half precision (in fp32 the weights would take 4 MB); it is loaded in fp32."""
    copy.deepcopy(model).to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)


def forget_reward_tokens(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> None:
    """
    Give "Yes" and "No" fresh rows of the LM head, which know nothing of true and false.

    No text of the base has these two words, but what it never says still drifts away from what it says, and so their
    old rows can tell right from wrong.
    """
    # Any direction tells something by luck (AUC 34 to 66 in eight tries); that of seed 2 is the nearest to chance.
    rows, generator = model.get_output_embeddings().weight, torch.Generator().manual_seed(2)
    words = ["true", "false", "sound", "spoilt", "Yes", "No"]
    true, false, sound, spoilt, *reward = processor.tokenizer.convert_tokens_to_ids(words)
    with torch.no_grad():
        known, _ = torch.linalg.qr(torch.stack([rows[true] - rows[false], rows[sound] - rows[spoilt]], dim=1))
        for token in reward:
            noise = 0.02 * torch.randn(rows.shape[1], generator=generator)
            rows[token] = rows.mean(0) + noise - known @ (known.T @ noise)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BASE_MODEL)
    parser.add_argument("--updates", type=int, nargs=2, default=(2000, 700), help="of the two stages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_base(arguments.output, tuple(arguments.updates), arguments.seed)
