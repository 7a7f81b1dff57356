"""From rows to weighted tokens, token by token."""

from collections.abc import Sequence

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible_kitchen.config import DataConfig
from crucible_kitchen.errors import ConfigError, DataError, RowError, SequenceTooLong
from crucible_kitchen.rendering import (
    TokenizedDataset,
    epoch_order,
    eval_example,
    render,
    tokenize,
)
from crucible_kitchen.rows import read_row
from crucible_kitchen.stages.data import EpochBatches
from crucible_kitchen.types import Message

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TURNS = (
    "<|bos|>{% for m in messages %}{% if m.role == 'assistant' %} A:{{ m.content }}<|end|>"
    "{% else %}[{{ m.role[0] }}]{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} A:{% endif %}"
)
FORGETFUL = (  # like reasoning models' templates: only the last assistant message keeps its thought
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ("<|bos|>", "<|start|>", "<|end|>", "<think>")


def eval_prompt(row, tokenizer, settings, *, index=0):
    """What the model is asked, and what it should answer."""
    example = eval_example(row, tokenizer, settings, index=index)
    return list(example.prompt), example.reference


class Characters:
    """A tokenizer with one id per character, four special tokens and a Jinja chat template."""

    vocab_size = 1000
    eos_id = SPECIAL.index("<|end|>")

    def __init__(self, template: str = CHATML, *, chat: bool = False, bos: bool = False) -> None:
        self.template = jinja2.Template(template)
        self.chat = chat
        self.prefix_ids = (0,) if bos else ()

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            special = next((s for s in SPECIAL if text.startswith(s)), None)
            ids.append(SPECIAL.index(special) if special else ord(text[0]))
            text = text[len(special or "x") :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i >= len(SPECIAL))

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[int]:
        return self.encode(self.template.render(messages=messages, add_generation_prompt=generation_prompt))


def shown(ids: Sequence[int]) -> str:
    return "".join(SPECIAL[i] if i < len(SPECIAL) else chr(i) for i in ids)


def config(**values) -> DataConfig:
    return DataConfig(dataset="x", **values)


def rendered(row, tokenizer=None, **values):
    result = render(read_row(row, values.get("fields", {})), tokenizer or Characters(), config(**values))
    assert result is not None
    assert len(result.tokens) == len(result.weights)
    return result


def marked(row, tokenizer=None, **values) -> str:
    """Render a row and put what counts in the loss between « and »."""
    result = rendered(row, tokenizer, **values)
    text, counts = "", False
    for token, weight in [*zip(result.tokens, result.weights, strict=True), (None, False)]:
        text += "«" * (weight and not counts) + "»" * (counts and not weight)
        counts = weight
        text += "" if token is None else shown([token])
    return text


TALK = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "thanks"},
    ]
}


# --- what a row says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "response": "a"},
        {"instruction": "q", "output": "a", "input": ""},
        {"input": "q", "output": "a"},
        {"question": "q", "answer": "a", "metadata": {"x": 1}},
    ],
)
def test_prompts_and_completions_are_found_under_their_usual_names(row):
    example = read_row(row, {})
    assert (example.prompt, example.completion, example.messages, example.is_text) == ("q", "a", (), False)


@pytest.mark.parametrize("context", ["input", "context"])
def test_an_instruction_is_followed_by_its_context(context):
    assert read_row({"instruction": "sort", context: "3 1", "output": "1 3"}, {}).prompt == "sort\n\n3 1"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_conversations_are_found_in_all_their_shapes(row):
    assert read_row(row, {}).messages == (Message("user", "q"), Message("assistant", "a"))


def test_fields_say_what_is_meant_and_win_over_the_rows_shape():
    row = {"messages": [], "prompt": "no", "completion": "no", "frage": "q", "antwort": "a", "text": "t"}
    example = read_row(row, {"prompt": "frage", "completion": "antwort"})
    assert (example.prompt, example.completion) == ("q", "a")
    assert read_row(row, {"text": "frage"}).completion == "q"
    assert read_row({"prompt": "q", "label": "a"}, {"completion": "label"}).completion == "a"
    assert (
        read_row({"a": "q", "b": "c", "d": "e"}, {"prompt": "a", "completion": "b", "context": "d"}).prompt == "q\n\ne"
    )
    turns = [{"role": "user", "content": "q"}]
    assert read_row({"talk": turns, "text": "t"}, {"messages": "talk"}).messages == (Message("user", "q"),)


