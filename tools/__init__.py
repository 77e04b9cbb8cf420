"""Scripts for those who work on the project; nothing in `src/` needs them."""
