"""The tables of docs/models.md say what the code builds."""

import pathlib
import re

import pytest

from launcher import models
from launcher.config import GptConfig, MoeConfig, WrnConfig
from launcher.models.sizes import GPT_SIZES, MOE_SIZES, WRN_SIZES

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()


def rows(heading: str) -> dict[str, list[float]]:
    """Map each size below a heading to the numbers of its row; two sizes may share a line."""
    _, _, after = DOCS.partition(f"\n## {heading}\n")
    section, _, _ = after.partition("\n## ")
    return {
        size: [float(cell) for cell in cells.split("|") if cell.strip()]
        for size, cells in re.findall(r"\| `([\w.]+)` \|((?: [\d.]+ \|)+)", section)
    }


@pytest.mark.parametrize(
    ("heading", "config_type", "sizes"),
    [
        ("GPT", GptConfig, GPT_SIZES),
        ("MoE", MoeConfig, MOE_SIZES),
        ("Wide-ResNet", WrnConfig, WRN_SIZES),
    ],
)
def test_sizes_and_counts_are_documented(heading, config_type, sizes):
    documented = rows(heading)
    assert set(documented) == set(sizes)
    for size, (billions, *_) in documented.items():
        count = models.num_parameters(config_type(size=size))
        assert count / 1e9 == pytest.approx(billions, rel=1e-3, abs=5e-5)


def test_fields_of_sizes_are_documented():
    for size, entry in GPT_SIZES.items():
        assert rows("GPT")[size][1:] == [entry.hidden, entry.layers, entry.heads]
    for size, entry in MOE_SIZES.items():
        trunk = entry.transformer
        assert rows("MoE")[size][1:] == [trunk.hidden, trunk.layers, entry.experts.experts]
    for size, entry in WRN_SIZES.items():
        fields = [entry.depth, entry.base_channels, entry.width_factor]
        assert rows("Wide-ResNet")[size][1:] == fields
