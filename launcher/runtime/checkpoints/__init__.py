"""Training state on disk, independent of any plan, whole or not there."""