def test_a_field_called_labels_is_used_only_if_it_holds_candidate_answers():
    assert read_row({"text": "t", "labels": 3}, {}).labels == ()
    assert read_row({"prompt": "q", "completion": "a", "labels": ["a", "b"]}, {}).labels == ("a", "b")
    with pytest.raises(RowError, match="candidate answers"):
        read_row({"text": "t", "choices": 3}, {"labels": "choices"})


@pytest.mark.parametrize(
    ("row", "fields", "field", "problem"),
    [
        ({"prompt": "q"}, {}, "completion", "missing"),
        ({"completion": "a"}, {}, "prompt", "missing"),
        ({"answer": "a"}, {}, "question", "missing"),
        ({}, {}, "prompt", "missing"),
        ({"prompt": "q", "completion": 3}, {}, "completion", "is int"),
        ({"prompt": None, "completion": "a"}, {}, "prompt", "missing"),
        ({"text": ["t"]}, {}, "text", "is list"),
        ({"a": "q"}, {"prompt": "a", "completion": "b"}, "b", "missing"),
        ({"a": "q"}, {"messages": "b"}, "b", "missing"),
        ({"messages": []}, {}, "messages", "one or more"),
        ({"messages": "hi"}, {}, "messages", "one or more"),
        ({"messages": ["hi"]}, {}, "messages[0]", "is str"),
        ({"messages": [{"role": "user"}]}, {}, "messages[0].content", "is missing"),
        ({"conversations": [{"from": "human", "value": 1}]}, {}, "conversations[0].value", "is int"),
    ],
)
def test_a_bad_row_is_named_with_its_field_and_never_shown(row, fields, field, problem):
    with pytest.raises(RowError, match=problem) as caught:
        read_row(row, fields, 17)
    assert (caught.value.row, caught.value.field) == (17, field)


def test_a_mapping_of_an_unknown_name_is_a_config_error():
    with pytest.raises(ConfigError, match="'propmt'"):
        read_row({"text": "t"}, {"propmt": "text"})


# --- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last_assistant_message", "<|bos|>1+1=«2<|end|>»"),
        ("all_assistant_messages", "<|bos|>1+1=«2<|end|>»"),
        ("all_messages", "<|bos|>«1+1=2<|end|>»"),
        ("all_tokens", "«<|bos|>1+1=2<|end|>»"),
    ],
)
def test_a_plain_pair_counts_completion_and_end_token(train_on, expected):
    assert marked({"prompt": "1+1=", "completion": "2"}, Characters(bos=True), train_on=train_on) == expected


def test_running_text_counts_as_a_whole():
    assert marked({"text": "abc"}, Characters(bos=True)) == "<|bos|>«abc<|end|>»"


def test_a_system_prompt_stands_before_a_plain_prompt():
    assert marked({"prompt": "q", "completion": "a"}, system_prompt="be kind") == "be kind\n\nq«a<|end|>»"


def test_a_question_and_answer_can_be_written_plainly_and_a_longer_talk_cannot():
    assert marked({"messages": TALK["messages"][:3]}, template="plain") == "be kind\n\nhi«yo<|end|>»"
    with pytest.raises(RowError, match="cannot be written plainly"):
        rendered(TALK, template="plain")


# --- chat ------------------------------------------------------------------------------------------------------------

HEAD = "<|start|>system\nbe kind<|end|>\n<|start|>user\nhi<|end|>\n"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        (
            "last_assistant_message",
            HEAD + "<|start|>assistant\nyo<|end|>\n<|start|>user\n2+2<|end|>\n<|start|>assistant\n«4<|end|>»\n",
        ),
        (
            "all_assistant_messages",
            HEAD + "<|start|>assistant\n«yo<|end|>»\n<|start|>user\n2+2<|end|>\n<|start|>assistant\n«4<|end|>»\n",
        ),
        (
            "all_messages",
            "<|start|>system\n«be kind<|end|>»\n<|start|>user\n«hi<|end|>»\n<|start|>assistant\n«yo<|end|>»\n"
            "<|start|>user\n«2+2<|end|>»\n<|start|>assistant\n«4<|end|>»\n<|start|>user\n«thanks<|end|>»\n",
        ),
        (
            "all_tokens",
            f"«{HEAD}<|start|>assistant\nyo<|end|>\n<|start|>user\n2+2<|end|>\n<|start|>assistant\n4<|end|>\n"
            "<|start|>user\nthanks<|end|>\n»",
        ),
    ],
)
def test_train_on_says_which_tokens_of_a_conversation_count(train_on, expected):
    assert marked(TALK, train_on=train_on) == expected


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("last_assistant_message", "<|bos|>[s]be kind[u]hi A:yo<|end|>[u]2+2 A:«4<|end|>»"),
        ("all_assistant_messages", "<|bos|>[s]be kind[u]hi A:«yo<|end|>»[u]2+2 A:«4<|end|>»"),
        ("all_messages", "<|bos|>[s]«be kind»[u]«hi» A:«yo<|end|>»[u]«2+2» A:«4<|end|>»[u]«thanks»"),
    ],
)
def test_a_template_without_end_tokens_for_users_is_understood_too(train_on, expected):
    assert marked(TALK, Characters(TURNS), train_on=train_on) == expected


