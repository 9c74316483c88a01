"""What is known of devices by the name of their kind, as JAX reports it or a cluster file gives it."""

# Devices that JAX may report, by the packaged cluster that has the figures of their kind.
KNOWN_KINDS = {
    "V100-SXM2-16GB": "1xp3",
    "V100-SXM2-32GB": "1xp3",
    "A100-SXM4-40GB": "dgx-a100",
    "A100-SXM4-80GB": "dgx-a100",
    "H100 80GB HBM3": "dgx-h100",
    "H200": "h200",
}
# Where it is not that of the packaged cluster. NVIDIA A100 datasheet.
MEMORY_BYTES_PER_S = {"A100-SXM4-40GB": 1.555e12}

_WITHOUT_BF16 = ("K80", "P40", "P100", "V100", "T4", "GTX", "RTX 20", "Quadro RTX", "TITAN")
_NOT_NVIDIA = ("TPU", "AMD", "Radeon", "gfx", "Intel", "Apple")


def has_bf16(kind: str) -> bool:
    """Whether an accelerator of this kind computes in bf16."""
    return not any(name in kind for name in _WITHOUT_BF16)


def is_nvidia(kind: str) -> bool:
    """Whether an accelerator of this kind is NVIDIA's, whose names often do not say so."""
    return not any(name in kind for name in _NOT_NVIDIA)
