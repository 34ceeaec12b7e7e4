"""What the volume store holds, and how to make room in it.

Without arguments: a table of its recipes. --prune deletes what nothing can ask for any more: arrays of settings other
than these, and of files that are gone or have changed; with --dry-run it only says how much that is.
"""

from typing import Any

from umbrella.cli import Arguments, Option, make_console, run_script

OPTIONS = (Option("--prune", "delete what nothing can ask for any more", default=False),)


def main(args: Arguments) -> None:
    """Print what is there, or delete what is of no use."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from umbrella.data.ingest import open_store
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
    held = stored_recipes(folder, modalities)
    table = Table(title=escape(str(folder)), title_justify="left")
    for name in ("recipe", "used by", "arrays", "size"):
        table.add_column(name, justify="right" if name in ("arrays", "size") else "left")
    for holding in held:
        users = ", ".join(holding.modalities) or "nothing in these settings"
        table.add_row(in_words(holding.recipe), escape(users), str(holding.arrays), decimal(holding.size))
    table.add_section()
    table.add_row("all", "", str(sum(h.arrays for h in held)), decimal(sum(h.size for h in held)))
    console.print(table)


def in_words(recipe: dict[str, Any]) -> str:
    """A recipe as a person would say it."""
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


if __name__ == "__main__":
    run_script(main, __doc__, options=OPTIONS)
