"""Fine-tune: train the codebooks, and what was left dense, on the original task (paper section 3.4). Codes stay
fixed."""
