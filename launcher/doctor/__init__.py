"""The doctor: `python -m launcher.doctor` looks at everything a run stands on, and says what is wrong."""
