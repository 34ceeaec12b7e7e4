"""The loss of numbers: the ranked probability score of the tokens of digits."""

from typing import Any

import numpy as np
import pytest
import torch

from umbrella.models.number_loss import NUMBER_WEIGHT, NumberLoss
from umbrella.models.token_nll import supervised_positions, token_nll

TOKENS = {1: "4", 2: "1", 3: "9", 5: "41", 6: "42", 7: "90"}
POINT, WORD, WIDTH = 8, 9, 16


def losses(ids: list[int], seed: int = 0, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(negative log likelihoods, losses, logits) of one row, where every token is supervised."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn((1, len(ids), WIDTH), generator=generator, requires_grad=True)
    embedding = torch.randn((10, WIDTH), generator=generator)
    input_ids, weights = torch.tensor([ids]), torch.ones(1, len(ids))
    nll = token_nll(hidden, embedding, input_ids, weights)
    number_loss = NumberLoss(TOKENS, {POINT}, 10)
    loss = number_loss(nll, hidden, embedding, input_ids, supervised_positions(weights))
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    return nll.detach()[0], loss.detach()[0], (hidden @ embedding.T).detach()[0]


def test_the_loss_of_a_number_is_its_form_and_the_integral_of_the_squared_cumulative_difference() -> None:
    nll, loss, logits = losses([WORD, 6, WORD])
    probability = logits[0].softmax(-1)
    of_two_digits = probability[[5, 6, 7]]
    shares = of_two_digits / of_two_digits.sum()
    grid = np.linspace(4.0, 9.1, 100_001)  # in units of the first digit
    predicted = sum(p.item() * (grid >= v) for p, v in zip(shares, (4.1, 4.2, 9.0), strict=True))
    score = np.mean((predicted - (grid >= 4.2)) ** 2) * (grid[-1] - grid[0])
    assert loss[1].item() == pytest.approx(-of_two_digits.sum().log().item() + NUMBER_WEIGHT * score, rel=1e-3)
    assert loss[2] == nll[2], "other tokens have their negative log likelihood"


def test_a_near_number_costs_less_than_a_far_one() -> None:
    hidden, weights = torch.ones(1, 2, 1), torch.tensor([[0.0, 1.0]])
    ids = torch.tensor([[WORD, 5]])
    costs = []
    for near, far in ((8.0, 0.0), (0.0, 8.0)):
        embedding = torch.tensor([[0.0]] * 6 + [[near], [far], [0.0], [0.0]])  # 42 or 90 instead of 41
        nll = token_nll(hidden, embedding, ids, weights)
        costs.append(NumberLoss(TOKENS, {POINT}, 10)(nll, hidden, embedding, ids, supervised_positions(weights))[0, 1])
        assert nll[0, 1] == pytest.approx(8.0, abs=0.1), "cross entropy does not tell them apart"
    assert costs[1] > 10 * costs[0]


@pytest.mark.parametrize(
    ("ids", "factor"),
    [
        ([WORD, 1, 2, WORD], 0.1),  # 41: the second digit
        ([WORD, 1, POINT, 2], 0.1),  # 4.1
        ([WORD, 1, WORD, 2], 1.0),  # two numbers
    ],
)
def test_later_digits_count_a_tenth(ids: list[int], factor: float) -> None:
    _, loss, logits = losses(ids)
    at = len(ids) - 1 if ids[-1] == 2 else len(ids) - 2
    shares = logits[at - 1].softmax(-1)[[2, 1, 3]]  # 1, 4, 9
    form, cumulative = -shares.sum().log(), (shares / shares.sum()).cumsum(0)
    score = 3 * (cumulative[0] - 1) ** 2 + 5 * (cumulative[1] - 1) ** 2
    assert loss[at].item() == pytest.approx((form + NUMBER_WEIGHT * factor * score).item(), rel=1e-4)
