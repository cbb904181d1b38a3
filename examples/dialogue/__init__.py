"""Dialogue: users made of a corpus and of a model, a manager, intents, and PPO over several turns.

    python -m examples.dialogue intents|augment|ppo|tune|joint

corpora.py     topics of chatterbot-corpus (English, Chinese), conversations of chitchat-dataset
intents.py     what an utterance is about; held-out accuracy with intervals
augment.py     synonyms, random deletion and swap, back-translation
manager.py     history inside the context window, intent state, the next action
simulators.py  users as environments: real human replies, or a second language model
policy.py      a small language model trained on the spot, and the settings of PPO
tuning.py      full fine-tuning, LoRA, prefix- and prompt-tuning in one table; generation + λ · action loss
"""
