"""Print a script for bash and zsh that completes commands, options, settings, and values of settings.

umbrella completion > ~/.local/share/bash-completion/completions/umbrella     # bash, with its package bash-completion
autoload -U +X bashcompinit && bashcompinit && source FILE                    # zsh, in ~/.zshrc; FILE has the output
"""

from collections.abc import Sequence
from importlib import import_module

from umbrella import commands
from umbrella.cli import Arguments, run_command
from umbrella.config import READY, Settings
from umbrella.settings_help import list_settings

# Names are static words: Python does not run when the user presses the key.
SCRIPT = """_umbrella() {{
  local words='{words}' word=${{COMP_LINE:0:$COMP_POINT}}; word=${{word##*[[:space:]]}}
  [[ $COMP_CWORD == 1 ]] && words='{commands}'
  [[ $word == *=* ]] && words='{values}'
  COMPREPLY=($([[ $word || $COMP_CWORD == 1 ]] && compgen -W "$words" -- "$word"))
  [[ ${{COMPREPLY[*]}} == *= ]] && compopt -o nospace
  [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${{COMPREPLY[@]#"${{word%=*}}="}}")
}}
complete -o default -F _umbrella umbrella"""


def main(args: Arguments) -> None:
    """Print the script."""
    settings = list_settings(Settings())
    modules = [import_module(f"umbrella.commands.{name.replace('-', '_')}") for name in commands.COMMANDS]
    options = {flag for module in modules for flag in getattr(module, "OPTIONS", ())}
    files = [file.name for file in READY.glob("*.yaml")]
    words = [*(f"{entry.name}=" for entry in settings), "--dry-run", "--help", *sorted(options), *sorted(files)]
    values = [f"{entry.name}={value}" for entry in settings if " | " in entry.kind for value in entry.kind.split(" | ")]
    print(SCRIPT.format(words=" ".join(words), commands=" ".join(commands.COMMANDS), values=" ".join(values)))


def run(argv: Sequence[str]) -> None:
    """Run the command with the words of its command line."""
    run_command("completion", argv, main, __doc__)
