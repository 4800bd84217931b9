"""
Silence warnings of the underlying libraries about which a user can do nothing. Each is matched by its text, and stays
silent in this process once training or scoring is imported.
"""

import logging
import warnings


FUTURE = (
    # transformers/training_args.py, `__post_init__`: recipes keep the name that versions before 5.23 know.
    "`gradient_checkpointing(_kwargs)?` is deprecated",
    # transformers/modeling_utils.py: peft/peft_model.py asks for it whenever an adapter is made.
    "`is_gradient_checkpointing` is deprecated",
    # transformers/utils/generic.py: versions before 5.23 do not know the new name of the argument, `cache`.
    "`past_key_values` is deprecated",
)


def quiet_upstream() -> None:
    """Silence the warnings above."""
    for message in FUTURE:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # bitsandbytes/backends/cpu/ops.py: an optional kernel that it would download on CPUs with AVX512-BF16.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "Failed to load CPU gemm_4bit_forward" not in str(record.msg)
    )
