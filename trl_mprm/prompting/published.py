"""
The layouts of published process reward models, as data for [`StepFormat`].

A step of Qwen2.5-Math-PRM, for example, ends with `<extra_0>`, at which a head of two outputs is read:

    <|im_start|>system\\nPlease reason step by step, ...<|im_end|>\\n<|im_start|>user\\nHow many tiles?<|im_end|>\\n
    <|im_start|>assistant\\nA and C are red.<extra_0>So 2.<extra_0><|im_end|>\\n

The texts are facts about these checkpoints, taken from the code or card named at each; none of their code runs.
"""

from .step_format import StepFormat


# OpenGVLab/InternVL, internvl_chat/tools/reasoning_data_pipeline/utils/constants.py
VISUALPRM_SYSTEM = """\
You are an advanced AI assistant, designed to serve as a process supervision model. In this task, I will provide a \
problem statement followed by the first step of the solution process. For each subsequent turn, I will give you a new \
step in the solution. Your role is to assess whether the solution process is correct up to the current step.

- In the **first round**, I will input the problem and the first step of the solution process.
- In **each subsequent round**, I will provide the next step in the solution.

For each step, you should:

- Respond with **"+"** if you believe the solution process is correct up to this step.
- Respond with **"-"** if you detect any issues or errors in the process up to this step.

Please note:
- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or justifications.

Your task is to verify the accuracy and correctness of each step in the given solution process."""

# theogbrand/vlprm, eval/tts_eval/reward_guided_search/prompts.py
VL_PRM_SYSTEM = """\
**You are a process supervision model for visual reasoning tasks. You will receive an image and an image-based \
problem statement, followed by solution steps to evaluate.**

First round: problem statement and first solution step.\x20\x20
Subsequent rounds: one new step per round.

Assess the cumulative correctness of the entire solution up to each step.

## Evaluation Criteria:

1. **Visual Accuracy**: Are visual elements from the image correctly identified (shapes, colors, positions, \
quantities, spatial relationships)?

2. **Logical Validity**: Do all inferences and calculations follow correctly from the image and previous steps?

## Response:
- **"+"** if correct up to this step
- **"-"** if any error exists up to this step

Only respond with "+" or "-". No explanations.

An error in any step invalidates all subsequent steps."""

# OpenGVLab/InternVL, internvl_chat/internvl/conversation.py: the system message of the template "internvl2_5"
INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

PLUS_MINUS = {"reward_tokens": ("+", "-"), "joiner": ""}

PUBLISHED: dict[str, StepFormat] = {
    # ModalMinds/MM-PRM, `prm` and `batch_prm` of its InternVL (read in github.com/theogbrand/MM-PRM at 3b52c1e): the
    # template "internvl2_5" with its own system message, an empty user turn, all in the assistant turn; also the
    # paper's evaluation. An empty turn is written without its end there, hence the role; the training of the same
    # repository (internvl/train/dataset.py, preprocess_internvl2_5) did write `<|im_end|>` after it. We score as their
    # evaluation does. That the code beside the weights on the Hub does the same could not be looked up.
    "mm-prm": StepFormat(
        joiner="",
        messages=(
            ("system", INTERNVL_SYSTEM),
            ("user\n<|im_start|>assistant", "<image>\nQuestion: {question}\nProcess: {steps}"),
        ),
    ),
    # peiyi9979/math-shepherd-mistral-7b-prm, model card
    "math-shepherd": StepFormat(" ки", ("+", "-"), "\n", messages=(("", "{question} {steps}"),)),
    # OpenGVLab/InternVL, reasoning_data_pipeline (item2conv_prm), as the training data were written. The remote code
    # takes the system message from the checkpoint's config.json where one is set (`trl-mprm convert` does so too), else
    # INTERNVL_SYSTEM; which of them config.json of VisualPRM-8B holds could not be looked up.
    "visualprm": StepFormat(
        "",
        **PLUS_MINUS,
        messages=(
            ("system", VISUALPRM_SYSTEM),
            ("user", "### Question:\n<image>\n{question}\n\n### Solution Process:\n{step}"),
        ),
        answer="+",
    ),
    # theogbrand/vlprm, VisualPRM.get_reward. Its steps carry [Visual Elements] / [Reasoning] and <step_N> tags.
    "vl-prm": StepFormat(
        "",
        **PLUS_MINUS,
        messages=(
            ("system", VL_PRM_SYSTEM),
            ("user", "<image>### Question:\n{question}\n\n### Solution Process:\n{step}"),
        ),
        answer="+",
    ),
    # RLHFlow/RLHF-Reward-Modeling, math-rm/prm_evaluate.py
    "rlhflow": StepFormat("", **PLUS_MINUS, messages=(("user", "{question} {step}"),), answer="+"),
    # Qwen/Qwen2.5-Math-PRM-7B, model card
    "qwen2.5-math-prm": StepFormat(
        "<extra_0>",
        joiner="",
        messages=(
            ("system", "Please reason step by step, and put your final answer within \\boxed{}."),
            ("user", "{question}"),
            ("assistant", "{steps}"),
        ),
        head="score",
    ),
    # SkyworkAI/skywork-o1-prm-inference, io_utils.prepare_input
    "skywork": StepFormat("\n", joiner="", messages=(("", "{question}\n"),), head="v_head.summary"),
    # TRL <= 1.13, experimental PRMTrainer with its default step_separator
    "trl-token-classification": StepFormat("\n", joiner="", messages=(("", "{question}"),), head="score"),
}

# Hub ids whose format is known, so that it need not be given.
CHECKPOINTS: dict[str, str] = {
    "Cierra0506/MM-PRM": "mm-prm",
    "peiyi9979/math-shepherd-mistral-7b-prm": "math-shepherd",
    "OpenGVLab/VisualPRM-8B": "visualprm",
    "OpenGVLab/VisualPRM-8B-v1_1": "visualprm",
    "ob11/Qwen-VL-PRM-3B": "vl-prm",
    "ob11/Qwen-VL-PRM-7B": "vl-prm",
    "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data": "rlhflow",
    "RLHFlow/Llama3.1-8B-PRM-Mistral-Data": "rlhflow",
    "Qwen/Qwen2.5-Math-PRM-7B": "qwen2.5-math-prm",
    "Qwen/Qwen2.5-Math-PRM-72B": "qwen2.5-math-prm",
    "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B": "skywork",
    "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B": "skywork",
}


def published_format(name: str) -> StepFormat:
    """
    Look up a format by its name or by the Hub id of a checkpoint. Raises `ValueError` if it is unknown.

    Examples:
    ```python
    >>> from trl_mprm.prompting.published import published_format
    >>> published_format("Qwen/Qwen2.5-Math-PRM-7B").marker
    '<extra_0>'

    ```
    """
    try:
        return PUBLISHED[CHECKPOINTS.get(name, name)]
    except KeyError:
        raise ValueError(f"no format is called {name!r}, expected one of {', '.join(PUBLISHED)}") from None
