"""Check all data before a training: read every conversation, decode every volume once, and write a report.

Without arguments: the phantom cohort, which is created if it does not exist. The checks are those at the start of a
training. The report is <storage>/report/index.html; it is also written if there are problems. --dry-run skips the
volumes and writes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from umbrella.base import note
from umbrella.cli import Arguments, make_console, progress_bar, run_command


def main(args: Arguments) -> None:
    """Check the data, write the report, and print a summary."""
    from rich.filesize import decimal

    from umbrella.cluster import join_cluster
    from umbrella.cohort_report.report import write_report
    from umbrella.conversations.schema import SPLITS
    from umbrella.data.ingest import apply_bad_sample_policy, check_rendering, check_volumes, coarse_grids
    from umbrella.data.splits import read_splits
    from umbrella.paths import COHORT_REPORT
    from umbrella.training.run import check_data, check_model
    from umbrella.volumes.store import open_store
    from umbrella.volumes.store_files import stored_recipes

    settings, console = args.settings, make_console()

    def print_row(name: str, value: str) -> None:
        console.print(f"{name + ':':<16}{value}", markup=False, highlight=False, soft_wrap=True)

    check_model(settings)
    if not args.dry_run:
        join_cluster(settings.resources, "prepare")
    splits = read_splits(settings, progress_bar, SPLITS, dry_run=args.dry_run)
    if not args.dry_run:
        check_volumes(splits, settings, progress_bar)
        store = open_store(settings)
    check_rendering(splits, settings, progress_bar)
    if not args.dry_run:
        page = write_report(Path(settings.resources.storage) / COHORT_REPORT, splits, store, progress_bar)
    print_row("samples", ", ".join(f"{name} {len(conversations)}" for name, conversations in splits.splits.items()))
    if not args.dry_run:
        recipes = stored_recipes(store.folder, settings.modalities)
        print_row("volumes", str(len(splits.volumes)))
        print_row("volume store", f"{decimal(sum(r.size for r in recipes))} in {sum(r.arrays for r in recipes)} arrays")
        print_row("report", str(page))
    for line in (*splits.notices, *coarse_grids(splits, settings)):
        note(line)
    apply_bad_sample_policy(splits, settings, write=not args.dry_run)
    if splits.quarantined:
        print_row(
            "quarantined", f"{splits.quarantined} samples, see {splits.quarantine or 'the report, without --dry-run'}"
        )
    check_data(settings, splits)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("prepare", argv, main, __doc__)
