"""The subject of each sample, and subjects and volumes that several splits share (leakage)."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

from umbrella.base import ProgressBar, UserError, pluralise
from umbrella.conversations.reading import Problem
from umbrella.conversations.schema import FAMILY, Conversation, bids_subject
from umbrella.volumes.reading import image_files, image_size
from umbrella.volumes.store_files import content_hash


def assign_subjects(splits: dict[str, list[Conversation]], progress: ProgressBar) -> list[str]:
    """Set ``metadata.subject_id`` of each sample that does not state it, in place. Return notices with the counts.

    The subject is the BIDS entity ``sub-...`` in the path of the last volume, or else a hash of the content of this
    volume. Other subjects in the paths become ``subject_ids`` if the sample states only one subject.
    """
    unnamed = [c for conversations in splits.values() for c in conversations if not c.stated_subject]
    anonymous = sorted({v.image_path for c in unnamed for v in c.volumes if not bids_subject(v.image_path)})
    contents = {}
    for path in progress(anonymous, "reading volumes without a subject") if anonymous else ():
        with suppress(UserError):  # a file that cannot be read is reported elsewhere
            contents[path] = f"volume-{content_hash(path)[:16]}"
    sources: Counter[str] = Counter()

    def with_subject(c: Conversation) -> Conversation:
        if not c.volumes:
            return c
        stated, last = c.stated_subject, c.volumes_by_turn[-1]
        paths = [v.image_path for v in c.volumes]
        names = {path: bids_subject(path) or (None if stated else contents.get(path)) for path in paths}
        own = stated if stated in names.values() else names[last[-1].image_path]
        # Volumes of one turn whose paths contain no subject are assumed to belong to one subject.
        others = {names[v.image_path] for v in c.volumes if bids_subject(v.image_path) or v not in last}
        others -= {own, stated, None}
        changes: dict[str, Any] = {}
        if not stated:
            sources["path" if bids_subject(last[-1].image_path) else "content"] += 1
            changes["metadata"] = {**c.metadata, "subject_id": own or c.task_id}
        if others and len(c.subjects) == 1:
            changes["subject_ids"] = sorted({stated or own or c.task_id, *others})
        return c.model_copy(update=changes) if changes else c

    splits |= {name: [with_subject(c) for c in conversations] for name, conversations in splits.items()}
    descriptions = {
        "path": "sub-... in the path of the volume names it",
        "content": "the content of the volume names it, so another scan of the same subject is not recognised",
    }
    notices = [
        f"{pluralise(number, 'sample')} without a subject: {descriptions[source]}; metadata.subject_id states it"
        for source, number in sorted(sources.items())
    ]
    spellings: dict[str, set[str]] = defaultdict(set)
    for subject in {subject for cs in splits.values() for c in cs for subject in c.subjects}:
        spellings[subject.casefold()].add(subject)
    variants = sorted(sorted(alike) for alike in spellings.values() if len(alike) > 1)
    if variants:
        more = f" (and {pluralise(len(variants) - 1, 'more name')})" if len(variants) > 1 else ""
        notices.append(f"subjects {' and '.join(variants[0])}{more} differ by case only and are kept apart")
    return notices


def find_shared(
    splits: Mapping[str, list[Conversation]], places: Mapping[tuple[str, str], str], group: str = ""
) -> tuple[list[tuple[str, Problem]], list[str]]:
    """Find subjects, groups of subjects and volume contents that one split asks about and another split contains.

    Args:
        places: (split, task_id) to "file:line".
        group: see ``data.group``.

    Returns:
        (later split, problem), at most one for each pair of splits and kind; and a notice with the number of volumes
        that splits may share, because each of them uses these volumes as references only.
    """
    contents, group = _shared_contents(splits), group or FAMILY
    asks: dict[str, Callable[[Conversation], Iterable[str | None]]] = {
        "subject_id": lambda c: [c.subject_id],
        group: lambda c: [c.group(group)],
        "image_path": lambda c: [contents.get(v.image_path) for v in c.subject_volumes],
    }
    shows = asks | {
        "subject_id": lambda c: c.subjects,
        "image_path": lambda c: [contents.get(v.image_path) for v in c.volumes],
    }
    nouns = {"subject_id": "more subject", group: "more group", "image_path": "more volume"}
    problems = []
    leaked: set[str] = set()
    for one, two in combinations(splits, 2):
        reported: set[str] = set()
        for key, noun in nouns.items():
            found: dict[str, tuple[str, Conversation, str, Conversation]] = {}
            for asking, other in ((one, two), (two, one)):
                asked, shown = (_first(splits[n], of[key]) for n, of in ((asking, asks), (other, shows)))
                found |= {thing: (asking, asked[thing], other, shown[thing]) for thing in asked.keys() & shown.keys()}
            leaked |= found.keys()
            # What belongs to a subject that is reported already is not reported again.
            found = {thing: where for thing, where in found.items() if where[1].subject_id not in reported}
            reported |= found.keys()
            if found:
                thing = min(found)
                asking, c, other, theirs = found[thing]
                what = (
                    f"{thing} is also in data.{other}, at {places[other, theirs.task_id]}"
                    + (f" (and {pluralise(len(found) - 1, noun)})" if len(found) > 1 else "")
                    + f"; split by {group if key == group else 'subject'}, or the score means nothing"
                )
                problems.append((two, Problem(places[asking, c.task_id], key, what)))
    references = len(set(contents.values()) - leaked)
    note = f"{pluralise(references, 'volume')} in several splits, in each as a reference only, which is allowed"
    return problems, [note] if references else []


def _first(conversations: Iterable[Conversation], of: Callable[[Conversation], Iterable[str | None]]) -> dict:
    """Each thing that conversations ask about or show, with the first of them."""
    return {thing: c for c in reversed(list(conversations)) for thing in of(c) if thing is not None}


def _shared_contents(splits: Mapping[str, Sequence[Conversation]]) -> dict[str, str]:
    """Path of each volume whose content is in several splits, to one path for each content."""
    users: dict[str, set[str]] = defaultdict(set)
    for name, path in ((name, v.image_path) for name, cs in splits.items() for c in cs for v in c.volumes):
        users[path].add(name)
    groups = [list(users)]
    # Whole files are read only if size and middle agree; uncompressed volumes often have the same size.
    for key in (image_size, _middle, content_hash):
        finer = []
        for group in groups:
            alike: dict[Hashable, list[str]] = defaultdict(list)
            for path in group:
                with suppress(OSError, UserError):  # a file that cannot be read is reported elsewhere
                    alike[key(path)].append(path)
            finer += [paths for paths in alike.values() if len(set().union(*(users[p] for p in paths))) > 1]
        groups = finer
    return {path: paths[0] for paths in groups for path in paths}


def _middle(path: str) -> bytes:
    file = image_files(path)[-1]
    with file.open("rb") as stream:
        stream.seek(file.stat().st_size // 2)
        return stream.read(2**12)
