"""What a report says of one target."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from umbrella.assessment.assessment import AS_ASKED, CONDITIONS, Assessment
from umbrella.assessment.cases import Case
from umbrella.evaluation.subgroups import Estimate, Group

WORDS = {AS_ASKED: "as asked", "shuffled": "other subjects' volumes", "text_only": "text only"}
"""Condition to how the page calls it."""
CHIEF = {"classes": "balanced_accuracy", "numbers": "mae", "texts": "token_f1"}
"""What a target is judged by: over subjects, by likelihood where there is one."""
REFERENCE = {"classes": "chance", "numbers": "mean/mae", "texts": ""}
"""What that is compared with: one of a group's references."""
BESIDE = {
    "classes": [
        "likelihood/subjects/balanced_accuracy",
        "generated/subjects/balanced_accuracy",
        "generated/votes/balanced_accuracy",
        "likelihood/subjects/auc",
    ],
    "numbers": ["generated/subjects/rmse", "generated/subjects/pearson", "generated/conversations/mae"],
    "texts": ["generated/conversations/rouge_l", "generated/conversations/exact"],
}
"""Metrics of breakdowns beside the chief one."""
NOT_KNOWN = Estimate(float("nan"), float("nan"), float("nan"))


@dataclass
class Section:
    """What the page says of one target."""

    name: str
    whole: Group
    metric: str
    """What it is judged by, with way and level."""
    conditions: list[tuple[str, Estimate]]
    """(condition in words, the chief metric under it)."""
    breakdowns: dict[str, list[list[Group | None]]]
    """What makes the parts to their groups: for each part, one per condition, None where it has none."""
    pictures: dict[str, Path] = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)

    @property
    def levels(self) -> list[str]:
        """``<way>/<level>`` of the whole, in order."""
        return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in self.whole.metrics))

    @property
    def measures(self) -> list[str]:
        """Metrics of the whole, those of one class last."""
        names = dict.fromkeys(name.split("/", 2)[2] for name in self.whole.metrics)
        return sorted(names, key=lambda name: "/" in name)

    @property
    def beside(self) -> list[str]:
        """Metrics that stand in breakdowns beside the chief one."""
        there = [name for name in BESIDE[self.whole.kind] if name in self.whole.metrics]
        return [name for name in there if name != self.metric]

    @property
    def reference(self) -> str:
        """Which reference the chief metric is compared with."""
        return REFERENCE[self.whole.kind]

    @property
    def compared(self) -> bool:
        """Whether there are comparisons with a reference."""
        return "comparison_type" in self.breakdowns

    def scale(self, rows: Sequence[Sequence[Group | None]]) -> float:
        """The largest value that is drawn for these parts."""
        groups = [groups[0] for groups in rows if groups[0]]
        found = [n for g in groups for n in (*g.metrics.get(self.metric, ()), g.references.get(self.reference, 0.0))]
        return max((n for n in found if isfinite(n)), default=1.0) or 1.0


def section_of(assessment: Assessment, whole: Group) -> Section:
    """What there is to say of the target of a group of all of its predictions."""
    choices = [
        f"{way}/{level}/{CHIEF[whole.kind]}"
        for way in ("likelihood", "generated")
        for level in ("subjects", "conversations")
    ]
    metric = next((name for name in choices if name in whole.metrics), choices[0])
    parts: dict[str, dict[str, list[Group | None]]] = {}
    there = [name for name in CONDITIONS if name in assessment.groups]
    for place, condition in enumerate(there):
        for group in assessment.groups[condition]:
            if group.target == whole.target:
                row = parts.setdefault(group.by, {}).setdefault(group.value, [None] * len(there))
                row[place] = group
    whole_row = parts.pop("all")[whole.value]
    return Section(
        name=whole.target,
        whole=whole,
        metric=metric,
        conditions=[
            (WORDS[name], group.metrics.get(metric, NOT_KNOWN))
            for name, group in zip(there, whole_row, strict=True)
            if group is not None
        ],
        breakdowns={by: list(of_value.values()) for by, of_value in parts.items()},
    )