def test_what_is_trained_begins_exactly_where_sampling_begins():
    tokenizer = Characters(TURNS)
    result = rendered(TALK, tokenizer)
    prompt, reference = eval_prompt(TALK, tokenizer, config())
    assert result.tokens[: len(prompt)] == prompt
    assert result.weights.index(True) == len(prompt)
    assert reference == "4"


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters_and_only_there():
    assert marked(TALK, Characters(FORGETFUL)).endswith("assistant\n«<think>4<|end|>»")
    with pytest.raises(DataError, match="row 0: the chat template writes message 2 differently") as caught:
        rendered(TALK, Characters(FORGETFUL), train_on="all_assistant_messages")
    assert "last_assistant_message" in str(caught.value.hint)


def test_a_template_whose_generation_prompt_is_not_how_it_writes_answers_is_refused():
    template = CHATML.replace("<|start|>assistant\n{% endif", "<|start|>assistant\n<think>{% endif")
    with pytest.raises(DataError, match="as the generation prompt opens it"):
        rendered(TALK, Characters(template))


@pytest.mark.parametrize(
    ("chat", "template", "expected"),
    [
        (True, "auto", "<|start|>user\nq<|end|>\n<|start|>assistant\n«a<|end|>»\n"),
        (False, "auto", "q«a<|end|>»"),
        (False, "chat", "<|start|>user\nq<|end|>\n<|start|>assistant\n«a<|end|>»\n"),
        (True, "plain", "q«a<|end|>»"),
    ],
)
def test_a_pair_is_wrapped_as_the_model_is_meant_to_be_used_unless_told_otherwise(chat, template, expected):
    row = {"prompt": "q", "completion": "a"}
    tokenizer = Characters(chat=chat)
    assert marked(row, tokenizer, template=template) == expected
    prompt, reference = eval_prompt(row, tokenizer, config(template=template))
    assert shown(prompt) == expected.split("«")[0]
    assert reference == "a"


def test_a_system_prompt_is_put_before_conversations_that_have_none():
    row = {"messages": TALK["messages"][1:3]}
    assert marked(row, system_prompt="S").startswith("<|start|>system\nS<|end|>\n<|start|>user\nhi")
    assert marked(TALK, system_prompt="S").startswith(HEAD)


def test_a_conversation_without_an_assistant_has_nothing_to_learn_from_or_to_answer():
    row = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(RowError, match="no assistant message"):
        rendered(row)
    with pytest.raises(RowError, match="no assistant message"):
        eval_prompt(row, Characters(), config())
    assert marked(row, train_on="all_messages") == "<|start|>user\n«hi<|end|>»\n"


def test_running_text_cannot_be_evaluated():
    with pytest.raises(RowError, match="asks nothing"):
        eval_prompt({"text": "t"}, Characters(), config(), index=3)


def test_an_eval_example_has_a_stable_key_and_its_own_labels_first():
    row = {"prompt": "q", "completion": "a", "labels": ["a", "b"]}
    example = eval_example(row, Characters(), config(split="test"), index=4, labels=("x",))
    assert (example.key, example.reference, example.labels) == ("test/4", "a", ("a", "b"))
    del row["labels"]
    assert eval_example(row, Characters(), config(), labels=("x",)).labels == ("x",)


# --- too long --------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "q", "completion": "a"},  # 3 tokens
    {"prompt": "q", "completion": "abcdef"},  # 8, cut to 5
    {"prompt": "longer", "completion": "a"},  # 8, nothing to learn within 5
    {"prompt": "qq", "completion": "ab"},  # 5
]


