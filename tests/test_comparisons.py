"""What rows of comparisons say: the schemas of the field's datasets, the flaws that are counted, and the tokens."""

import numpy as np
import pytest

from crucible_kitchen.comparisons import Comparison, Flaw, Verdict, read_comparison
from crucible_kitchen.errors import ConfigError, RowError, SequenceTooLong
from crucible_kitchen.pairs import Answers, PairConfig, render_answers
from crucible_kitchen.types import Message
from crucible_kitchen_noop.tokenizer import ByteTokenizer

QUESTION, GOOD, BAD = "Is 4 even?", "yes", "no"


def turn(role, content):
    return {"role": role, "content": content}


HHH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is 4 even?\n\nAssistant: yes",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is 4 even?\n\nAssistant: no",
}
ULTRAFEEDBACK = {
    "prompt": QUESTION,
    "prompt_id": "x",
    "messages": [turn("user", QUESTION), turn("assistant", GOOD)],
    "chosen": [turn("user", QUESTION), turn("assistant", GOOD)],
    "rejected": [turn("user", QUESTION), turn("assistant", BAD)],
    "score_chosen": 8.0,
    "score_rejected": 2.0,
}
HELPSTEER = {
    "domain": "general",
    "language": "english",
    "context": [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", QUESTION)],
    "response1": BAD,
    "response2": GOOD,
    "overall_preference": 2,
    "individual_preference": [],
}


def last(example):
    return example.messages[-1].content if example.messages else example.completion


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
        {"question": QUESTION, "system": "Be brief.", "chosen": GOOD, "rejected": BAD},
        {"prompt": [turn("user", QUESTION)], "chosen": GOOD, "rejected": BAD},
        {
            "prompt": [turn("user", QUESTION)],
            "chosen": [turn("assistant", GOOD)],
            "rejected": [turn("assistant", BAD)],
        },
        {k: ULTRAFEEDBACK[k] for k in ("chosen", "rejected")},
        HHH,
        ULTRAFEEDBACK,
        HELPSTEER,
        HELPSTEER | {"response1": GOOD, "response2": BAD, "overall_preference": -3},
    ],
    ids=["text", "question", "chat prompt", "chat", "conversations", "hhh", "ultrafeedback", "helpsteer3", "first"],
)
def test_every_schema_says_which_answer_was_preferred(row):
    found = read_comparison(row, {})
    assert isinstance(found, Comparison)
    assert (last(found.chosen), last(found.rejected)) == (GOOD, BAD)


def test_a_transcript_is_a_conversation():
    found = read_comparison(HHH, {})
    assert found.chosen.messages == (
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", QUESTION),
        Message("assistant", GOOD),
    )


def test_the_fields_of_other_rows_are_named():
    row = {"q": QUESTION, "good": GOOD, "bad": BAD}
    found = read_comparison(row, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert (found.chosen.prompt, found.chosen.completion, found.rejected.completion) == (QUESTION, GOOD, BAD)
    with pytest.raises(ConfigError, match="maps 'winner'"):
        read_comparison(row, {"winner": "good"})


@pytest.mark.parametrize(("label", "wanted"), [(True, True), (0, False)])
def test_a_single_answer_is_wanted_or_not(label, wanted):
    found = read_comparison({"prompt": QUESTION, "completion": GOOD, "label": label}, {})
    assert isinstance(found, Verdict)
    assert found.desirable is wanted


@pytest.mark.parametrize(
    ("row", "flaw"),
    [
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": " "}, Flaw.EMPTY_SIDE),
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": GOOD}, Flaw.EQUAL_SIDES),
        (HELPSTEER | {"overall_preference": 0}, Flaw.TIE),
        (HHH | {"rejected": "\n\nHuman: Is 5 even?\n\nAssistant: no"}, Flaw.UNLIKE_PROMPTS),
        (HHH | {"rejected": "\n\nHuman: Is 4 even?"}, Flaw.NO_ANSWER),
        ({"prompt": QUESTION, "completion": "", "label": True}, Flaw.EMPTY_SIDE),
    ],
)
def test_a_row_that_teaches_nothing_has_a_flaw(row, flaw):
    assert read_comparison(row, {}) is flaw


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": QUESTION, "chosen": GOOD}, "rejected"),
        ({"prompt": QUESTION, "chosen": 3, "rejected": BAD}, "chosen"),
        ({"chosen": GOOD, "rejected": BAD}, "prompt"),
        ({"prompt": QUESTION, "completion": GOOD}, "chosen"),
        ({"prompt": QUESTION, "completion": GOOD, "label": "good"}, "label"),
        (HELPSTEER | {"overall_preference": "first"}, "overall_preference"),
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_that_names_the_field_and_no_content(row, field):
    with pytest.raises(RowError) as caught:
        read_comparison(row, {}, 7)
    assert (caught.value.row, caught.value.field) == (7, field)
    assert QUESTION not in f"{caught.value} {caught.value.hint}"


# --- tokens ----------------------------------------------------------------------------------------------------------


def rendered(rows, *, paired=True, context_length=0, **config):
    return render_answers(
        rows, ByteTokenizer(), PairConfig(dataset="x", **config), paired=paired, context_length=context_length
    )


def text_of(datum):
    whole = [*datum.inputs["tokens"], datum.loss_inputs["target_tokens"][-1]]
    answer = datum.loss_inputs["target_tokens"][datum.loss_inputs["weights"] > 0]
    return ByteTokenizer().decode(whole), ByteTokenizer().decode(answer)


ROWS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(3)]


