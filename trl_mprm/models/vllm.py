"""Which models vLLM serves after an export: the trainer's card says so, and the export refuses the others."""

from transformers import PreTrainedModel

from ..prompting.step_format import StepFormat
from ..prompting.tokens import ProcessingClass
from .classifier import StepClassifier


# Architectures whose export was served by vLLM 0.32 and gave our scores (recipes/serve has the record).
SERVED = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)


def why_not_in_vllm(
    model: PreTrainedModel | StepClassifier, processing_class: ProcessingClass, step_format: StepFormat
) -> str | None:
    """Say why vLLM cannot read this model's rewards; `None` if it can. An adapter's base stands for the adapter."""
    if isinstance(model, StepClassifier):
        return (
            "a checkpoint with a classification head needs no export: vLLM loads it by its own class "
            "(--runner pooling), see the model's page; or serve it with `trl-mprm serve`"
        )
    if step_format.messages is not None:
        return (
            "this published layout puts each step into a turn of its own, which no chat template makes from "
            "a question and its steps: serve it with `trl-mprm serve`"
        )
    if type(model).__name__ not in SERVED:
        return (
            f"vLLM did not give equal scores for {type(model).__name__} when we tried; expected one of "
            f"{', '.join(SERVED)}: serve it with `trl-mprm serve`"
        )
    if processing_class.chat_template is None:
        return "the tokenizer has no chat template, and vLLM takes conversations: save one with it"
    return None