def test_too_long_rows_are_cut_and_counted_and_left_out_if_nothing_is_left_to_learn():
    data = tokenize(ROWS, Characters(), config(max_length=5))
    assert [data.key(i) for i in range(len(data))] == ["train/0", "train/1", "train/3"]
    assert (data.truncated, data.dropped, data.longest) == (1, 1, 5)
    assert shown(data.datum(1).inputs["tokens"]) == "qabc"


def test_too_long_rows_are_left_out_and_counted():
    data = tokenize(ROWS, Characters(), config(max_length=5, on_too_long="drop"))
    assert [data.key(i) for i in range(len(data))] == ["train/0", "train/3"]
    assert (data.truncated, data.dropped) == (0, 2)


def test_too_long_rows_are_refused_with_their_number_and_length():
    with pytest.raises(SequenceTooLong, match="row 11 has 8 tokens, more than 5"):
        tokenize(ROWS, Characters(), config(max_length=5, on_too_long="error"), first=10)


def test_the_models_own_limit_wins_if_it_is_shorter():
    data = tokenize(ROWS, Characters(), config(max_length=100), context_length=5)
    assert (data.longest, data.truncated) == (5, 1)
    assert tokenize(ROWS, Characters(), config(max_length=4), context_length=50).longest == 4


def test_empty_text_is_left_out():
    data = tokenize([{"text": ""}, {"text": "a"}], Characters(), config())
    assert (len(data), data.dropped) == (1, 1)


# --- datasets of tokens ----------------------------------------------------------------------------------------------


def test_a_datum_is_the_rendered_row_shifted_by_one():
    data = tokenize([{"prompt": "1+1=", "completion": "2"}], Characters(bos=True), config(), first=17)
    datum = data.datum(0)
    assert datum.key == "train/17"
    assert shown(datum.inputs["tokens"]) == "<|bos|>1+1=2"
    assert shown(datum.loss_inputs["target_tokens"]) == "1+1=2<|end|>"
    assert datum.loss_inputs["weights"].tolist() == [0, 0, 0, 0, 1, 1]
    assert datum.loss_inputs["weights"].dtype == np.float32
    assert datum.inputs["tokens"].dtype == np.int64


def test_tokens_that_count_are_counted_as_targets():
    rows = [{"prompt": "1+1=", "completion": "2"}, {"text": "abc"}]
    data = tokenize(rows, Characters(), config())
    assert data.trained_tokens == sum(int(data.datum(i).loss_inputs["weights"].sum()) for i in range(2)) == 5
    assert data.token_count == 10


texts = st.text(alphabet="abc", max_size=6)


@given(rows=st.lists(st.builds(lambda p, c: {"prompt": p, "completion": c}, texts, texts)), cut=st.integers(0, 20))
def test_chunks_joined_are_the_whole(rows, cut):
    settings = config(max_length=6)
    whole = tokenize(rows, Characters(), settings)
    parts = [
        tokenize(rows[:cut], Characters(), settings),
        tokenize(rows[cut:], Characters(), settings, first=len(rows[:cut])),
    ]
    joined = TokenizedDataset.join(parts)
    assert len(joined) == len(whole) == len(rows) - whole.dropped
    assert (joined.truncated, joined.dropped) == (whole.truncated, whole.dropped)
    for name in ("tokens", "weights", "offsets", "row_ids"):
        a, b = getattr(joined, name), getattr(whole, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_no_rows_give_an_empty_dataset():
    data = tokenize([], Characters(), config())
    assert (len(data), data.token_count, data.trained_tokens, data.longest) == (0, 0, 0, 0)


@given(n=st.integers(0, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_every_epoch_sees_every_row_once(n, seed, epoch):
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))
    assert epoch_order(n, seed, epoch, shuffle=False).tolist() == list(range(n))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert np.array_equal(epoch_order(50, 3, 2), epoch_order(50, 3, 2))
    assert epoch_order(8, 0, 1).tolist() == [1, 3, 7, 6, 0, 4, 2, 5]


@given(n=st.integers(0, 100), size=st.integers(1, 20))
def test_batches_cover_everything_and_only_the_last_is_smaller(n, size):
    steps = -(-n // size)
    parts = [batch.rows for batch in EpochBatches(0, np.arange(n), size, steps)]
    assert [i for part in parts for i in part] == list(range(n))
    assert all(len(part) == size for part in parts[:-1])
