"""Weights by message, role, turn and pattern on chat templates of several kinds."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.segments import Rule, segment_weights

CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# The system message stands inside the user's, as in Llama 2, and cannot be rendered alone.
INSTRUCTIONS = (
    "{% if messages[-1].role == 'system' %}{{ raise_exception('no user') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<s>[I] ' + (messages[0].content + ' ' if loop.index0 == 1 and messages[0].role == 'system' else '') }}"
    "{{ m.content + ' [/I]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + '<e>' }}{% endif %}{% endfor %}"
)
# Reasoning is dropped from all but the last answer, as in Qwen 3.
FORGETFUL = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '[think]' }}{% endif %}{{ m.content + '<e>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def make_tokenizer(template):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.decoder = decoders.ByteLevel()
    rules.add_special_tokens(["<s>", "<e>"])
    rules.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", rules.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<e>", bos_token="<s>", chat_template=template)


TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "is 4"},
    {"role": "user", "content": "and 3?"},
    {"role": "assistant", "content": "now 7"},
]


def shown(tokenizer, found):
    """The text of each weight other than zero, in order."""
    runs = []
    for token, label, weight in zip(found["input_ids"], found["labels"], found["loss_weights"], strict=True):
        assert label == (token if weight else -100)
        if weight:
            if not runs or runs[-1][0] != weight or not runs[-1][2]:
                runs.append([weight, [], True])
            runs[-1][1].append(token)
        elif runs:
            runs[-1][2] = False
    return [(weight, tokenizer.decode(tokens)) for weight, tokens, _ in runs]


def test_by_default_the_assistant_trains():
    tokenizer = make_tokenizer(CHATML)
    found = segment_weights(tokenizer, TALK)
    assert shown(tokenizer, found) == [(1, "is 4<e>\n"), (1, "now 7<e>\n")]
    assert tokenizer.decode(found["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert shown(tokenizer, segment_weights(tokenizer, TALK[:1])) == []


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"turn": "last", "weight": 2}], [(1, "is 4<e>\n"), (2, "now 7<e>\n")]),
        ([{"turn": 0, "weight": 0}], [(1, "now 7<e>\n")]),
        ([{"turn": -1, "weight": 0}], [(1, "is 4<e>\n")]),
        ([{"message": 1, "weight": 0.5}], [(0.5, "<s>user\n2+2<e>\n"), (1, "is 4<e>\n"), (1, "now 7<e>\n")]),
        ([{"message": -1, "weight": 3}], [(1, "is 4<e>\n"), (3, "now 7<e>\n")]),
        ([{"pattern": r"\d", "weight": 3}], [(1, "is "), (3, "4"), (1, "<e>\n"), (1, "now "), (3, "7"), (1, "<e>\n")]),
        ([{"pattern": r"\d", "role": "user", "weight": 3}, {"weight": 0}], [(3, "2"), (3, "2"), (3, "3")]),
        ([{"weight": 2}, {"weight": 5, "turn": "first"}], [(5, "is 4<e>\n"), (2, "now 7<e>\n")]),
    ],
)
def test_rules(rules, expected):
    tokenizer = make_tokenizer(CHATML)
    assert shown(tokenizer, segment_weights(tokenizer, TALK, rules)) == expected
    assert shown(tokenizer, segment_weights(tokenizer, TALK, [Rule(**rule) for rule in rules])) == expected


def test_prompt_and_response_weights_cover_every_token():
    tokenizer = make_tokenizer(CHATML)
    found = segment_weights(tokenizer, TALK, [{"role": "any", "weight": 0.2}, {"role": "assistant", "weight": 0.8}])
    assert set(found["loss_weights"]) == {0.2, 0.8}
    assert [text for weight, text in shown(tokenizer, found) if weight == 0.8] == ["is 4<e>\n", "now 7<e>\n"]
    assert found["labels"] == found["input_ids"]


def test_a_message_of_the_data_brings_its_own_weight():
    tokenizer = make_tokenizer(CHATML)
    talk = [dict(message) for message in TALK]
    talk[2]["weight"] = 0
    talk[4]["weight"] = 0.5
    found = segment_weights(tokenizer, talk, [{"pattern": r"\d", "weight": 3}])
    assert shown(tokenizer, found) == [(0.5, "now "), (1.5, "7"), (0.5, "<e>\n")]


def test_many_turns():
    tokenizer = make_tokenizer(CHATML)
    talk = [{"role": role, "content": f"{role[0]}{n}"} for n in range(100) for role in ("user", "assistant")]
    runs = shown(tokenizer, segment_weights(tokenizer, talk, [{"turn": 41, "weight": 2}]))
    assert [text for _, text in runs] == [f"a{n}<e>\n" for n in range(100)]
    assert [n for n, (weight, _) in enumerate(runs) if weight == 2] == [41]


def test_messages_that_the_template_melts_together():
    tokenizer = make_tokenizer(INSTRUCTIONS)
    assert shown(tokenizer, segment_weights(tokenizer, TALK)) == [(1, " is 4<e>"), (1, " now 7<e>")]
    with pytest.raises(InputError, match="tell messages 0 to 1 apart"):
        segment_weights(tokenizer, TALK, [{"role": "system", "weight": 1}])


def test_templates_that_rewrite_what_went_before_are_refused():
    tokenizer = make_tokenizer(FORGETFUL)
    with pytest.raises(InputError, match="up to message 2 otherwise"):
        segment_weights(tokenizer, TALK)
    one_turn = segment_weights(tokenizer, TALK[:3])
    assert shown(tokenizer, one_turn) == [(1, "[think]is 4<e>\n")]


def test_plain_text():
    tokenizer = make_tokenizer(CHATML)
    found = segment_weights(
        tokenizer, "é 12 and 3", [{"pattern": r"\d+", "weight": 2}, {"pattern": "and", "weight": 0}]
    )
    assert found["input_ids"] == tokenizer("é 12 and 3")["input_ids"]
    # A character of two tokens counts in both; the special token at the start has no text.
    assert found["loss_weights"] == [1, 1, 1, 1, 2, 2, 1, 0, 0, 0, 1, 2]
    assert segment_weights(tokenizer, "abc")["loss_weights"] == [1] * 4


def test_wrong_rules_and_tokenizers_are_named():
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(InputError) as caught:
        segment_weights(
            tokenizer, TALK, [{"weight": 1}, {"weight": -1, "rolle": "user"}, {"weight": 1, "pattern": "("}]
        )
    assert {problem.field for problem in caught.value.problems} == {
        "rules[1].weight",
        "rules[1].rolle",
        "rules[2].pattern",
    }
    with pytest.raises(InputError, match="gives no offsets"):
        segment_weights(object(), TALK)


def test_the_columns_train(tiny_llama):
    tokenizer = make_tokenizer(CHATML)
    tiny_llama.resize_token_embeddings(len(tokenizer))
    found = segment_weights(tokenizer, TALK[1:3], [{"pattern": "4", "weight": 3}])
    batch = {name: torch.tensor([values]) for name, values in found.items()}
    logits = tiny_llama(input_ids=batch["input_ids"]).logits[0, :-1]
    labels, weights = batch["labels"][0, 1:], batch["loss_weights"][0, 1:]
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (nll * weights).sum() / (labels != -100).sum()
    torch.testing.assert_close(tw.weighted_loss(tiny_llama, batch, tw.LossWeights()), expected, atol=1e-5, rtol=0)
