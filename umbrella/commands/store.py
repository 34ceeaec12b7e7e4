"""List the recipes of the volume store, or delete unused arrays.

Without arguments: a table of recipes. --prune deletes arrays of recipes that these settings do not use, and arrays of
source files that are missing or have changed. With --dry-run it only prints how much it would delete.
"""

from collections.abc import Sequence
from typing import Any

from umbrella.cli import Arguments, make_console, run_command

OPTIONS = {"--prune": {"help": "delete arrays that these settings and files do not use", "action": "store_true"}}


def main(args: Arguments) -> None:
    """Print the table, or delete unused arrays."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from umbrella.volumes.store import open_store
    from umbrella.volumes.store_files import prune, stored_recipes

    console, modalities = make_console(), args.settings.modalities
    folder = open_store(args.settings).folder
    if args.options["prune"]:
        files, size = prune(folder, modalities, args.dry_run)
        done = "would be deleted" if args.dry_run else "deleted"
        console.print(
            f"{files} files of {decimal(size)} {done} in {folder}", highlight=False, markup=False, soft_wrap=True
        )
        return
    recipes = stored_recipes(folder, modalities)
    table = Table(title=escape(str(folder)), title_justify="left")
    for name in ("recipe", "used by", "arrays", "size"):
        table.add_column(name, justify="right" if name in ("arrays", "size") else "left")
    for stored in recipes:
        users = ", ".join(stored.modalities) or "nothing in these settings"
        table.add_row(describe(stored.recipe), escape(users), str(stored.arrays), decimal(stored.size))
    table.add_section()
    table.add_row("all", "", str(sum(r.arrays for r in recipes)), decimal(sum(r.size for r in recipes)))
    console.print(table)


def describe(recipe: dict[str, Any]) -> str:
    """Describe a recipe in one line."""
    parts = [
        "×".join(map(str, recipe["grid"])) + (" per frame" if recipe["series"] else ""),
        f"voxels of {recipe['spacing']:g} mm" if recipe["spacing"] else "resized",
        recipe["intensity"],
        f"background {recipe['background']:g}",
        f"version {recipe['version']}",
    ]
    if "percentiles" in recipe:
        parts[2] += " {:g} to {:g}".format(*recipe["percentiles"])
    return ", ".join(parts)


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("store", argv, main, __doc__, options=OPTIONS)
