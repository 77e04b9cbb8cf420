"""Model files: opening, checking, writing and inspecting them, in every form."""
