"""Make conversations, splits and settings from a BIDS dataset, derivatives of it, or a table of image paths.

    umbrella make-conversations /data/ds --targets sex,age --output conversations/
    umbrella tune conversations/data.yaml

DATASET is a folder with sub-*/..., a folder of FreeSurfer subjects, or a table (.tsv, .csv) with a column of paths for
each modality. Labels come from participants.tsv, *_sessions.tsv, phenotype/*.tsv, and tables given with --table.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from umbrella.base import UserError
from umbrella.cli import exit_with_status, make_console, progress_bar


def pairs(text: str) -> dict[str, str]:
    """Parse ``name=value,name=value``."""
    found = dict(part.partition("=")[::2] for part in words(text))
    if "" in found or any("=" not in part for part in words(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be name=value, with commas between several")
    return found


def words(text: str) -> tuple[str, ...]:
    """Parse names with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def codes(text: str) -> tuple[str, dict[str, str]]:
    """Parse ``variable=code:value,code:value``."""
    name, _, listed = text.partition("=")
    found = dict(part.partition(":")[::2] for part in words(listed))
    if not name or not found or any(":" not in part for part in words(listed)):
        raise argparse.ArgumentTypeError(f"{text}: must be variable=code:value,code:value")
    return name, found


def shares(text: str) -> tuple[float, ...]:
    """Parse ``70/15/15``: train, validation, and test if there is a third number."""
    parts = tuple(map(float, text.split("/")))
    if len(parts) not in (2, 3) or min(parts) < 0 or min(parts[:2]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be train/validation/test or train/validation, as in 70/15/15")
    return parts


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="umbrella make-conversations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("dataset", type=Path, metavar="DATASET")
    add("--targets", type=words, required=True, metavar="sex,age", help="what is asked: columns of the tables")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--dry-run", action="store_true", help="print the report, and write nothing")
    images = made.add_argument_group("images")
    add = images.add_argument
    add("--derivatives", type=words, default=(), metavar="fmriprep", help="folders to search instead of the raw data")
    add("--suffixes", type=words, default=(), metavar="T1w,FA", help="default: T1w,FA,bold; also pet=PET")
    add("--select", type=pairs, default={}, metavar="space=MNI152NLin2009cAsym,res=2", help="one of several variants")
    add("--masks", action="store_true", help="note the brain mask beside a derivative in metadata.brain_mask")
    tables = made.add_argument_group("tables")
    add = tables.add_argument
    add(
        "--table",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="one more table, which wins",
    )
    add("--columns", type=pairs, default={}, metavar="age=age_at_scan", help="column of a variable")
    add("--values", type=codes, action="append", default=[], metavar="sex=0:female,1:male", help="meaning of codes")
    add("--keep", type=words, default=(), metavar="iq", help="columns to write into the metadata")
    texts = made.add_argument_group("conversations")
    add = texts.add_argument
    add("--templates", type=Path, metavar="FILE", help="YAML with texts that replace the built-in ones")
    add("--tasks", type=words, default=("T1", "T2", "T3"), metavar="T1,T3", help="default: T1,T2,T3")
    add("--together", action="store_true", help="ask about all targets in one conversation of T1 and T2")
    add("--compare", type=words, default=(), metavar="sex", help="targets of comparisons (T3), default: all")
    add("--references", type=int, default=1, metavar="N", help="comparisons of each subject (T3)")
    add("--reference-pool", type=float, default=0.0, metavar="0.2", help="share of subjects that are references only")
    add("--anchors", default="", metavar="N|sub-01,sub-02", help="references of all subjects, never asked about")
    add("--bins", type=int, default=4, metavar="N", help="bins in which numbers count as the same in comparisons")
    splits = made.add_argument_group("splits")
    add = splits.add_argument
    add("--split", type=shares, default=(70.0, 15.0, 15.0), metavar="70/15/15")
    add("--group", default="", metavar="family_id", help="column of groups that stay in one split")
    add("--hold-out", type=pairs, default={}, metavar="site=Oxford", help="subjects of the split external")
    add("--folds", type=int, default=0, metavar="K", help="K splits for cross-validation, in fold-1 to fold-K")
    add("--split-file", type=Path, metavar="splits.tsv", help="splits of known subjects (default: that of the output)")
    add("--seed", type=int, default=0)
    return made


def main(argv: Sequence[str]) -> None:
    """Read the command line and make the conversations."""
    from umbrella.cohorts.make import make_conversations
    from umbrella.cohorts.reading import Request
    from umbrella.cohorts.tables import canonical

    given = vars(parser().parse_args(argv))
    for name in ("targets", "keep", "compare"):
        given[name] = tuple(map(canonical, given[name]))
    for name in ("columns", "hold_out"):
        given[name] = {canonical(variable): value for variable, value in given[name].items()}
    given["group"] = canonical(given["group"])
    given["tables"] = tuple(given.pop("table"))
    given["values"] = {canonical(variable): meanings for variable, meanings in given["values"]}
    if unknown := set(given["tasks"]) - {"T1", "T2", "T3"}:
        raise UserError(f"--tasks {', '.join(sorted(unknown))}: there are T1, T2 and T3")
    if unknown := set(given["compare"]) - set(given["targets"]):
        raise UserError(f"--compare {', '.join(sorted(unknown))}: not in --targets")
    if given["folds"] and given["folds"] < 3:
        raise UserError("--folds: must be 3 or more, one each for test and validation, and the rest for training")
    console = make_console()
    make_conversations(
        Request(**given), progress_bar, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    exit_with_status(lambda: main(argv))
