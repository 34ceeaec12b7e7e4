"""The loss of the tokens of numbers, which counts how far the predicted numbers are from the true one."""

from collections import defaultdict
from collections.abc import Mapping

import torch

NUMBER_WEIGHT = 10.0
"""Weight of the ranked probability score, in units of the first digit, relative to one nat."""


class NumberLoss:
    """Replaces the negative log likelihood of the tokens of numbers.

    The loss of a token of n digits is the negative log likelihood of *any* token of n digits, plus ``NUMBER_WEIGHT``
    times the ranked probability score (E. S. Epstein, J. Appl. Meteorol. 8, 1969) of the distribution over these
    tokens: the integral of the squared difference between the cumulative distributions of the predicted and the true
    value. A proper score, it is smallest for the true distribution. So 41 is nearer to 42 than to 90, as in the
    number-token loss (J. Zausinger et al., "Regress, Don't Guess", ICML 2025), which uses the Wasserstein distance.

    Values are in units of the first digit of the number: a token that follows k digits of the number counts 10^-k.

    Args:
        tokens: token id to digits, see ``tokenizer.number_tokens``.
        points: ids of the tokens of a decimal point.
        vocabulary: number of rows of the output embedding.
        device: of the model.
    """

    def __init__(
        self, tokens: Mapping[int, str], points: set[int], vocabulary: int, device: torch.device | str = "cpu"
    ) -> None:
        by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for id, digits in tokens.items():
            by_length[len(digits)].append((int(digits), id))
        self.digits = torch.zeros(vocabulary, dtype=torch.long)
        self.points = torch.zeros(vocabulary, dtype=torch.bool)
        self.points[sorted(points)] = True
        self.choices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for length, values in by_length.items():
            ids = torch.tensor([id for _, id in sorted(values)])
            self.digits[ids] = length
            scaled = torch.tensor([value for value, _ in sorted(values)]) / 10 ** (length - 1)
            self.choices[length] = ids.to(device), scaled.to(device)
        self.digits, self.points = self.digits.to(device), self.points.to(device)

    def __call__(
        self,
        nll: torch.Tensor,
        hidden: torch.Tensor,
        output_embedding: torch.Tensor,
        input_ids: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Return ``nll`` with the loss of numbers at supervised tokens of digits.

        Args:
            nll: (B, L), in nats.
            hidden: (B, L, d), the output of the language model.
            output_embedding: (vocabulary, d).
            input_ids: (B, L).
            positions: see ``token_nll.supervised_positions``.
        """
        row, column = positions
        lengths = self.digits[input_ids[row, column + 1]]
        before = self._digits_before(input_ids)[row, column + 1]
        with torch.autocast(hidden.device.type, enabled=False):
            for length, (ids, values) in self.choices.items():
                at = lengths == length
                rows, columns = row[at], column[at]
                logits = hidden[rows, columns].float() @ output_embedding[ids].float().T
                log_probabilities = logits.log_softmax(-1)
                is_true = input_ids[rows, columns + 1, None] == ids
                cumulative = log_probabilities.exp().cumsum(-1) - is_true.float().cumsum(-1)
                score = (cumulative[:, :-1] ** 2 * values.diff()).sum(-1) * 10.0 ** -before[at]
                # The likelihood of any token of this length: that of the true one, without its share among them.
                any_of_them = nll[rows, columns + 1] + (log_probabilities * is_true).sum(-1)
                nll = nll.index_put((rows, columns + 1), any_of_them + NUMBER_WEIGHT * score)
        return nll

    def _digits_before(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return how many digits of the same number precede each token, (B, L), float32."""
        digits = self.digits[input_ids]
        total = digits.cumsum(1)
        in_number = (digits > 0) | self.points[input_ids]
        start = torch.where(in_number, 0, total).cummax(1).values
        return (total - digits - start).float()
