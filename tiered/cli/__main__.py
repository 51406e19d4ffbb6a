"""`python -m tiered.cli`, where the `tiered` script is not on the path."""

from tiered.cli.app import app

if __name__ == "__main__":
    app(prog_name="tiered")
