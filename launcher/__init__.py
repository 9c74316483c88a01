"""A training launcher for JAX: plan how a model runs on a cluster, then run it exactly so."""

__version__ = "0.1.0"
