"""The loop around the steps, evaluation, and what a run leaves behind."""
