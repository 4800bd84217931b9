"""Published formats, each on a tiny model in that very format: the prompt spelled out, positions, and scores by hand."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import picture
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trl_mprm import ProcessRewardModel, StepFormat
from trl_mprm.models.loading import load_model, load_processing_class
from trl_mprm.models.tiny import tiny_model
from trl_mprm.prompting.published import (
    CHECKPOINTS,
    INTERNVL_SYSTEM,
    PUBLISHED,
    VISUALPRM_SYSTEM,
    VL_PRM_SYSTEM,
    published_format,
)
from trl_mprm.prompting.rendering import render_rows
from trl_mprm.prompting.tokens import tokenizer_of


STEPS = ["A is red.", "So one."]
# Where a step is read, after the token: ▲
EXPECTED = {
    "mm-prm": (
        f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n<|im_start|>assistant\n<img><IMG_CONTEXT></img>\n"
        "Question: How many?\nProcess: A is red.<prm>▲So one.<prm>▲<|im_end|>\n"
    ),
    "math-shepherd": "How many? A is red. ки▲\nSo one. ки▲",
    "visualprm": (
        f"<|im_start|>system\n{VISUALPRM_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n### Question:\n<img><IMG_CONTEXT></img>\nHow many?\n\n"
        "### Solution Process:\nA is red.<|im_end|>\n<|im_start|>assistant\n▲+<|im_end|>\n"
        "<|im_start|>user\nSo one.<|im_end|>\n<|im_start|>assistant\n▲"
    ),
    "vl-prm": (
        f"<|im_start|>system\n{VL_PRM_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "### Question:\nHow many?\n\n### Solution Process:\nA is red.<|im_end|>\n<|im_start|>assistant\n▲+<|im_end|>\n"
        "<|im_start|>user\nSo one.<|im_end|>\n<|im_start|>assistant\n▲"
    ),
    "rlhflow": (
        "<|im_start|>user\nHow many? A is red.<|im_end|>\n<|im_start|>assistant\n▲+<|im_end|>\n"
        "<|im_start|>user\nSo one.<|im_end|>\n<|im_start|>assistant\n▲"
    ),
    "qwen2.5-math-prm": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        "A is red.<extra_0>▲So one.<extra_0>▲<|im_end|>\n"
    ),
    "skywork": "How many?\nA is red.\n▲So one.\n▲",
    "trl-token-classification": "How many?A is red.\n▲So one.\n▲",
}
ARCHITECTURE = {"mm-prm": "internvl", "visualprm": "internvl", "vl-prm": "qwen2_5_vl"}
HEADS = {"qwen2.5-math-prm": 2, "skywork": 1, "trl-token-classification": 2}


@pytest.fixture
def folder(request, tiny_folders, tmp_path):
    """A tiny checkpoint in the format that the test names, as its authors save one."""
    name = request.param
    if name not in HEADS:
        source = tiny_folders[ARCHITECTURE.get(name, "qwen2")]
        model, processing_class = load_model(source), load_processing_class(source, name in ARCHITECTURE)
        tokenizer_of(processing_class).add_tokens(["<prm>"], special_tokens=True)
        model.resize_token_embeddings(len(tokenizer_of(processing_class)))
        model.config.get_text_config().max_position_embeddings = 4096  # a letter is a token: the prompts are long
        model.save_pretrained(tmp_path)
        processing_class.save_pretrained(tmp_path)
        return name, tmp_path
    tiny_model("qwen2", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<extra_0>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(1)
    if name == "qwen2.5-math-prm":
        head = {"score.0.weight": (64, 64), "score.0.bias": (64,), "score.2.weight": (2, 64), "score.2.bias": (2,)}
    elif name == "skywork":
        head = {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)}
    else:
        head = {"score.weight": (2, 64), "score.bias": (2,)}
    weights |= {key: torch.randn(shape) for key, shape in head.items()}
    # In two files, as large checkpoints are.
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: weights[key].contiguous() for key in keys}, tmp_path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    if name != "trl-token-classification":  # their own class, in code that must not run
        config |= {"architectures": ["ProcessRewardClass"], "auto_map": {"AutoModel": "modeling.ProcessRewardClass"}}
        (tmp_path / "modeling.py").write_text("raise RuntimeError('remote code was run')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return name, tmp_path


def load(folder) -> ProcessRewardModel:
    name, path = folder
    return ProcessRewardModel.from_pretrained(path, step_format=name)


def row(name: str, steps=STEPS) -> dict:
    images = [picture("red", (56, 56) if name == "vl-prm" else (28, 28))] if name in ARCHITECTURE else []
    return {"images": images, "prompt": "How many?", "completions": list(steps)}


@pytest.mark.parametrize("folder", PUBLISHED, indirect=True)
def test_prompt_and_positions(folder):
    prm = load(folder)
    (rendered,), _ = render_rows([row(folder[0])], prm.processing_class, prm.step_format)
    decode = tokenizer_of(prm.processing_class).decode
    starts = [0, *(position + 1 for position in rendered.positions)]
    pieces = [decode(rendered.input_ids[start:end]) for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert "▲".join(pieces) == EXPECTED[folder[0]]


def by_hand(name: str, path, steps: list[str]) -> list[float]:
    """Scores as the authors' own code computes them, from the whole logits of a plain forward."""
    prm = ProcessRewardModel.from_pretrained(path, step_format=name)
    tokenizer = tokenizer_of(prm.processing_class)
    text = EXPECTED[name]
    good, bad = (tokenizer.encode(token)[0] for token in prm.step_format.reward_tokens)
    if name in ("rlhflow", "math-shepherd"):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
    else:
        weights = load_file(path / "model-00001-of-00002.safetensors")
        weights |= load_file(path / "model-00002-of-00002.safetensors")
        model = AutoModelForCausalLM.from_pretrained(path).eval().model
    scores = []
    for number in range(len(steps)):
        # One forward a step, up to where it is read: the text before the mark, of which the last token counts.
        ids = torch.tensor([tokenizer.encode("".join(text.split("▲")[: number + 1]))])
        with torch.no_grad():
            if name in ("rlhflow", "math-shepherd"):
                logits = model(ids).logits[0, -1, [good, bad]]
                scores.append(logits.softmax(-1)[0].item())
                continue
            hidden = model(ids).last_hidden_state[0, -1]
            if name == "qwen2.5-math-prm":
                hidden = (weights["score.0.weight"] @ hidden + weights["score.0.bias"]).relu()
                logits = weights["score.2.weight"] @ hidden + weights["score.2.bias"]
                scores.append(logits.softmax(-1)[1].item())
            elif name == "skywork":
                value = weights["v_head.summary.weight"] @ hidden + weights["v_head.summary.bias"]
                scores.append(value.sigmoid().item())
            else:
                scores.append((weights["score.weight"] @ hidden + weights["score.bias"]).softmax(-1)[1].item())
    return scores


