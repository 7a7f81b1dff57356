"""Token ids of the wire: integers, or an error that says what they are not."""

import numpy as np
import pytest

from crucible_kitchen.errors import BackendUserError
from crucible_kitchen.wire.codec import loads, parse, token_ids, tokens_from_wire
from crucible_kitchen.wire.messages import ModelInput


def model_input(*chunks):
    return parse(ModelInput, loads(f'{{"chunks": [{",".join(chunks)}]}}'.encode()))


def text(tokens):
    return f'{{"type": "encoded_text", "tokens": {tokens}}}'


def test_the_tokens_of_all_chunks_come_one_after_another():
    value = model_input(text([1, 2]), text([]), text([3]))
    assert token_ids(value) == [1, 2, 3]
    array = tokens_from_wire(value)
    assert array.dtype == np.int64
    assert array.tolist() == [1, 2, 3]


@pytest.mark.parametrize("wrong", ['"7"', "7.0", "true", "null", "[7]", "NaN"])
def test_a_token_that_is_no_integer_is_refused(wrong):
    value = model_input(f'{{"tokens": [1, {wrong}]}}')
    for read in (token_ids, tokens_from_wire):
        with pytest.raises(BackendUserError, match="not integers"):
            read(value)


def test_a_token_beyond_64_bits_makes_no_array():
    with pytest.raises(BackendUserError, match="64 bits"):
        tokens_from_wire(model_input(text([1 << 64])))


def test_another_kind_of_chunk_is_refused():
    with pytest.raises(BackendUserError, match="'image'"):
        token_ids(model_input('{"type": "image"}'))
