"""The demonstrations: the whole method on embedded data, as a user would run it."""
