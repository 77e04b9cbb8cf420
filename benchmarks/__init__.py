"""What the project costs, measured: every module says which claim it measures and the command. All: `python -m
benchmarks`."""
