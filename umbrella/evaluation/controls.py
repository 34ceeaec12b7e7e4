"""Controls: the same questions with other subjects' volumes, blank ones or none, and in another wording.

The score of a model that reads the images falls to chance without the volumes of the subject. A model that relies on
the text (a question that reveals the answer, a frequent class) keeps its score.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from umbrella.base import pluralise
from umbrella.conversations.schema import BLANK, CONTROL, PARAPHRASE, Conversation, TextItem

AS_ASKED, SHUFFLED, WITHOUT, TEXT_ONLY = "as_asked", "shuffled", "blank", "text_only"
SAME_LABEL, OTHER_LABEL, PARAPHRASED = "same_label", "other_label", "paraphrased"
CONDITIONS = (AS_ASKED, SHUFFLED, WITHOUT, TEXT_ONLY)
"""The conditions with metrics. Single answers are compared under the others, too; see ``image_use``."""
CONDITION_NAMES = {
    AS_ASKED: "own volumes",
    SHUFFLED: "other subjects' volumes",
    WITHOUT: "blank volumes",
    TEXT_ONLY: "text only",
    SAME_LABEL: "volumes of another subject with the same label",
    OTHER_LABEL: "volumes of a subject with another label",
    PARAPHRASED: "the question in another wording",
}
SHOWN_LABEL = "shown_label"
"""Key of metadata: the label of the subject whose volumes are shown in the place of the subject's own."""
DRAWS = 200
"""Permutations that are drawn; the best one is used."""
ROUNDS = 20
"""Attempts, in each permutation, to exchange partners that are not allowed."""


def make_controls(
    conversations: Sequence[Conversation], names: Iterable[str], seed: int
) -> tuple[dict[str, list[Conversation]], list[str]]:
    """Make the conversations of controls.

    Returns:
        Control to its conversations, in order, without those that it cannot be applied to; and notes.
    """
    made: dict[str, list[Conversation]] = {}
    notes: list[str] = []
    for name in dict.fromkeys(names):
        if name == SHUFFLED:
            made[name], notes = shuffled(conversations, seed)
        elif name in (SAME_LABEL, OTHER_LABEL):
            made[name] = exchanged(conversations, seed, other=name == OTHER_LABEL)
        else:
            made[name] = {WITHOUT: blank, TEXT_ONLY: text_only, PARAPHRASED: paraphrased}[name](conversations)
    return {name: [c.model_copy(update={CONTROL: name}) for c in of_one] for name, of_one in made.items()}, notes