def test_a_pair_is_two_datums_whose_answers_count_alone():
    answers = rendered(ROWS)
    assert len(answers) == 3
    assert [text_of(d) for d in answers.datums(1)] == [("1+1=2", "2"), ("1+1=3", "3")]
    assert [d.key for d in answers.datums(1)] == ["train/1", "train/1"]


def test_single_answers_come_from_single_rows_and_from_pairs():
    rows = [*ROWS[:1], {"prompt": "1+1=", "completion": "3", "label": False}]
    answers = rendered(rows, paired=False)
    assert answers.desirable.tolist() == [True, False, False]
    with pytest.raises(RowError, match="this loss compares pairs"):
        rendered(rows)


def test_a_mismatched_answer_is_one_of_another_prompt():
    answers = rendered(ROWS, paired=False)
    assert text_of(answers.mismatched(0))[0] == "0+1=2"
    assert text_of(answers.mismatched(5))[0] == "2+1=1"


def test_flaws_are_counted_by_reason_or_refused():
    rows = [*ROWS, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "", "rejected": "b"}]
    answers = rendered(rows)
    assert len(answers) == 3
    assert answers.flaws == {"equal sides": 1, "an empty side": 1}
    with pytest.raises(RowError, match=r"row 3.*equal sides"):
        rendered(rows, on_bad_pair="error")


def test_an_answer_beyond_the_longest_sequence_is_cut_left_out_or_refused_and_never_silently_trained_on():
    long = {"prompt": "abc", "chosen": "d" * 9, "rejected": "e"}
    twins = {"prompt": "abc", "chosen": "d" * 9, "rejected": "d" * 8 + "x"}
    shown = len(rendered([long]).datums(0)[0])
    cut = rendered([*ROWS, long, twins], context_length=shown - 3)
    assert cut.tokens.truncated == 1
    assert cut.flaws == {"sides that are equal once cut at the longest sequence allowed": 1}
    dropped = rendered([*ROWS, long], context_length=shown - 3, on_too_long="drop")
    assert (len(dropped), sum(dropped.flaws.values())) == (3, 1)
    with pytest.raises(SequenceTooLong, match="row 0"):
        rendered([long], context_length=shown - 3, on_too_long="error")
    nothing = rendered([*ROWS, long | {"prompt": "a" * 50}], context_length=20)
    assert (len(nothing), sum(nothing.flaws.values())) == (3, 1)


def test_parts_joined_are_the_whole():
    whole = rendered(ROWS)
    parts = [
        render_answers([row], ByteTokenizer(), PairConfig(dataset="x"), paired=True, first=i)
        for i, row in enumerate(ROWS)
    ]
    joined = Answers.join(parts)
    assert len(joined) == len(whole)
    assert np.array_equal(joined.tokens.tokens, whole.tokens.tokens)
    assert [d.key for d in joined.datums(2)] == ["train/2"] * 2
