"""Conversations about subjects: one scan (T1), several scans of a subject (T2), comparisons (T3)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml
from pydantic import Field, ValidationError

from umbrella.base import ProgressBar, Section, UserError
from umbrella.cohorts.assign_splits import hash_fraction
from umbrella.cohorts.bids import SERIES, Scan
from umbrella.cohorts.reading import Cohort, Request, Subject
from umbrella.config import Loader
from umbrella.conversations.schema import PARAPHRASE

SAME_SUBJECT = {"comparison_type": "same_subject"}
MAX_SCANS, MAX_SERIES = 4, 2
"""Largest number of sessions in one conversation, of 3D and of 4D images."""
Wordings = tuple[str, ...]


class Template(Section):
    """Texts of one target."""

    questions: Wordings = Field(min_length=1)
    answer: str
    description: str
    """How the text before a reference scan names its subject."""


class Templates(Section):
    """Texts of all conversations, as in ``templates.yaml``."""

    targets: dict[str, Template]
    default: Template
    reference: Wordings = Field(min_length=1)
    same_subject: Wordings = Field(min_length=1)
    acknowledgement: Wordings = Field(min_length=1)
    comparison: Wordings = Field(min_length=1)
    modalities: Wordings = Field(min_length=1)
    sessions: Wordings = Field(min_length=1)

    def of(self, target: str) -> Template:
        """Return the template of a target."""
        return self.targets.get(target, self.default)


def load_templates(file: Path | None, examples: Mapping[str, Any]) -> Templates:
    """Read the built-in templates, and those of a file, which win.

    Args:
        examples: target to one of its values, with which its formats are tried.

    Raises:
        UserError: the file is not as the built-in one, or a text cannot be formatted.
    """
    raw = yaml.load((Path(__file__).parent / "templates.yaml").read_text(encoding="utf-8"), Loader)
    try:
        own = yaml.load(file.read_text(encoding="utf-8"), Loader) if file else {}
        templates = Templates.model_validate({**raw, **own, "targets": raw["targets"] | own.get("targets", {})})
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        issues = [f"{file}: {'.'.join(map(str, i['loc']))}: {i['msg']}" for i in error.errors()]
        raise UserError("\n".join(issues)) from None
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(
            f"{file}: not a mapping as in the built-in templates.yaml: {' '.join(str(error).split())}"
        ) from None
    for target, value in examples.items():
        for text in (templates.of(target).answer, templates.of(target).description, *templates.of(target).questions):
            try:
                text.format(value=value, target=target)
            except (ValueError, KeyError, IndexError, AttributeError) as error:
                raise UserError(
                    f"templates of {target}: {text!r} cannot be formatted with the value {value!r}: {error!r}; there"
                    " are the names {value} and {target}"
                ) from None
    return templates


class Asked(NamedTuple):
    """A question, and the same in another wording; both are equal if its template has one."""

    text: str
    paraphrase: str


Item = str | Asked | Scan
Reference = tuple[Subject, Scan]
Pool = dict[Any, list[Reference]]
"""Class or bin to one scan of each subject."""
Pools = dict[tuple[str, str], Pool]
"""(target, suffix) to references."""


class Questions:
    """Makes the conversations of splits."""

    def __init__(self, request: Request, templates: Templates, cohort: Cohort) -> None:
        self.request, self.templates, self.cohort = request, templates, cohort
        self.compared = request.compare or request.targets
        self.left_out: Counter[str] = Counter()
        """Reason to number of comparisons."""

    def of_split(
        self,
        subjects: Sequence[Subject],
        anchors: Sequence[Subject] = (),
        progress: ProgressBar = lambda items, description: items,
        description: str = "",
    ) -> Iterator[dict[str, Any]]:
        """Yield the conversations about the subjects of one split, in the v2 format.

        Args:
            subjects: the members of the split. References are drawn among them.
            anchors: subjects with which every subject is compared instead, and that are not asked about.
            progress: wraps the iteration over subjects; it gets the description.
        """
        tasks, share = self.request.tasks, self.request.reference_pool
        pool = [subject for subject in subjects if "T3" in tasks and (share == 0 or self._is_reference(subject))]
        pools: Pools = defaultdict(lambda: defaultdict(list))
        for subject in anchors or pool:
            for target, scan in self._queries(subject, Random(f"{self.request.seed}|reference|{subject.id}")):
                pools[target, scan.suffix][self._label(subject, scan, target)].append((subject, scan))
        ranks: Counter[tuple[str, str, Any]] = Counter()
        for subject in progress(subjects, description):
            rng = Random(f"{self.request.seed}|{subject.id}")
            if "T1" in tasks:
                for scan in subject.scans:
                    yield from self._ask("T1", scan.name, subject, [scan], rng)
            if "T2" in tasks:
                yield from self._several_scans(subject, rng)
            if "T3" not in tasks:
                continue
            yield from self._compare_with_itself(subject, rng)
            if anchors or share == 0 or not self._is_reference(subject):
                for target, scan in self._queries(subject, rng):
                    found = pools[target, scan.suffix]
                    references: Iterable[Reference]
                    if anchors:
                        references = [one for of_label in found.values() for one in of_label]
                    else:
                        references = self._draw(subject, scan, target, found, ranks, rng)
                    for reference in references:
                        yield self._with_reference(subject, scan, target, reference, rng)

    def _is_reference(self, subject: Subject) -> bool:
        return hash_fraction(self.request.seed, "pool", subject.group) < self.request.reference_pool

    def _label(self, subject: Subject, scan: Scan, target: str) -> Any:
        """Return the class, or the bin of the number, of a scan."""
        return self.cohort.stratum(target, subject.values[scan.session][target])

    def _queries(self, subject: Subject, rng: Random) -> Iterator[tuple[str, Scan]]:
        """Yield one scan of each suffix for each target of comparisons, of the sessions that have a value."""
        for target in self.compared:
            found: dict[str, list[Scan]] = {}
            for scan in subject.scans:
                if target in subject.values[scan.session]:
                    found.setdefault(scan.suffix, []).append(scan)
            for scans in found.values():
                yield target, rng.choice(scans)

    def _draw(
        self, subject: Subject, scan: Scan, target: str, pool: Pool, ranks: Counter[tuple[str, str, Any]], rng: Random
    ) -> Iterator[Reference]:
        """Draw references of the same and of other labels in turn, so that each label has as many of each kind.

        A label that lacks one kind in the split has no comparisons.
        """
        label = self._label(subject, scan, target)
        others = sorted(other for other in pool if other != label)
        alike = pool.get(label, [])
        if not others or all(reference.id == subject.id for reference, _ in alike):
            self.left_out[f"comparisons of {target}: the split has no reference of the same, or none of another"] += 1
            return
        used = {subject.id}
        for _ in range(self.request.references):
            rank = ranks[target, scan.suffix, label]
            ranks[target, scan.suffix, label] += 1
            wanted = alike if rank % 2 == 0 else pool[others[rank // 2 % len(others)]]
            found = rng.choice(wanted)
            if found[0].id in used:
                unused = [one for one in wanted if one[0].id not in used]
                if not unused:
                    self.left_out[f"comparisons of {target}: fewer subjects in the split than --references"] += 1
                    continue
                found = rng.choice(unused)
            used.add(found[0].id)
            yield found

    def _several_scans(self, subject: Subject, rng: Random) -> Iterator[dict[str, Any]]:
        by_session: dict[str, dict[str, Scan]] = {}
        by_suffix: dict[str, dict[str, Scan]] = {}
        for scan in subject.scans:
            by_session.setdefault(scan.session, {}).setdefault(scan.suffix, scan)
            by_suffix.setdefault(scan.suffix, {}).setdefault(scan.session, scan)
        for session, scans in by_session.items():
            if len(scans) > 1:
                first, *others = scans.values()
                opening: list[Item] = [first, rng.choice(self.templates.modalities), *others]
                name = f"{subject.id}{f'_ses-{session}' * bool(session)}_modalities"
                yield from self._ask("T2", name, subject, opening, rng)
        for suffix, scans in by_suffix.items():
            if len(scans) > 1:
                shown = list(scans.values())[-(MAX_SERIES if suffix in SERIES else MAX_SCANS) :]
                name = f"{subject.id}_sessions_{suffix}"
                yield from self._ask("T2", name, subject, [rng.choice(self.templates.sessions), *shown], rng)

    def _compare_with_itself(self, subject: Subject, rng: Random) -> Iterator[dict[str, Any]]:
        """Compare the last session with the first, or else two modalities."""
        one, two = subject.scans[0], subject.scans[-1]
        same = [scan for scan in subject.scans if scan.suffix == one.suffix and scan.session != one.session]
        two = same[-1] if same else two
        if (one.session, one.suffix) == (two.session, two.suffix):
            return
        for target in self.compared:
            if target in subject.values[two.session]:
                opening: list[Item] = [rng.choice(self.templates.same_subject), one]
                yield self._comparison(f"{two.name}_vs_{one.name}", subject, two, target, opening, rng)

    def _with_reference(
        self, subject: Subject, scan: Scan, target: str, found: Reference, rng: Random
    ) -> dict[str, Any]:
        reference, shown = found
        value = reference.values[shown.session][target]
        same = self._label(reference, shown, target) == self._label(subject, scan, target)
        description = self.templates.of(target).description.format(value=value, target=target)
        opening: list[Item] = [rng.choice(self.templates.reference).format(description=description), shown]
        extra = {
            "reference_id": reference.id,
            "reference_label": value,
            "comparison_type": "same" if same else "different",
        }
        return self._comparison(f"{scan.name}_vs_{shown.name}", subject, scan, target, opening, rng, extra)

    def _comparison(
        self,
        name: str,
        subject: Subject,
        scan: Scan,
        target: str,
        opening: Sequence[Item],
        rng: Random,
        extra: dict[str, Any] = SAME_SUBJECT,
    ) -> dict[str, Any]:
        question, acknowledgement = self._question(target, rng), rng.choice(self.templates.acknowledgement)
        comparison = rng.choice(self.templates.comparison)
        turns: list[Sequence[Item]] = [
            opening,
            [acknowledgement],
            [Asked(*(comparison.format(question=wording) for wording in question)), scan],
            [self._answer(subject, scan, target)],
        ]
        return self._sample("T3", f"{name}_{target}", subject, scan, [(3, target)], turns, extra)

    def _question(self, target: str, rng: Random) -> Asked:
        questions = self.templates.of(target).questions
        drawn = rng.randrange(len(questions))
        both = questions[drawn], questions[(drawn + 1) % len(questions)]
        return Asked(*(wording.format(target=target.replace("_", " "), value="") for wording in both))

    def _answer(self, subject: Subject, scan: Scan, target: str) -> str:
        value = subject.values[scan.session][target]
        return self.templates.of(target).answer.format(value=value, target=target)

    def _ask(
        self, task_type: str, name: str, subject: Subject, opening: Sequence[Item], rng: Random
    ) -> Iterator[dict[str, Any]]:
        """Ask about the last scan of the opening, which is one user turn: each target for itself, or all in turn."""
        scan = next(item for item in reversed(opening) if isinstance(item, Scan))
        targets = [target for target in self.request.targets if target in subject.values[scan.session]]
        rounds = [targets] if self.request.together and targets else [[target] for target in targets]
        for asked in rounds:
            turns: list[Sequence[Item]] = []
            for target in asked:
                shown = [] if turns else opening
                turns += [[*shown, self._question(target, rng)], [self._answer(subject, scan, target)]]
            labels = [(2 * i + 1, target) for i, target in enumerate(asked)]
            yield self._sample(task_type, f"{name}_{'_'.join(asked)}", subject, scan, labels, turns, {})

    def _sample(
        self,
        task_type: str,
        task_id: str,
        subject: Subject,
        scan: Scan,
        labels: Sequence[tuple[int, str]],
        turns: Sequence[Sequence[Item]],
        extra: dict[str, Any],
    ) -> dict[str, Any]:
        """Make a sample in the v2 format. ``labels``: (index of an answer, its target)."""
        values, target = subject.values[scan.session], labels[-1][1]
        entities = {"session": scan.session, "run": scan.run, "brain_mask": scan.mask}
        metadata = {"subject_id": subject.id, "subject_label": values[target], "target": target}
        metadata |= {key: value for key, value in entities.items() if value}
        metadata |= {key: value for key, value in values.items() if key not in metadata} | extra
        if len(labels) > 1:
            metadata["labels"] = [{"turn": turn, "target": name, "label": values[name]} for turn, name in labels]
        scans = [item for turn in turns for item in turn if isinstance(item, Scan)]
        return {
            "task_id": task_id,
            "task_type": task_type,
            "subject_ids": list(dict.fromkeys([*(item.subject for item in scans), subject.id])),
            "modalities": [item.modality for item in scans],
            "images": [{"path": item.path, "token": "<image>", "modality": item.modality} for item in scans],
            "conversations": [
                {"role": "assistant" if i % 2 else "user", "content": [_item(item) for item in turn]}
                for i, turn in enumerate(turns)
            ],
            "metadata": metadata,
        }


def _item(item: Item) -> dict[str, str]:
    if isinstance(item, Scan):
        return {"type": "image", "modality": item.modality, "image_path": item.path}
    text, paraphrase = item if isinstance(item, Asked) else (item, item)
    return {"type": "text", "text": text} | ({PARAPHRASE: paraphrase} if paraphrase != text else {})
