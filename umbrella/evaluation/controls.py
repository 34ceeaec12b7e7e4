"""The same questions with other subjects' volumes, and without volumes: what a score owes to the images.

A model that reads the images falls to chance where they are another subject's. One that has learnt from the words (a
question that gives the answer away, a class that is more frequent) keeps its score in both controls.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from umbrella.base import pluralise
from umbrella.conversations.schema import Conversation

DRAWS = 200
"""Ways of exchanging that are drawn, of which the most even one is taken."""
ROUNDS = 20
"""Times that everybody who was given a forbidden partner exchanges it, in each of them."""


def text_only(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations without volumes; a turn in which there was nothing else keeps an empty text."""
    blank = [{"type": "text", "text": ""}]
    silent = []
    for conversation in conversations:
        raw = conversation.model_dump(mode="json")
        for turn in raw["conversations"]:
            turn["content"] = [item for item in turn["content"] if item["type"] != "image"] or blank
        silent.append(Conversation.model_validate(raw | {"images": []}))
    return silent


def shuffled(conversations: Sequence[Conversation], seed: int) -> tuple[list[Conversation], list[str]]:
    """The conversations with every subject's volumes exchanged for another one's of the same modality.

    For each modality the subjects who have it are permuted so that nobody keeps their own: a reference becomes another
    subject, too, and that is a third one as far as there are enough. A file is exchanged for the same other file
    everywhere. A conversation without volumes stays as it is.

    Where nobody may keep their own, partners of another class are more frequent than chance: two of each of two classes
    leave one partner of the own class and two of the other, so that a perfect reader of images would have a third right
    and not half. Of ``DRAWS`` permutations the one is taken in which the partners' labels have a balanced accuracy
    nearest to chance for the subjects' own, and a correlation nearest to 0 where labels are numbers.

    Returns:
        The conversations, in their order, without those that show a modality of which the split has one subject only;
        and a line on what was left out, or could not be kept.
    """
    files = owners(conversations)
    labels = _labels(conversations)
    together = _shown_together(conversations)
    exchanged: dict[str, str] = {}
    notes = []
    for modality, of_subject in files.items():
        subjects = sorted(of_subject)
        if len(subjects) == 1:
            number = sum(any(v.modality == modality for v in c.volumes) for c in conversations)
            left_out = pluralise(number, "conversation") + (" is" if number == 1 else " are")
            notes.append(f"shuffled: {left_out} left out, as one subject only has {modality}")
            continue
        draw = np.random.default_rng([seed, *modality.encode()])
        partners, clashes = _partners(subjects, together, labels, draw)
        if clashes:
            what = f"{clashes} subjects are shown in the place of one whom they are compared with"
            notes.append(f"shuffled: {what}, as there are too few subjects with {modality}")
        for subject, partner in zip(subjects, partners, strict=True):
            theirs = of_subject[subjects[partner]]
            exchanged |= {file: theirs[i % len(theirs)] for i, file in enumerate(of_subject[subject])}
    kept = [c for c in conversations if all(v.image_path in exchanged for v in c.volumes)]
    return [c.with_paths(exchanged.__getitem__) if c.volumes else c for c in kept], notes


def owners(conversations: Iterable[Conversation]) -> dict[str, dict[str, list[str]]]:
    """Modality to subject to the files of their volumes, in the order in which they are first shown.

    Whose a volume is, conversations about one subject say. In one with several, volumes that are nobody's yet are the
    subject's where they stand in the last turn that shows any, and the reference's before.
    """
    known: dict[str, str] = {}
    modality_of: dict[str, str] = {}
    several = []
    for c in conversations:
        modality_of |= {v.image_path: v.modality for v in c.volumes}
        if len(c.subjects) == 1:
            for volume in c.volumes:
                known.setdefault(volume.image_path, c.subject_id)
        else:
            several.append(c)
    for c in several:
        reference = c.reference_id or min(c.subjects - {c.subject_id})
        turns = [[v for v in c.volumes if v in turn.content] for turn in c.conversations]
        shown = [volumes for volumes in turns if volumes]
        for place, volumes in enumerate(shown):
            for volume in volumes:
                known.setdefault(volume.image_path, c.subject_id if place == len(shown) - 1 else reference)
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, modality in modality_of.items():
        found[modality][known[file]].append(file)
    return found


def _labels(conversations: Iterable[Conversation]) -> dict[str, dict[str, str | float]]:
    """Target to subject to label, of subjects who are asked about, and of references as far as they are labelled."""
    labels: dict[str, dict[str, str | float]] = defaultdict(dict)
    for c in conversations:
        if c.label is not None:
            labels[c.target].setdefault(c.subject_id, c.label)
            reference, theirs = c.reference_id, c.metadata.get("reference_label")
            if reference is not None and isinstance(theirs, type(c.label)):
                labels[c.target].setdefault(reference, theirs)
    return labels


def _shown_together(conversations: Iterable[Conversation]) -> dict[str, set[str]]:
    """Subject to everybody who is shown with them, themselves included."""
    together: dict[str, set[str]] = defaultdict(set)
    for c in conversations:
        for subject in c.subjects:
            together[subject] |= c.subjects
    return together


def _partners(
    subjects: Sequence[str],
    together: Mapping[str, set[str]],
    labels: Mapping[str, Mapping[str, str | float]],
    draw: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """For each subject the index of another one, (n,); and how many of them are shown with the one they are given."""
    place = {subject: i for i, subject in enumerate(subjects)}
    forbidden = [{place[other] for other in together[s] if other in place} | {place[s]} for s in subjects]
    values = [[of.get(subject) for subject in subjects] for of in labels.values()]
    best: tuple[tuple[int, float, int, float], np.ndarray] | None = None
    for number in range(DRAWS):
        partners = draw.permutation(len(subjects))
        # Half of the draws may clash: where few are left that one is not compared with, all may be of the other class.
        avoided = forbidden if number % 2 else [{i} for i in range(len(subjects))]
        for _ in range(ROUNDS):
            clashing = [i for i, partner in enumerate(partners) if partner in avoided[i]]
            if not clashing:
                break
            for i in clashing:
                j = int(draw.integers(len(subjects)))
                partners[i], partners[j] = partners[j], partners[i]
        own = sum(i == partner for i, partner in enumerate(partners))
        clashes = sum(partner in forbidden[i] for i, partner in enumerate(partners))
        uneven = sum(_unevenness(of, partners) for of in values)
        rank = (own, round(uneven, 1), clashes, uneven)
        if best is None or rank < best[0]:
            best = rank, partners
    assert best is not None
    return best[1], best[0][2]


def _unevenness(labels: Sequence[str | float | None], partners: np.ndarray) -> float:
    """How far partners' labels, taken for the subjects' own, are from chance: 0 where nothing is to be learnt."""
    theirs = [labels[partner] for partner in partners]
    classes = sorted({label for label in labels if isinstance(label, str)})
    if classes:
        recalls = [
            np.mean([other == label for label, other in zip(labels, theirs, strict=True) if label == name])
            for name in classes
        ]
        return float(abs(np.mean(recalls) - 1 / len(classes)))
    pairs = [(a, b) for a, b in zip(labels, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return 0.0
    return float(abs(np.corrcoef(np.array(pairs, dtype=float).T)[0, 1]))
