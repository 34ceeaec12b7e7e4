"""The command ``umbrella make-conversations``, for a checkout."""

from umbrella.commands import run

if __name__ == "__main__":
    run("make-conversations")
