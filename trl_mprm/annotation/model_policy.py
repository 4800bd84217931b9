"""
A policy in this process, with any `AutoModelForImageTextToText` or `AutoModelForCausalLM`.

Picture, question and steps are run once for each rollout; the continuations of a step start from there together:

    [picture][question][step 1]             run, then 16 continuations beside each other
                               [step 2]     run on, then 16 continuations
    tokens run for prefixes: those of the longest one, once; plain generation runs each prefix 16 times

The keys and values of the prefix are held once; a layer repeats them for the rows while it runs. The next rollout of the
same question reuses the prefix that the two have in common. Draw `i` takes its random numbers from its own seed, one per
token, so that it does not depend on the other draws of its batch, up to the rounding of the hardware.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..data.rows import question_key
from ..models.anatomy import is_vision_language
from ..models.loading import load_model, load_processing_class
from ..models.shared_prefix import can_share_prefix
from ..prompting.rendering import render_prefixes
from ..prompting.tokens import ProcessingClass, tokenizer_of
from .policies import STOP, Draw, Policy, Reply, Request


class _Branches(DynamicLayer):
    """The keys and values of one prefix, shared by many rows, and those that each row adds."""

    def __init__(self, prefix: DynamicLayer):
        super().__init__()
        self.prefix, self.is_initialized = prefix, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.keys is None or not self.keys.numel():
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        rows = key_states.shape[0]
        keys, values = (states.expand(rows, -1, -1, -1) for states in (self.prefix.keys, self.prefix.values))
        return torch.cat([keys, self.keys], dim=-2), torch.cat([values, self.values], dim=-2)

    def get_seq_length(self) -> int:
        own = 0 if self.keys is None or not self.keys.numel() else self.keys.shape[-2]
        return self.prefix.get_seq_length() + own

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass
class _Prefix:
    """The state after a question and some steps: their tokens, their keys and values, the logits after the last."""

    question: tuple[str, ...]
    n_question: int
    tokens: list[int]
    cache: Cache
    logits: torch.Tensor


class ModelPolicy(Policy):
    """
    Continues solutions with a model in this process.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A vision-language or text-only model whose layers all keep keys and values.
        processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
            Its processor or tokenizer, with a chat template.
        name (`str`):
            Name of the model in the evidence.
        temperature, top_p, top_k, max_new_tokens:
            Parameters of the sampling; `top_k` 0 means all tokens.

    Raises:
        `ValueError`: the model has no chat template, or a layer keeps its past in another way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        name: str,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        max_new_tokens: int = 2048,
    ):
        if processing_class.chat_template is None:
            raise ValueError(f"{name} has no chat template, which a question needs: save one with it")
        if not can_share_prefix(model):
            raise ValueError(f"{name} keeps no keys and values of its past to share: serve it, and give the URL")
        self.model, self.processing_class, self.name = model.eval(), processing_class, name
        self.tokenizer, self.max_new_tokens = tokenizer_of(processing_class), max_new_tokens
        self.processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.processors.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.processors.append(TopPLogitsWarper(top_p))
        ends = model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.prefix: _Prefix | None = None

    @classmethod
    def from_pretrained(cls, model_id: str, **sampling: float) -> "ModelPolicy":
        """Load a model by Hub id or folder, in its saved number format and without remote code."""
        model = load_model(model_id, dtype="auto", device_map="auto", trust_remote_code=False)
        processing_class = load_processing_class(model_id, is_vision_language(model.config), trust_remote_code=False)
        return cls(model, processing_class, model_id, **sampling)

    def run(self, visits: Sequence[Sequence[Request]]) -> Iterator[tuple[int, int, Reply]]:
        for place, visit in enumerate(visits):
            for number, request in enumerate(visit):
                yield place, number, self._reply(request)

    @torch.no_grad()
    def _reply(self, request: Request) -> Reply:
        cached = self._run_prefix(request)
        return Reply(self._sample(request.n, request.seed), len(self.prefix.tokens), cached)

    def _run_prefix(self, request: Request) -> int:
        """Run the new tokens of a prefix, and return how many of its tokens had been run before."""
        question = question_key(request.prompt, request.images)
        new = self.prefix is None or self.prefix.question != question
        if new:
            self._run_question(request, question)
        prefix = self.prefix
        text = "\n\n".join(request.steps) + "\n\n" if request.steps else ""
        steps = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []
        tokens = prefix.tokens[: prefix.n_question] + steps
        if tokens == prefix.tokens:
            return 0 if new else len(tokens)
        if not steps:  # the logits after the question are gone
            self._run_question(request, question)
            return 0
        pairs = zip(tokens, prefix.tokens, strict=False)
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(prefix.tokens)))
        same = max(prefix.n_question, min(same, len(tokens) - 1))  # at least one token is run, for the logits after it
        for layer in prefix.cache.layers:
            layer.keys, layer.values = layer.keys[..., :same, :], layer.values[..., :same, :]
        prefix.logits = self._forward(prefix.cache, input_ids=torch.tensor([tokens[same:]]))
        prefix.tokens = tokens
        return 0 if new else same

    def _run_question(self, request: Request, question: tuple[str, ...]) -> None:
        row = {"images": list(request.images), "prompt": request.prompt, "rollout_id": request.name}
        [prefix], images = render_prefixes([row], self.processing_class)
        for module in self.model.modules():
            if "rope_deltas" in vars(module):  # Qwen-VL models keep the offset of their last image's positions
                module.rope_deltas = None
        cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=self.model.config).layers])
        inputs = {name: torch.tensor([values]) for name, values in prefix.items()}
        logits = self._forward(cache, **inputs, **images)
        tokens = prefix["input_ids"]
        self.prefix = _Prefix(question, len(tokens), tokens, cache, logits)

    def _forward(self, cache: Cache, **inputs: torch.Tensor) -> torch.Tensor:
        """Run tokens after a cache, and return the logits after the last one, `(rows, vocabulary)`."""
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        return self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()

    def _sample(self, n: int, seed: int) -> list[Draw]:
        cache = Cache(layers=[_Branches(layer) for layer in self.prefix.cache.layers])
        dice = [random.Random(seed + row) for row in range(n)]
        written: list[list[int]] = [[] for _ in range(n)]
        running, logits = list(range(n)), self.prefix.logits.expand(n, -1)
        while running:
            chances = self.processors(None, logits).softmax(-1).double().cumsum(-1)
            drawn = torch.tensor([[dice[row].random()] for row in running], dtype=torch.double, device=chances.device)
            tokens = torch.searchsorted(chances, drawn * chances[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
            for row, token in zip(running, tokens[:, 0].tolist(), strict=True):
                written[row].append(token)
            on = [
                place
                for place, row in enumerate(running)
                if written[row][-1] not in self.ends and len(written[row]) < self.max_new_tokens
            ]
            if not on:
                break
            rows = torch.tensor(on, device=tokens.device)
            if len(on) < len(running) and len(written[running[0]]) > 1:
                for layer in cache.layers:
                    layer.keep(rows)
            running = [running[place] for place in on]
            logits = self._forward(cache, input_ids=tokens[rows])
        return [self._draw(tokens) for tokens in written]

    def _draw(self, tokens: list[int]) -> Draw:
        ended = tokens[-1] in self.ends
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        return Draw(text, STOP if ended else "length", len(tokens))
