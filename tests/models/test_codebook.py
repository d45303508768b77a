"""The look-up against a slow reference, and how codes learn."""

import pytest
import torch

from models.codebook import Codebook, look_up, symmetric_commitment_loss, usage
from models.errors import ShapeError


def slow_look_up(tokens: torch.Tensor, codebook: torch.Tensor) -> list[list[int]]:
    """argmin in a loop, in double precision, the first of equals."""
    rows = []
    for image in tokens.double():
        row = []
        for token in image:
            distances = [float(((token - code.double()) ** 2).sum()) for code in codebook]
            row.append(distances.index(min(distances)))
        rows.append(row)
    return rows


def test_look_up_finds_the_code_that_a_loop_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, codes = torch.randn(4, 9, 8, generator=generator), torch.randn(50, 8, generator=generator)

    assert look_up(tokens, codes).tolist() == slow_look_up(tokens, codes)


def test_equal_distances_go_to_the_lower_index() -> None:
    codes = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [-0.5, 0.0]]])

    assert look_up(tokens, codes).tolist() == slow_look_up(tokens, codes) == [[1, 1, 1, 2]]


def test_tokens_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="width 3"):
        look_up(torch.zeros(1, 2, 3), torch.zeros(5, 4))


def test_quantised_tokens_are_codes_and_pass_the_gradient_straight_through() -> None:
    codebook = Codebook(torch.randn(7, 4))
    tokens = torch.randn(2, 3, 4, requires_grad=True)

    quantised, indices, _ = codebook(tokens)
    (quantised * 2).sum().backward()

    assert torch.allclose(quantised, codebook.codes[indices], atol=1e-6)
    assert tokens.grad is not None and torch.allclose(tokens.grad, torch.full_like(tokens, 2.0))


def test_the_commitment_loss_pulls_both_sides() -> None:
    tokens, codes = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)

    symmetric_commitment_loss(tokens, codes).backward()

    assert tokens.grad is not None and codes.grad is not None
    assert torch.allclose(tokens.grad, -codes.grad)


def test_codes_move_to_the_mean_of_the_tokens_that_chose_them() -> None:
    codebook = Codebook(torch.tensor([[0.0, 0.0], [10.0, 10.0]]), decay=0.5)
    tokens = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [11.0, 9.0]]])

    for _ in range(40):
        codebook.follow(tokens, look_up(tokens, codebook.codes))

    assert torch.allclose(codebook.codes, torch.tensor([[2.0, 1.0], [11.0, 9.0]]), atol=1e-2)


def test_a_code_that_nobody_chooses_is_revived_on_a_token() -> None:
    codebook = Codebook(torch.tensor([[0.0, 0.0], [99.0, 99.0]]), decay=0.5)
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    for _ in range(10):
        codebook.follow(tokens, look_up(tokens, codebook.codes))

    revived = codebook.revive(tokens, below=0.05, generator=torch.Generator().manual_seed(0))

    assert revived == 1
    assert codebook.codes[1].tolist() in tokens[0].tolist()


def test_codes_that_learn_by_gradients_are_pulled_by_the_commitment_loss_and_only_counted() -> None:
    codebook = Codebook(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), decay=0.5)
    codebook.learn_by("gradient")
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])

    _, indices, loss = codebook(tokens)
    loss.backward()
    codebook.follow(tokens, indices)

    assert (
        codebook.codes.grad is not None and codebook.codes.grad[0].abs().sum() > 0 == codebook.codes.grad[1].abs().sum()
    )
    assert codebook.codes.tolist() == [[0.0, 0.0], [9.0, 9.0]] and codebook.counts.tolist() == [1.5, 0.5]


def test_the_way_a_codebook_learns_leaves_no_trace_in_its_file() -> None:
    codebook = Codebook(torch.randn(5, 3))
    before = codebook.state_dict()

    codebook.learn_by("gradient")
    codebook.learn_by("ema")

    assert before.keys() == codebook.state_dict().keys() == {"codes"} and not list(codebook.parameters())


def test_usage_of_an_even_codebook_is_its_size() -> None:
    assert usage(torch.full((8,), 5)).perplexity == pytest.approx(8)
    assert usage(torch.tensor([5, 0, 0])).used == 1 and usage(torch.tensor([5, 0, 0])).perplexity == pytest.approx(1)
