"""Reward models: what the trainers are given."""

from __future__ import annotations

import tiny
from datasets import Dataset
from trl import RewardConfig

from fastppo.cli.human_feedback import as_messages
from fastppo.cli.reward import preference_trainer


def test_pairs_of_like_length_share_a_batch(tmp_path):
    texts = {"short": "how are you", "long": "how are you today ? i am fine , thank you"}
    rows = Dataset.from_list(
        [
            {"chosen": as_messages(["hi", text]), "rejected": as_messages(["hi", text])}
            for _ in range(200)
            for text in texts.values()
        ]
    )
    config = RewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
        max_length=64,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = preference_trainer(tiny.classifier(), tiny.tokenizer(), config, rows)
    batches = list(trainer.get_train_dataloader())
    padded = sum(not batch["attention_mask"].all().item() for batch in batches)
    assert len(batches) == 100
    assert padded <= 4  # transformers sorts 100 pairs at a time; by chance nearly all batches would be mixed
    assert len({batch["input_ids"].shape[1] for batch in batches}) == 2
