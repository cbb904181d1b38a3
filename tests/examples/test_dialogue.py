"""Dialogue: topics are found above chance, users answer, the window holds, and PPO and tuning learn."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not part of the installed package

from examples.dialogue import augment, corpora, intents, policy, simulators, tuning
from examples.dialogue.__main__ import parse
from examples.dialogue.manager import DialogueManager
from examples.dialogue.simulators import Corpus, CorpusUser, ModelUser, Speaker

# --- topics ----------------------------------------------------------------------------------------------------------


def some_topics(language: str, topics: tuple[str, ...]) -> tuple[list[str], list[str]]:
    pairs = [pair for pair in zip(*corpora.intents(language), strict=True) if pair[1] in topics]
    return [text for text, _ in pairs], [topic for _, topic in pairs]


def test_utterances_stand_once_under_one_topic() -> None:
    for language in corpora.LANGUAGES:
        texts, topics = corpora.intents(language)
        assert len({text.lower() for text in texts}) == len(texts) == len(topics) > 300
        assert min(topics.count(topic) for topic in set(topics)) >= 8
    with pytest.raises(
        ValueError, match=r"chatterbot-corpus has no language 'klingon', only .*chinese, .*english"
    ):
        corpora.intents("klingon")


@pytest.mark.parametrize(
    ("language", "features", "topics"),
    [
        ("english", "characters", ("ai", "coding", "science", "sports")),
        ("english", "sentences", ("ai", "coding", "science", "sports")),
        ("chinese", "characters", ("ai", "emotion", "money", "science")),
    ],
)
def test_topics_are_found_above_the_majority(language: str, features: str, topics: tuple[str, ...]) -> None:
    known = some_topics(language, topics)
    better = intents.accuracy(*known, features, splits=3) - intents.accuracy(*known, None, splits=3)
    assert better.mean > max(0.15, better.interval)


def test_the_interval_counts_what_splits_share() -> None:
    found = intents.Accuracy(np.array([0.5, 0.6, 0.7]), 1 / 3)
    # t(0.975, 2) = 4.303, s² = 0.01, times (1/3 + 1/3)
    assert found.mean == pytest.approx(0.6) and found.interval == pytest.approx(
        4.3027 * (0.01 * 2 / 3) ** 0.5, 1e-4
    )
    assert (found - found).interval == 0
    assert str(found) == "0.600 ± 0.351"


def test_intents_as_reward() -> None:
    known = intents.Intents(*some_topics("english", ("ai", "coding", "sports")))
    topic, certainty = known("can you write a sorting algorithm in Python?")
    assert topic == "coding" and certainty > 0.5
    on, off = known.probability(["write code for it", "who won the baseball game"], "coding")
    assert on > off
    reward = simulators.on_topic(known)
    assert reward("can you write code?", "write code for it", "") > reward(
        "can you write code?", "baseball", ""
    )


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="expected a topic for each of 2 texts, got 1"):
        intents.Intents(["a", "b"], ["x"])
    with pytest.raises(ValueError, match=r"expected texts of at least two topics, got \['x'\]"):
        intents.Intents(["a", "b"], ["x", "x"])
    with pytest.raises(ValueError, match="features must be one of characters, sentences, got 'words'"):
        intents.classifier("words")
    known = intents.Intents(["cat", "cats", "dog", "dogs"], ["c", "c", "d", "d"])
    with pytest.raises(ValueError, match="topic must be one of c, d, got 'e'"):
        known.probability(["cat"], "e")


# --- augmentation ----------------------------------------------------------------------------------------------------

SENTENCE = "do you like to talk about big computers?"


@pytest.mark.parametrize("seed", range(5))
def test_augmentations_keep_what_they_say(seed: int) -> None:
    words = SENTENCE.split()

    def by(augmentation: Any, text: str = SENTENCE) -> list[str]:
        first, again = (augmentation(text, random.Random(seed)) for _ in range(2))
        assert first == again
        return first.split()

    left = by(augment.deletion(0.5))
    assert 0 < len(left) < len(words) and [w for w in words if w in left] == left
    assert by(augment.deletion(0.99), "hello") == ["hello"]
    swapped = by(augment.swap(0.5))
    assert sorted(swapped) == sorted(words) and swapped != words
    assert sorted(augment.swap()("你喜欢什么", random.Random(seed))) == sorted("你喜欢什么")
    others = by(augment.synonyms({"big": ["large"], "computers": ["machines"]}, 0.99))
    assert others == ["do", "you", "like", "to", "talk", "about", "large", "machines?"]


def test_back_translation_goes_through_any_translator() -> None:
    german = augment.Dictionary(augment.ENGLISH_GERMAN)
    assert german.translate(["talk about a big movie"], "en", "de") == ["sprechen about a groß Film"]
    assert (
        augment.back_translation(german)("talk about a big movie", random.Random(0))
        == "speak about a large film"
    )
    with pytest.raises(ValueError, match="this dictionary is between en and de, got 'en' to 'zh'"):
        augment.back_translation(german, pivot="zh")("hello", random.Random(0))

    class Broken:
        def translate(self, texts: Any, source: str, target: str) -> list[str]:
            return []

    with pytest.raises(ValueError, match=r"Broken.translate must give one text per text, got 0 and 0"):
        augment.back_translation(Broken())("hello", random.Random(0))


def test_only_what_is_trained_on_is_augmented() -> None:
    texts, topics = some_topics("english", ("ai", "sports"))
    seen: list[int] = []

    def more(x: list[str], y: list[str], seed: int) -> tuple[list[str], list[str]]:
        got = augment.augmented(x, y, [augment.deletion(), augment.swap()], seed)
        assert got[0][: len(x)] == x and len(got[0]) == len(set(got[0])) == len(got[1]) > 1.5 * len(x)
        seen.append(len(x))
        return got

    intents.accuracy(texts, topics, splits=2, augment=more)
    assert seen == [int(0.75 * len(texts))] * 2
    with pytest.raises(ValueError, match="expected at least one augmentation"):
        augment.augmented(texts, topics, [], 0)
    with pytest.raises(ValueError, match=r"swap: the share of words must be between 0 and 1, got 1.5"):
        augment.swap(1.5)


def test_near_words_are_used_alike() -> None:
    near = augment.nearest_words(["happy", "computer", "qqqq"])
    assert "computers" in near["computer"] and "qqqq" not in near
    assert all(word not in others for word, others in near.items())


# --- the manager -----------------------------------------------------------------------------------------------------


def test_the_oldest_turns_leave_the_window_and_the_system_prompt_stays() -> None:
    tokenizer = tiny.tokenizer()
    manager = DialogueManager(tokenizer, max_tokens=60, reply_tokens=10, system="be kind")
    for i in range(6):
        manager.hear(f"how are you today {i} ?")
        assert len(manager.prompt()) <= 50
        manager.say("i am fine")
    kept = manager.messages()
    assert kept[0] == {"role": "system", "content": "be kind"}
    assert kept[1]["role"] == "user" and kept[1:] == manager.history[-len(kept) + 1 :]
    assert 3 <= len(kept) < len(manager.history)
    assert manager.state.turns == 6
    manager.hear("the quick brown fox " * 20)
    with pytest.raises(
        ValueError, match=r"the user's last turn takes \d+ tokens .* the context has 50 beside a reply"
    ):
        manager.prompt()
    with pytest.raises(ValueError, match=r"reply_tokens must be above 0 and below max_tokens \(60\), got 60"):
        DialogueManager(tokenizer, max_tokens=60, reply_tokens=60)


def test_the_state_follows_the_topic_and_chooses_the_action() -> None:
    known = intents.Intents(*some_topics("english", ("coding", "sports")))
    manager = DialogueManager(tiny.tokenizer(), max_tokens=200, reply_tokens=10, intents=known, unsure=0.7)
    assert (
        manager.hear("can you write a sorting algorithm?").intent == "coding" and manager.action() == "answer"
    )
    manager.hear("do you know who won the baseball game?")
    assert manager.state.intents == ["coding", "sports"]
    manager.unsure = 0.99
    assert manager.action() == "ask"
    manager.hear("Okay, goodbye!")
    assert manager.state.ended and manager.action() == "end"
    manager.act = lambda messages, state: "dance"
    with pytest.raises(ValueError, match="act must give one of answer, ask, end, got 'dance'"):
        manager.action()


# --- users -----------------------------------------------------------------------------------------------------------

CHATS = [
    turns
    for opening in ("hello you", "good day", "what is up", "well hi")
    for turns in (
        [opening, "i love the dogs", "great , i am so happy"],
        [opening, "i hate the cats", "that is horrible and sad"],
    )
] * 8


def test_people_of_the_corpus_answer_what_was_said() -> None:
    user = CorpusUser({"train": Corpus(CHATS)}, simulators.pleased(), turns=2)
    assert user.reset(seed=3, split="train") in {chat[0] for chat in CHATS}
    good = user.step("dogs, i love them")
    assert good.observation == "great , i am so happy" and good.reward > 0.5 and not good.done
    bad = user.step("i hate them")
    assert bad.observation == "that is horrible and sad" and bad.reward < -0.5 and bad.done
    first = [
        CorpusUser({"a": Corpus(CHATS)}, simulators.pleased()).reset(seed=s, split="a")
        for s in (1, 1, 2, 3, 4)
    ]
    assert first[0] == first[1] and len(set(first)) > 1
    user.reset(seed=0, split="train")
    assert isinstance(user.step("").observation, str)  # nothing said, anything answered
    with pytest.raises(ValueError, match="split must be one of train, got 'test'"):
        user.reset(seed=0, split="test")
    with pytest.raises(ValueError, match="expected conversations of two turns and more, got 1 without any"):
        Corpus([["hello"]])


def test_a_second_model_answers_for_a_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = simulators.rollout

    def counted(model: Any, prompts: Any, *args: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        return plain(model, prompts, *args, **settings)

    monkeypatch.setattr(simulators, "rollout", counted)
    speaker = Speaker(tiny.policy(seed=4, max_position_embeddings=96), tiny.tokenizer(), reply_tokens=5)

    def reward(said: str, reply: str, answer: str) -> float:
        return float("o" in reply)

    users = [ModelUser(speaker, reward, system="be kind") for _ in range(3)]

    async def talk(users: list[ModelUser]) -> list[Any]:
        await asyncio.gather(*(user.reset(seed=i, opening="how are you") for i, user in enumerate(users)))
        return [await asyncio.gather(*(user.step("i am fox") for user in users)) for _ in range(3)]

    steps = asyncio.run(talk(users))
    assert sizes == [3, 3, 3]
    assert [x.done for x in steps[2]] == [True] * 3 and steps[0][0].reward == 1
    assert len({x.observation for x in steps[0]}) == 3
    alone = asyncio.run(talk([ModelUser(speaker, reward, system="be kind")]))
    assert alone[2][0].observation == steps[2][0].observation

    from fastppo import PPOConfig, PPOTrainer

    trainer = PPOTrainer(
        PPOConfig(
            str(tmp_path), per_device_train_batch_size=4, total_episodes=4, response_length=5, max_turns=2,
            bf16=False, report_to="none", num_sample_generations=0, disable_tqdm=True,
        ),
        tiny.tokenizer(), tiny.policy(max_position_embeddings=128),
        train_dataset=[{"prompt": [], "opening": "how are you"}] * 4,
        environment_factory=lambda: ModelUser(speaker, reward),
    )  # fmt: skip
    trainer.train()
    assert sizes[-2:] == [4, 4] and trainer.state.log_history[-1]["dialogues/turns"] == 2


def test_ppo_learns_to_please_the_user(tmp_path: Path) -> None:
    model, tokenizer = policy.small_model(CHATS, steps=40, width=48, turns=3)
    users = {"train": Corpus(CHATS), "others": Corpus(CHATS[:8])}
    trainer = policy.ppo(
        model, tokenizer, users, simulators.pleased(), tmp_path, updates=8, dialogues=16, turns=2, reply_tokens=8,
        held_out=32, learning_rate=4e-3, kl_coef=0.0, num_ppo_epochs=4, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    assert trainer.state.log_history[-1]["dialogues/turns"] == 2
    after = trainer.evaluate()
    assert after["eval_others_objective/scores"] > before["eval_others_objective/scores"] + 0.5


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_four_ways_to_tune(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    before = tuning.perplexity(tiny.policy(), tokenizer, CHATS[:2])
    rates = {"full": 1e-2, "lora": 3e-2, "prefix": 1e-1, "prompt": 1e-1}
    got = {
        method: tuning.tune(
            method, tiny.policy(), tokenizer, CHATS, CHATS[:2], tmp_path / method, steps=6, learning_rate=rates[method],
            max_length=32,
        )
        for method in tuning.METHODS
    }  # fmt: skip
    assert got["full"].share == 1 and got["full"].perplexity < 0.7 * before
    assert got["lora"].perplexity < 0.9 * before
    assert got["full"].trainable > got["lora"].trainable > got["prompt"].trainable == 16 * 32
    assert got["prefix"].trainable == 16 * 2 * 2 * 16  # tokens, layers, keys and values, their width
    assert all(np.isfinite(x.perplexity) for x in got.values())
    with pytest.raises(ValueError, match="method must be one of full, lora, prefix, prompt, got 'adapter'"):
        tuning.peft_config("adapter")


@pytest.mark.parametrize(
    "chats", [[["how are you", "fine"], ["how do you", "good"]], [["hi"], ["hi", "fine"]]]
)
def test_perplexity_leaves_out_what_every_chat_begins_with(chats: list[list[str]]) -> None:
    tokenizer, model = tiny.tokenizer(), tiny.policy()
    losses = []
    for chat in chats:
        ids = torch.tensor([tokenizer.apply_chat_template(policy.as_chat(chat), return_dict=False)])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-logprobs.gather(1, ids[0, 1:, None])[:, 0])
    a, b = (tokenizer.apply_chat_template(policy.as_chat(chat), return_dict=False) for chat in chats)
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert shared > 1
    expected = torch.cat([of[shared - 1 :] for of in losses]).mean().exp().item()
    assert tuning.perplexity(model, tokenizer, chats) == pytest.approx(expected, rel=1e-5)


def test_what_was_done_next() -> None:
    chat = ["hi", "how are you?", "fine", "good", "yes", "bye"]
    assert [action for _, action in tuning.actions(chat)] == ["ask", "answer", "end"]
    assert tuning.actions(chat)[1][0] == chat[:4]
    assert [action for _, action in tuning.actions(chat[:5])] == ["ask", "end"]


def test_the_joint_loss_learns_replies_and_actions() -> None:
    chats = [
        ["hello", "what do you like?", "the park", "lovely"],
        ["good day", "how are you?", "fine", "bye"],
    ]
    tokenizer = tiny.tokenizer()
    joint = tuning.JointModel(tiny.policy(max_position_embeddings=128), tokenizer, weight=0.5)
    turns, action = tuning.actions(chats[0])[0]
    loss, generation, logits = joint(turns, action)
    wanted = torch.tensor(["answer", "ask", "end"].index("ask"))
    assert action == "ask"
    torch.testing.assert_close(loss, generation + 0.5 * torch.nn.functional.cross_entropy(logits, wanted))
    # The generation loss is that of the reply's tokens alone.
    messages = policy.as_chat(turns)
    whole = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=False)])
    labels = whole.clone()
    labels[
        :, : len(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False))
    ] = -100
    torch.testing.assert_close(generation, joint.model(input_ids=whole, labels=labels).loss)

    perplexity, _ = tuning.measure_jointly(joint, chats)
    tuning.train_jointly(joint, chats, steps=25, batch=4, rate=5e-3)
    after, share = tuning.measure_jointly(joint, chats)
    assert after < 0.3 * perplexity and share == 1
    manager = DialogueManager(tokenizer, max_tokens=100, reply_tokens=10, act=joint.act)
    manager.hear("hello")
    assert manager.action() == "ask"
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        tuning.JointModel(tiny.policy(), tokenizer, -1)


def test_the_command_line() -> None:
    assert parse(["ppo", "--updates", "3"]).updates == 3
    with pytest.raises(SystemExit):
        parse(["sing"])
