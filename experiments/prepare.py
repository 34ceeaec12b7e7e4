"""The command ``umbrella prepare``, for a checkout."""

from umbrella.commands import run

if __name__ == "__main__":
    run("prepare")
