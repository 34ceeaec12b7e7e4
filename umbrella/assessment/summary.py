"""What an evaluation would ask, and what it found, on the terminal."""

from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from umbrella.assessment.assessment import AS_ASKED, CONDITIONS
from umbrella.assessment.questions import Questions
from umbrella.assessment.report import interval, named, value
from umbrella.assessment.run import Evaluated
from umbrella.assessment.section import CHIEF, NOT_KNOWN, REFERENCE, WORDS
from umbrella.base import pluralise
from umbrella.config import Settings
from umbrella.evaluation.subgroups import Group


def print_plan(settings: Settings, questions: Questions, console: Console) -> None:
    """Say what would be asked."""
    evaluate, asked = settings.evaluate, questions.asked
    subjects = len({c.subject_id for c in asked})
    ways = "likelihood of candidates" + (" and the model's own words" if evaluate.generate else "")
    lines = [
        f"would ask {settings.checkpoint}",
        f"{evaluate.split}: {pluralise(len(asked), 'conversation')} about {pluralise(subjects, 'subject')}; {ways}",
        "controls: " + (", ".join(WORDS[control] for control in evaluate.controls) or "none"),
    ]
    for target, number in sorted(Counter(c.target for c in asked).items()):
        known = questions.candidates.get(target, {})
        choices = " | ".join(f"{label}: {text}" for label, text in known.items())
        lines.append(f"  {target}: {pluralise(number, 'conversation')}" + (f", of {choices}" if choices else ""))
    for line in [*lines, *(f"note: {note}" for note in questions.notes)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_evaluation(evaluated: Evaluated, console: Console) -> None:
    """The main numbers with intervals, what is reached without looking, the controls beside, and where to read on."""
    assessment = evaluated.assessment
    conditions = [name for name in CONDITIONS if name in assessment.groups]
    table = Table(
        title=f"{assessment.split}: {len(assessment.predictions[AS_ASKED])} conversations", title_justify="left"
    )
    for column in ("target", "metric", *(WORDS[name] for name in conditions), "without looking", "invalid"):
        table.add_column(column)
    wholes = {
        name: {group.target: group for group in assessment.groups[name] if group.by == "all"} for name in conditions
    }
    for target, group in wholes[AS_ASKED].items():
        for metric in _chief(group):
            cells = []
            for name in conditions:
                estimate = wholes[name][target].metrics.get(metric, NOT_KNOWN) if target in wholes[name] else NOT_KNOWN
                between = interval(estimate)
                cells.append(value(estimate.value) + (f" ({between})" if between else ""))
            way, level, what = metric.split("/", 2)
            reference = group.references.get(REFERENCE[group.kind])
            invalid = f"{group.invalid} of {group.conversations}" if way == "generated" else ""
            table.add_row(target, f"{named(what)}, {way}, {level}", *cells, value(reference), invalid)
    console.print(table)
    console.print(f"evaluation:     {evaluated.page.as_uri()}", markup=False, highlight=False, soft_wrap=True)


def _chief(group: Group) -> Iterator[str]:
    """What a target is judged by in each way, over subjects."""
    for way in ("likelihood", "generated"):
        names = (f"{way}/{level}/{CHIEF[group.kind]}" for level in ("subjects", "votes", "conversations"))
        yield from [name for name in names if name in group.metrics][:1]
