"""How near a free text is to the true one."""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_scores(truth: str, text: str) -> dict[str, float]:
    """Scores of one text, each from 0 to 1.

    ``exact`` and ``token_f1`` as in SQuAD (Rajpurkar et al. 2016): case, punctuation and English articles do not
    count; token_f1 is the F1 of the words in common. ``rouge_l`` (Lin 2004): the F1 of the longest common subsequence
    of lower-case words, articles included. Two texts without words are the same.
    """
    a, b = _normalised(truth), _normalised(text)
    all_a, all_b = _words(truth), _words(text)
    return {
        "token_f1": _f1((Counter(a) & Counter(b)).total(), a, b),
        "rouge_l": _f1(_common_subsequence(all_a, all_b), all_a, all_b),
        "exact": float(a == b),
    }


def _normalised(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(common: int, a: Sequence[str], b: Sequence[str]) -> float:
    return 2 * common / (len(a) + len(b)) if a or b else 1.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    before = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        before = row
    return before[-1]
