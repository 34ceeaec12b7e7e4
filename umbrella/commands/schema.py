"""Print the JSON schema of settings files, with which editors complete and check them."""

import json
from collections.abc import Sequence

from umbrella.cli import Arguments, run_command
from umbrella.settings_help import json_schema


def main(args: Arguments) -> None:
    """Print the schema."""
    print(json.dumps(json_schema(), indent=1))


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("schema", argv, main, __doc__)
