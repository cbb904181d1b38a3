"""A PPO script as TRL 0.13 to 1.12 has it: reward and value models, a tokenised dataset, stop at EOS.

The import of PPOConfig and PPOTrainer is the only line that differs. Prompts: a text file, one a line.

    python examples/trl_script.py --prompts prompts.txt --sft_model_path MODEL --reward_model_path CLASSIFIER
        --output_dir runs/trl_script --response_length 53 --stop_token eos --missing_eos_penalty 1.0
"""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate import PartialState
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
)

from fastppo import PPOConfig, PPOTrainer  # with TRL: from trl.experimental.ppo import PPOConfig, PPOTrainer


@dataclass
class ScriptArguments:
    """What is not PPO's."""

    prompts: str = field(metadata={"help": "Text file with one prompt per line."})
    held_out: int = field(default=8, metadata={"help": "Prompts kept for sample completions."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, PPOConfig))  # type: ignore[arg-type]
    script, config = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(config.sft_model_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value_model = AutoModelForSequenceClassification.from_pretrained(config.reward_model_path, num_labels=1)
    reward_model = AutoModelForSequenceClassification.from_pretrained(config.reward_model_path, num_labels=1)
    ref_policy = AutoModelForCausalLM.from_pretrained(config.sft_model_path)
    policy = AutoModelForCausalLM.from_pretrained(config.sft_model_path)

    dataset = load_dataset("text", data_files=script.prompts, split="train")
    with PartialState().local_main_process_first():
        dataset = dataset.map(
            lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]},
            batched=True,
            remove_columns=["text"],
        )
    train_dataset = dataset.select(range(len(dataset) - script.held_out))
    eval_dataset = dataset.select(range(len(dataset) - script.held_out, len(dataset)))
    assert train_dataset[0]["input_ids"][-1] != tokenizer.eos_token_id, "a prompt must not end in EOS"

    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref_policy,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train()
    trainer.save_model(config.output_dir)
    trainer.generate_completions()


if __name__ == "__main__":
    main()
