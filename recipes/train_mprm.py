# /// script
# dependencies = ["trl-mprm[qlora]"]
# ///
"""
Select the 10% of the rollouts worth training on, train a multimodal process reward model on them with QLoRA, publish it.

    python recipes/train_mprm.py \
        --dataset_name OpenGVLab/VisualPRM400K-v1.1-Raw --image_root data/VisualPRM400K-v1.1-Raw \
        --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --bf16 --gradient_checkpointing \
        --use_peft --lora_r 16 --lora_alpha 32 --load_in_4bit --use_bnb_nested_quant --save_steps 25 \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 256 --learning_rate 1e-4 \
        --processor_kwargs '{"min_pixels": 784, "max_pixels": 200704}' \
        --output_dir qwen2.5-vl-7b-mprm-bis10-qlora --push_to_hub

Without --use_peft and --load_in_4bit all weights but the vision encoder's are trained, as in the paper (learning rate
1e-5, global batch 512).
"""

from dataclasses import dataclass

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_mprm import ProcessRewardConfig, ProcessRewardTrainer, add_bis, load_rollouts, top_fraction


@dataclass
class Arguments(ScriptArguments):
    image_root: str | None = None
    fraction: float = 0.10
    alpha: float = 0.2


if __name__ == "__main__":
    parser = TrlParser((Arguments, ProcessRewardConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }

    rollouts = load_rollouts(script_args.dataset_name, image_root=script_args.image_root)
    scored = rollouts.map(add_bis, fn_kwargs={"alpha": script_args.alpha}, batched=True)
    best = top_fraction(scored, script_args.fraction, by="source")

    trainer = ProcessRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=scored.filter(best, batched=True),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        selection=best.report | {"alpha": script_args.alpha},
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
