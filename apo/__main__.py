"""The command `apo`, which on a CPU runs in a process that uses freed memory again."""

from __future__ import annotations

from apo.heap import restart_with_tunables


def main() -> None:
    """Restart if that helps, before anything else is imported; then run the command."""
    restart_with_tunables()
    from apo.cli import main as run

    run()


if __name__ == "__main__":
    main()
