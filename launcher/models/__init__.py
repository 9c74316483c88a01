"""Models: Flax modules, their sizes, and what the launcher needs to know of them."""

from launcher.models.families import build as build
from launcher.models.families import num_parameters as num_parameters
from launcher.models.families import resolve as resolve
from launcher.models.model import Model as Model
