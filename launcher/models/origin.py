"""The model that weights were written by, in config keys, beside the one that shall take them.

What is written down of a model are its size and the fields that differed from it. A field that only the
other model sets is named too, with the value that the table has for it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.models.model import Model
from launcher.models.sizes import table_fields

_KEY = re.compile(r"(?:^| )model\.([^\s=]+)=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A model as a record has it.

    Attributes:
        dtype: None where it is not to be told.
        overrides: field of the family -> value, as far as it is not that of the size.
    """

    name: str
    size: str
    dtype: str | None = None
    overrides: Mapping[str, Any]

    def __str__(self) -> str:
        dtype = [] if self.dtype is None else [f"model.dtype={self.dtype}"]
        fields = [f"model.{name}={value}" for name, value in self.overrides.items()]
        return " ".join((f"model={self.name}", f"model.size={self.size}", *dtype, *fields))

    def keys_instead_of(self, here: Model) -> str:
        """Return the keys that make a run with that model of one with this."""
        if self.name != here.name:
            return str(self)
        table = table_fields(self.name, self.size)
        only_here = {k: v for k, v in here.overrides.items() if k not in self.overrides}
        back = [
            f" model.{name}={table[name]}"
            for name, value in only_here.items()
            if name in table and table[name] != value
        ]
        dropped = [f"model.{name}" for name in only_here if name not in table]
        without = f", without {' and '.join(dropped)}" if dropped else ""
        return f"{self}{''.join(back)}{without}"


def origin_of(model: Model) -> Origin:
    """Return what a record has of a model, but for its dtype."""
    return Origin(name=model.name, size=model.size, overrides=model.overrides)


def overrides_text(model: Model) -> str:
    """Write down in one line what a model has otherwise than its size."""
    return " ".join(f"model.{name}={value}" for name, value in model.overrides.items())


def overrides_of(text: str) -> dict[str, str]:
    """Read that line back; the values stay texts."""
    _, *parts = _KEY.split(text)
    return dict(zip(parts[::2], parts[1::2], strict=True))
