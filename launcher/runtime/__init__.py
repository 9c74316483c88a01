"""Running plans: compiled programs, steps, records and checkpoints, on one host or many."""
