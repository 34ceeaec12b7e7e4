"""How conversations are dealt into batches."""

from collections.abc import Callable

from umbrella.conversations.schema import Conversation
from umbrella.evaluation_run.prediction_workers import WINDOW, make_batches
from umbrella.modality import Modality


def test_batches_hold_what_is_of_similar_length_and_everything_once(
    talk: Callable[..., Conversation], modalities: dict[str, Modality]
) -> None:
    sizes = [(7 * i) % 31 for i in range(100)]
    batches = make_batches([talk(("user", "x" * n), ("assistant", "y")) for n in sizes], modalities, 4)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert [len(batch) for batch in batches] == [4] * 25
    for start in range(0, len(batches), WINDOW):
        window = batches[start : start + WINDOW]
        assert {i for batch in window for i in batch} == set(range(4 * start, 4 * start + 4 * len(window)))
        lengths = [sizes[i] for batch in window for i in batch]
        assert lengths == sorted(lengths)


def test_volumes_count_with_their_tokens(talk: Callable[..., Conversation], modalities: dict[str, Modality]) -> None:
    shown = talk(("user", [("fMRI", "/f.nii")]), ("assistant", "y"))  # 3 tokens
    short, long = (talk(("user", "x" * n), ("assistant", "y")) for n in (2, 4))
    assert make_batches([long, shown, short], modalities, 3) == [[2, 1, 0]]
