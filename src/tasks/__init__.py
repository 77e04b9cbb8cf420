"""Data, loss and metric of a task."""
