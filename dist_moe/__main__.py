"""Runs the command line as `python -m dist_moe`, which is how launchers start a worker."""

from dist_moe.cli.main import main

if __name__ == "__main__":
    main()