def blank(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations with blank volumes, in which all voxels of all subjects have one value."""
    return [c.with_paths(lambda path: f"{BLANK}{path}") for c in conversations]


def paraphrased(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations whose last question has another wording (``PARAPHRASE``), with that wording."""
    changed = []
    for c in conversations:
        turns, i = list(c.conversations), c.last_answer - 1
        wordings = [(item, (item.model_extra or {}).get(PARAPHRASE)) for item in turns[i].content]
        if any(text for _, text in wordings):
            content = tuple(item.model_copy(update={"text": text}) if text else item for item, text in wordings)
            turns[i] = turns[i].model_copy(update={"content": content})
            changed.append(c.model_copy(update={"conversations": tuple(turns)}))
    return changed


def exchanged(conversations: Sequence[Conversation], seed: int, other: bool) -> list[Conversation]:
    """The conversations with the subject's own volumes replaced by those of another subject; references stay.

    The other subject is drawn among those with the same label; for numbers, it is the one with the nearest label. Its
    label is added to the metadata, see ``SHOWN_LABEL``.

    Args:
        other: the label is another one; numbers differ by at least the standard deviation of the labels.

    Returns:
        The conversations, in order, without those for which there is no such subject with the same modalities, and
        without those with candidates of their own, whose labels do not mean the same in all questions.
    """
    of_target: dict[tuple[str, bool], list[Conversation]] = defaultdict(list)
    for c in conversations:
        if c.label is not None and c.volumes and not c.candidates:
            of_target[c.target, isinstance(c.label, str)].append(c)
    rng, made = np.random.default_rng(seed), {}
    for (_, classes), members in of_target.items():
        labels: Any = np.array([c.label for c in members])
        owned = [c.subject_volumes for c in members]
        files = [{v.modality: [w.image_path for w in own if w.modality == v.modality] for v in own} for own in owned]
        for i, c in enumerate(members):
            order = rng.permutation(len(members))
            distance = (labels[order] != labels[i]).astype(float) if classes else abs(labels[order] - labels[i])
            if other:
                order = order[(distance > 0) & (distance >= (0 if classes else labels.std()))]
            else:
                order = order[distance == 0] if classes else order[np.argsort(distance, kind="stable")]
            for j in order:
                if members[j].subject_id not in c.subjects and files[i].keys() <= files[j].keys():
                    theirs, paths = files[j], {v.image_path: v.image_path for v in c.volumes}
                    for name, own in files[i].items():
                        paths |= {file: theirs[name][n % len(theirs[name])] for n, file in enumerate(own)}
                    changes = {"metadata": c.metadata | {SHOWN_LABEL: labels[j].item()}}
                    made[c.task_id] = c.with_paths(paths.__getitem__).model_copy(update=changes)
                    break
    return [made[c.task_id] for c in conversations if c.task_id in made]


def text_only(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations without volumes; a turn without text gets an empty one."""
    empty = (TextItem(type="text", text=""),)
    without = []
    for c in conversations:
        texts = [tuple(item for item in turn.content if isinstance(item, TextItem)) for turn in c.conversations]
        turns = zip(c.conversations, texts, strict=True)
        changed = tuple(turn.model_copy(update={"content": content or empty}) for turn, content in turns)
        without.append(c.model_copy(update={"conversations": changed}))
    return without


def shuffled(conversations: Sequence[Conversation], seed: int) -> tuple[list[Conversation], list[str]]:
    """The conversations with the volumes of every subject replaced by those of another subject of the same modality.

    For each modality, its subjects are permuted without fixed points. References are replaced, too, by a third subject
    if there are enough. A file is replaced by the same other file in all conversations. Conversations without volumes
    do not change.

    Without fixed points, partners of another class are more frequent than by chance: with two subjects in each of two
    classes, one partner has the same class and two have the other one, so that a perfect reader of images would have
    an accuracy of a third instead of a half. Of ``DRAWS`` permutations, that one is used in which the labels of the
    partners, as predictions of the subjects' labels, have the balanced accuracy nearest to chance and, for numbers,
    the correlation nearest to 0.

    Returns:
        The conversations, in order, without those that show a modality that only one subject of the split has; and
        notes on what was left out, or could not be avoided.
    """
    files = volume_owners(conversations)
    labels = _labels(conversations)
    together: dict[str, set[str]] = defaultdict(set)  # subject to all subjects that are shown with it, and itself
    for c in conversations:
        for subject in c.subjects:
            together[subject] |= c.subjects
    exchanged: dict[str, str] = {}
    notes = []
    for modality, of_subject in files.items():
        subjects = sorted(of_subject)
        if len(subjects) == 1:
            number = sum(any(v.modality == modality for v in c.volumes) for c in conversations)
            left_out = pluralise(number, "conversation") + (" is" if number == 1 else " are")
            notes.append(f"shuffled: {left_out} left out, as one subject only has {modality}")
            continue
        rng = np.random.default_rng([seed, *modality.encode()])
        partners, clashes = _partners(subjects, together, labels, rng)
        if clashes:
            what = f"{clashes} subjects are shown in the place of one whom they are compared with"
            notes.append(f"shuffled: {what}, as there are too few subjects with {modality}")
        for subject, partner in zip(subjects, partners, strict=True):
            their_files = of_subject[subjects[partner]]
            exchanged |= {file: their_files[i % len(their_files)] for i, file in enumerate(of_subject[subject])}
    kept = [c for c in conversations if all(v.image_path in exchanged for v in c.volumes)]
    return [c.with_paths(exchanged.__getitem__) if c.volumes else c for c in kept], notes


def volume_owners(conversations: Iterable[Conversation]) -> dict[str, dict[str, list[str]]]:
    """Modality to subject to the files of their volumes, in the order of their first occurrence.

    Conversations about one subject determine the owner of a volume. In conversations about several, volumes without an
    owner belong to the subject if they are in the last turn with volumes, and otherwise to the reference.
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
        *earlier, last = c.volumes_by_turn or [[]]
        for owner, volumes in ((reference, chain(*earlier)), (c.subject_id, last)):
            for volume in volumes:
                known.setdefault(volume.image_path, owner)
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, modality in modality_of.items():
        found[modality][known[file]].append(file)
    return found


def _labels(conversations: Iterable[Conversation]) -> dict[str, dict[str, str | float]]:
    """Target to subject to label, of the subjects of questions and of references with a label."""
    labels: dict[str, dict[str, str | float]] = defaultdict(dict)
    for c in conversations:
        if c.label is not None:
            labels[c.target].setdefault(c.subject_id, c.label)
            reference, label = c.reference_id, c.metadata.get("reference_label")
            if reference is not None and isinstance(label, type(c.label)):
                labels[c.target].setdefault(reference, label)
    return labels


def _partners(
    subjects: Sequence[str],
    together: Mapping[str, set[str]],
    labels: Mapping[str, Mapping[str, str | float]],
    rng: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """The index of the partner of each subject, (n,), and the number of partners that are shown with their subject."""
    index = {subject: i for i, subject in enumerate(subjects)}
    forbidden = [{index[other] for other in together[s] if other in index} | {index[s]} for s in subjects]
    values = [[of.get(subject) for subject in subjects] for of in labels.values()]
    drawn = []
    for number in range(DRAWS):
        partners = rng.permutation(len(subjects))
        # Half of the draws allow clashes: the few subjects without a common conversation may all be of another class.
        avoided = forbidden if number % 2 else [{i} for i in range(len(subjects))]
        for _ in range(ROUNDS):
            clashing = [i for i, partner in enumerate(partners) if partner in avoided[i]]
            if not clashing:
                break
            for i in clashing:
                j = int(rng.integers(len(subjects)))
                partners[i], partners[j] = partners[j], partners[i]
        own = sum(i == partner for i, partner in enumerate(partners))
        clashes = sum(partner in forbidden[i] for i, partner in enumerate(partners))
        distance = sum(_distance_from_chance(of, partners) for of in values)
        drawn.append(((own, round(distance, 1), clashes, distance), partners))
    (_, _, clashes, _), partners = min(drawn, key=lambda draw: draw[0])
    return partners, clashes


def _distance_from_chance(labels: Sequence[str | float | None], partners: np.ndarray) -> float:
    """The distance from chance of the partners' labels as predictions of the subjects' labels."""
    predicted = [labels[partner] for partner in partners]
    classes = sorted({label for label in labels if isinstance(label, str)})
    if classes:
        recalls = [
            np.mean([other == label for label, other in zip(labels, predicted, strict=True) if label == name])
            for name in classes
        ]
        return float(abs(np.mean(recalls) - 1 / len(classes)))
    pairs = [(a, b) for a, b in zip(labels, predicted, strict=True) if a is not None and b is not None]
    if len(pairs) < 3 or any(len(set(column)) == 1 for column in zip(*pairs, strict=True)):
        return 0.0
    return float(abs(np.corrcoef(np.array(pairs, dtype=float).T)[0, 1]))
