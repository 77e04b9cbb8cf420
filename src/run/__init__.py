"""A run around the science: processes, signals, output folder, recorder, checkpoints, resuming."""
