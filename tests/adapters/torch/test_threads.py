"""A decoding step that is too small for several threads is computed in one; sizes decide, never a clock."""

import pytest
import torch

from crucible_kitchen_torch.threads import enough_threads, mean_matrix


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("matrix", "positions", "keys", "threads"),
    [
        (40_000, 16, 0, 1),  # the tiny model
        (88_000, 16, 16 * 64 * 192, 1),  # a Llama of width 192, sixteen samples of one prompt
        (88_000, 64, 64 * 300 * 192, 2),  # sixty-four long ones of their own
        (88_000, 800, 0, 2),  # a prompt that is read
        (4_000_000, 1, 0, 2),  # a billion weights
    ],
)
def test_what_is_large_enough_is_computed_in_all_threads_and_what_is_not_in_one(matrix, positions, keys, threads):
    with enough_threads(matrix, positions, keys):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_the_threads_are_back_after_an_error():
    with pytest.raises(ValueError, match="in between"), enough_threads(1, 1):
        raise ValueError("in between")
    assert torch.get_num_threads() == 2


def test_a_mean_matrix_leaves_vectors_out():
    assert mean_matrix([torch.zeros(10), torch.zeros(2, 3), torch.zeros(4, 5)]) == 13
    assert mean_matrix([]) == 0