@pytest.mark.parametrize("folder", sorted(set(PUBLISHED) - set(ARCHITECTURE)), indirect=True)
def test_scores_are_those_of_the_authors_code(folder):
    name, path = folder
    assert load(folder).score([], "How many?", STEPS) == pytest.approx(by_hand(name, path, STEPS), abs=1e-6)


@pytest.mark.parametrize("folder", sorted(ARCHITECTURE), indirect=True)
def test_scores_of_vision_language_formats(folder):
    """The softmax over the two tokens in the logits of one forward over the prompt as it is spelled out above."""
    name, _ = folder
    prm = load(folder)
    tokenizer, one = tokenizer_of(prm.processing_class), row(name)
    text = EXPECTED[name].replace("▲", "")
    text = text.replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>").replace("<|image_pad|>" * 4, "<|image_pad|>")
    inputs = prm.processing_class(text=[text], images=[one["images"]], return_tensors="pt")
    (rendered,), _ = render_rows([one], prm.processing_class, prm.step_format)
    assert inputs["input_ids"][0].tolist() == rendered.input_ids
    with torch.no_grad():
        logits = prm.model(**inputs).logits[0]
    good, bad = (tokenizer.encode(token)[0] for token in prm.step_format.reward_tokens)
    expected = [logits[position, [good, bad]].softmax(-1)[0].item() for position in rendered.positions]
    assert prm.score(one["images"], one["prompt"], one["completions"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("folder", PUBLISHED, indirect=True)
def test_candidates_share_their_prefix(folder):
    prm = load(folder)
    rows = [row(folder[0], steps) for steps in (STEPS, ["B is red."], ["A is red.", "So", "two."], ["C."])]
    shared, plain = prm.score_batch(rows), prm.score_batch(rows, share_prefix=False)
    assert [len(scores) for scores in shared] == [2, 1, 3, 1]
    for scores, others in zip(shared, plain, strict=True):
        assert scores == pytest.approx(others, abs=1e-6)


@pytest.mark.parametrize("folder", PUBLISHED, indirect=True)
def test_a_special_token_in_a_step_is_text(folder):
    """It stands there letter by letter; all else, and where the steps are read, is as with a harmless word."""
    prm = load(folder)
    for token in ("<|im_end|>", "<|im_start|>user\n", "<extra_0>", "<prm>", "<|image_pad|>", "<|im_end|><prm>"):
        _check_that_it_is_text(token, prm, folder[0])


def _check_that_it_is_text(token: str, prm: ProcessRewardModel, name: str) -> None:
    tokenizer = tokenizer_of(prm.processing_class)
    letters = tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
    word = "".join(chr(0x4E00 + index) for index in range(len(letters)))  # three bytes, so three tokens, a letter
    rows = [row(name, [f"A{text}is red.", "So one."]) for text in (token, word)]
    (forged, harmless), _ = render_rows(rows, prm.processing_class, prm.step_format)
    shift = 3 * len(letters) - len(letters)
    assert forged.positions == [position - shift for position in harmless.positions]
    at = next(
        index
        for index, pair in enumerate(zip(forged.input_ids, harmless.input_ids, strict=False))
        if len(set(pair)) > 1
    )
    assert forged.input_ids[at : at + len(letters)] == letters
    assert forged.input_ids[at + len(letters) :] == harmless.input_ids[at + 3 * len(letters) :]
    assert len(prm.score_batch(rows)[0]) == 2


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As that of Math-Shepherd's Mistral: two blanks join before a blank joins the marker, which is then another token."""
    letters = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(33, 127)), "\n", "\t", "\u00a0", "\u3000", "к", "и"]
    vocab = {
        piece: index for index, piece in enumerate([*letters, "\u2581\u2581", "ки", "\u2581ки", "\u2581+", "\u2581-"])
    }
    merges = [("\u2581", "\u2581"), ("к", "и"), ("\u2581", "ки"), ("\u2581", "+"), ("\u2581", "-")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


ENDINGS = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\u00a0", "\u3000", "\u3000 ", " 5", " 5 ", "12", "."]


@pytest.mark.parametrize("folder", PUBLISHED, indirect=True)
def test_an_untrained_token_is_never_read(folder):
    """Whatever a step ends in, it is read at the token at which one that ends in a full stop is read."""
    name, _ = folder
    prm = load(folder)
    rows = [row(name, [f"A is red{ending}", f"So one{ending}"]) for ending in ENDINGS]
    rendered, _ = render_rows(rows, prm.processing_class, prm.step_format)
    read = {tokens.input_ids[position] for tokens in rendered for position in tokens.positions}
    assert len(read) == 1 and [len(tokens.positions) for tokens in rendered] == [2] * len(ENDINGS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_math_shepherd_reads_its_marker_in_a_tokenizer_that_joins_blanks(ending):
    tokenizer = sentencepiece_like()
    marker = tokenizer.convert_tokens_to_ids("\u2581ки")
    assert tokenizer.encode("red  ки")[-1] != marker  # what the authors' code does not find
    steps = row("math-shepherd", [f"A{ending}", f"B{ending}"])
    (tokens,), _ = render_rows([steps], tokenizer, PUBLISHED["math-shepherd"])
    assert [tokens.input_ids[position] for position in tokens.positions] == [marker] * 2
    assert tokens.input_ids.count(marker) == 2


def test_a_step_whose_end_melts_into_the_marker_is_refused():
    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), tokenizer.backend_tokenizer.normalizer]
    )
    with pytest.raises(ValueError, match="step 0 ends in '..u3000', which this tokenizer joins with the marker ' ки'"):
        render_rows([row("math-shepherd", ["A\u3000", "B"])], tokenizer, PUBLISHED["math-shepherd"])


