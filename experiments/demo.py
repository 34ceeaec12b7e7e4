"""The command ``umbrella demo``, for a checkout."""

from umbrella.commands import run

if __name__ == "__main__":
    run("demo")
