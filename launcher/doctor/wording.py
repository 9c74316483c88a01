"""How the doctor writes numbers."""

GIB_BYTES = 1 << 30
MIB_BYTES = 1 << 20


def counted(number: int, noun: str) -> str:
    """Write `1 node` and `2 nodes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(num_bytes: float) -> str:
    """Write `512 MiB` and `19.4 GiB`."""
    if num_bytes < GIB_BYTES:
        return f"{num_bytes / MIB_BYTES:.0f} MiB"
    return f"{num_bytes / GIB_BYTES:,.1f} GiB"
