"""What a plan promises: step time, its parts, and memory, for every plan, whoever made it."""