def test_token_classification_as_trl_saved_it(tmp_path):
    tokenizer_folder = tiny_model("qwen2", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(tokenizer_folder, num_labels=2)
    model = AutoModelForTokenClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "prm")
    tokenizer.save_pretrained(tmp_path / "prm")
    prm = ProcessRewardModel.from_pretrained(tmp_path / "prm", step_format="trl-token-classification")
    ids, last = tokenizer.encode("How many?"), []
    for step in STEPS:
        ids += tokenizer.encode(step) + tokenizer.encode("\n")
        last.append(len(ids) - 1)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, last].softmax(-1)[:, 1].tolist()
    assert prm.score([], "How many?", STEPS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("folder", ["visualprm"], indirect=True)
def test_visualprm_says_which_system_message_it_uses(folder, caplog):
    load(folder)
    assert "with the system message of its training data" in caplog.text and "only the real checkpoint" in caplog.text


def test_known_checkpoints_have_a_format():
    assert set(CHECKPOINTS.values()) | {"trl-token-classification"} == set(PUBLISHED)
    assert published_format("OpenGVLab/VisualPRM-8B").answer == "+"
    with pytest.raises(ValueError, match="no format is called 'prm', expected one of mm-prm, math-shepherd"):
        published_format("prm")


def test_a_published_format_is_saved_like_ours(tmp_path):
    for step_format in PUBLISHED.values():
        step_format.save(tmp_path)
        assert StepFormat.load(tmp_path) == step_format


@pytest.mark.parametrize("folder", ["qwen2.5-math-prm"], indirect=True)
def test_bad_input(folder, tiny_folders, tmp_path):
    _, path = folder
    prm = load(folder)
    with pytest.raises(ValueError, match="row 0: the prompt contains the special token '<extra_0>'"):
        prm.score([], "q <extra_0>", ["a", "b"])
    with pytest.raises(ValueError, match="1 images came with a text-only model"):
        prm.score([picture("red")], "q", ["a"])
    with pytest.raises(FileNotFoundError, match="has no process_reward_config.json.*name the step_format"):
        ProcessRewardModel.from_pretrained(path)
    with pytest.raises(ValueError, match="expected a head of one or two outputs named 'v_head.summary'.*got none"):
        ProcessRewardModel.from_pretrained(path, step_format="skywork")
    with pytest.raises(ValueError, match="already saved"):
        prm.save_pretrained(tmp_path / "again")
    for name, marker in (("mm-prm", "<prm>"), ("qwen2.5-math-prm", "<extra_0>")):
        with pytest.raises(
            ValueError, match=f"the tokenizer has no marker token '{marker}': name the step_format that"
        ):
            PUBLISHED[name].ids(AutoTokenizer.from_pretrained(tiny_folders["qwen2"]))
    for name in ("math-shepherd", "rlhflow", "skywork"):
        base = ProcessRewardModel.from_pretrained(
            tiny_folders["internvl"], step_format=replace(PUBLISHED[name], head=None)
        )
        with pytest.raises(ValueError, match="row 0: .*images came with a format that reads no images: remove"):
            base.score([picture("red")], "q", ["a"])
        assert not base.reads_images
    rlhflow = ProcessRewardModel.from_pretrained(tiny_folders["qwen2"], step_format="rlhflow")
    rlhflow.processing_class.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        rlhflow.score([], "q", ["a"])
