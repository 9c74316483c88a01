"""Jobs of Slurm: what one asks for, its batch script, the code that it runs, what became of it.

Nothing here knows how a run works: a job runs `python -m launcher.cli.job FOLDER` on each of its nodes. Left
out: composing configs (`launcher.cli`), and Hydra's part of a sweep (`hydra_plugins/launcher_slurm`).
"""
