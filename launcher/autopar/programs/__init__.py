"""The program of a step: schedules, messages, the checker that proves it, the simulator that times it."""
