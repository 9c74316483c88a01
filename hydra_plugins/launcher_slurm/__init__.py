"""`hydra/launcher=slurm`: a folder of this name is where Hydra looks for launchers, and nowhere else."""
