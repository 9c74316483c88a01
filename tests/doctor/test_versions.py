"""Versions and bounds, with the `packaging` library as the oracle."""

import itertools

import pytest
from packaging.requirements import Requirement as Oracle
from packaging.specifiers import SpecifierSet

from launcher.doctor.versions import fits, normal_name, parse_requirement, release

VERSIONS = (
    "0.9",
    "0.10.1",
    "0.10.2",
    "0.10.2rc1",
    "0.10.3",
    "0.12",
    "1",
    "1.0.0",
    "1.4.1",
    "2.0.0",
)
BOUNDS = (
    ">=0.10.2,<0.12",
    "<0.10.2",
    ">0.10.2",
    "<=1.0",
    "==1.0",
    "!=1.0.0",
    "~=0.10.1",
    "~=1.0",
    "==0.10.*",
    "!=0.10.*",
    "",
    ">=2",
)


@pytest.mark.parametrize(("version", "bounds"), list(itertools.product(VERSIONS, BOUNDS)))
def test_agrees_with_packaging(version, bounds):
    assert fits(version, bounds) == SpecifierSet(bounds).contains(version, prereleases=True)


@pytest.mark.parametrize(
    "line",
    [
        "jax<0.12,>=0.10.2",
        "jax[cuda12]<0.12,>=0.10.2; extra == 'cuda'",
        "numpy>=2.0",
        "Scikit_Learn (>=1.5) ; extra == 'test'",
        "rich",
    ],
)
def test_requirements_are_read_as_packaging_reads_them(line):
    ours, oracle = parse_requirement(line), Oracle(line)
    assert ours.name == normal_name(oracle.name)
    assert SpecifierSet(ours.bounds) == oracle.specifier
    extra = ours.extra or "none"
    assert oracle.marker is None or oracle.marker.evaluate({"extra": extra})


def test_local_and_post_versions_count_as_their_release():
    assert release("2.6.0+cu124") == release("2.6.post1") == (2, 6)


def test_what_is_no_version_is_refused():
    with pytest.raises(ValueError, match="'new' is no version: it should read such as"):
        fits("new", ">=1")
    with pytest.raises(ValueError, match="'1.0' are no bounds on a version"):
        fits("1.0", "1.0")
    with pytest.raises(ValueError, match="'>=1' is no requirement"):
        parse_requirement(">=1")
