"""The `pagedkv` command, also as `python -m pagedkv`."""

import sys

COMMAND_NEEDS = ("msgspec", "plotly", "rich", "typer")

INTERRUPTED = 130
"""What a shell says of a command that ctrl-C ended: 128 and the signal's number."""


def main() -> None:
    """Run the command, or say in one line which extra brings what it needs."""
    try:
        from pagedkv.simulations.cli import main as run

        run()
    except KeyboardInterrupt:  # While the imports last, nobody else looks out for it.
        sys.exit(INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in COMMAND_NEEDS:
            raise
        sys.stderr.write(
            f"error: the pagedkv command needs {error.name}: in a checkout of pagedkv, pip install '.[sim]'\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
