"""The command line: `python -m search +experiment=demo`.

Exit status 0; 1 with one line that says what was wrong; 130 and 143 where it was stopped, with one line that says how
to go on.
"""

from __future__ import annotations

from supernet.system.stops import told_when_stopped


def main() -> None:
    """Run the command line in `sys.argv`."""
    with told_when_stopped("the same command continues from the last completed step"):
        from search.cli.command import command  # takes seconds, in which one may want to stop it, too

        command()


if __name__ == "__main__":
    main()
