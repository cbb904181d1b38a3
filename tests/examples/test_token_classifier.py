from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from examples import token_classifier
from examples.token_classifier import TAGS, Sentence, Tagger, cross_entropy, make_sentences, preference


def tiny_tagger(seed: int = 0) -> Tagger:
    """A BERT that knows the words of the templates; every name is [UNK] to it, so that context has to tell."""
    words = {word for template in token_classifier.TEMPLATES for word in template.split() if "{" not in word}
    words |= {"University", "of", "Airlines", "Bank", "&", "Sons", "Motors", "United", "Institute"}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        num_labels=len(TAGS),
    )
    return Tagger(BertForTokenClassification(config), fast)


def tags(*names: str) -> torch.Tensor:
    return torch.tensor([[TAGS.index(name) for name in names]])


def test_rewards_by_hand():
    sampled, true = tags("O", "B-PER", "B-LOC"), tags("O", "B-PER", "B-ORG")
    expected = [-math.log(0.9), -math.log(0.9), -math.log(0.1 / 6)]
    torch.testing.assert_close(cross_entropy(sampled, true), torch.tensor([expected]))
    readers = preference(tags("B-PER", "I-PER", "I-PER", "O", "I-LOC", "B-ORG", "I-LOC", "I-LOC"))
    assert readers.tolist() == [[1, 0, 0, 0, -1, 1, -1, 0]]


def test_splits_share_no_name_and_have_every_tag():
    parts = {split: make_sentences(split, 300) for split in token_classifier.SPLITS}
    first_words = {
        split: {s.words[i] for s in sentences for i, tag in enumerate(s.tags) if TAGS[tag] == "B-PER"}
        for split, sentences in parts.items()
    }
    assert (
        not first_words["train"] & first_words["validation"]
        and not first_words["train"] & first_words["test"]
    )
    for sentences in parts.values():
        assert {tag for s in sentences for tag in s.tags} == set(range(len(TAGS)))
        assert all(len(s.words) == len(s.tags) for s in sentences)
    assert make_sentences("test", 5, seed=1) != make_sentences("test", 5)
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        make_sentences("dev", 1)


def test_a_word_is_read_at_its_first_token_whatever_stands_beside_it():
    tagger = tiny_tagger()
    short, long = Sentence(["Shares", "of", "it"], [0, 0, 0]), make_sentences("train", 1)[0]
    with torch.no_grad():
        alone, values = tagger([short])
        beside, _ = tagger([short, long])
    assert alone.shape == (1, 3, 7) and values.shape == (1, 3)
    torch.testing.assert_close(beside[0, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_ppo_tags_names_it_has_not_seen_better_than_before(tmp_path, capsys):
    tagger = tiny_tagger()
    arguments = ["--sentences", "480", "--epochs", "6", "--learning-rate", "1e-3", "--warm-up", "60"]
    result = token_classifier.main([*arguments, "--validate-every", "15", "--output", str(tmp_path)], tagger)
    (_, reward_before, f1_before), *_, (_, reward, f1) = result["history"]
    assert reward > reward_before + 0.1 and f1 > f1_before + 0.1
    assert result["f1"] > 0.6
    saved = AutoModelForTokenClassification.from_pretrained(tmp_path)
    for kept, trained in zip(saved.parameters(), tagger.model.parameters(), strict=True):
        torch.testing.assert_close(kept, trained)
    printed = capsys.readouterr().out
    assert "F1, validation" in printed and "micro avg" in printed


def test_stops_early_and_keeps_the_best_weights():
    tagger, sentences = tiny_tagger(), make_sentences("train", 64)
    before = tagger.model.classifier.weight.clone()
    settings = token_classifier.Settings(learning_rate=0.0, epochs=50, validate_every=1, patience=3)
    history = token_classifier.train(tagger, sentences, sentences[:8], settings)
    assert [updates for updates, *_ in history] == [1, 2, 3, 4]  # the first is the best, three are no better
    assert torch.equal(tagger.model.classifier.weight, before)
