"""Python and packages that fit, are too old, too new, or missing."""

import dataclasses

import pytest
from doctor_fakes import only, statuses

from launcher.doctor.findings import Status
from launcher.doctor.installation import (
    Installed,
    check_jax_parts,
    check_packages,
    check_python,
    look,
)
from launcher.doctor.versions import parse_requirement

SOUND = Installed(
    python="3.11.7",
    python_bounds=">=3.11,<3.14",
    versions={"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"},
    requirements=tuple(
        map(parse_requirement, ("jax>=0.10.2,<0.12", "flax>=0.12.8", "ruff==1; extra == 'test'"))
    ),
    jax_requirements=(parse_requirement("jaxlib<=0.10.2,>=0.10.1"),),
)


def with_versions(**versions: str) -> Installed:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return dataclasses.replace(SOUND, versions=SOUND.versions | named)


def test_a_sound_installation():
    assert statuses(check_python(SOUND)) == [Status.OK]
    assert only(check_packages(SOUND)).what == "2 packages as asked for: jax 0.10.2, flax 0.12.8"
    assert only(check_jax_parts(SOUND)).what == "jax 0.10.2 and jaxlib 0.10.2 go together"


def test_this_installation():
    installed = look()
    assert installed.versions["jax"]
    assert Status.FAILED not in statuses(check_packages(installed))
    assert statuses(check_jax_parts(installed)) == [Status.OK]


def test_a_python_that_is_too_new():
    finding = only(check_python(dataclasses.replace(SOUND, python="3.14.0")))
    assert finding.status is Status.FAILED
    assert finding.what == "Python 3.14.0, and >=3.11,<3.14 is asked for"
    assert "virtual environment" in finding.cure


def test_sources_that_are_not_installed():
    finding = only(check_python(dataclasses.replace(SOUND, python_bounds=None)))
    assert finding.status is Status.WARNING
    assert finding.cure == "pip install -e . in that folder"


@pytest.mark.parametrize("version", ["0.9.1", "0.12.0"])
def test_a_package_out_of_bounds(version):
    finding = only(check_packages(with_versions(jax=version)))
    assert finding.status is Status.FAILED
    assert finding.what == f"jax {version}, and >=0.10.2,<0.12 is asked for"
    assert 'pip install "jax>=0.10.2,<0.12"' in finding.cure


def test_a_package_that_is_not_installed():
    without = {name: version for name, version in SOUND.versions.items() if name != "flax"}
    finding = only(check_packages(dataclasses.replace(SOUND, versions=without)))
    assert finding.status is Status.FAILED
    assert finding.what == "flax is not installed, and flax>=0.12.8 is asked for"


def test_a_jaxlib_of_another_version():
    finding = only(check_jax_parts(with_versions(jaxlib="0.9.0")))
    assert finding.status is Status.FAILED
    assert "this jax asks for jaxlib<=0.10.2,>=0.10.1" in finding.what


def test_plugins_for_gpus():
    _, good = check_jax_parts(with_versions(jax_cuda12_plugin="0.10.2"))
    assert good.status is Status.OK
    _, old = check_jax_parts(with_versions(jax_cuda12_plugin="0.10.1"))
    assert old.status is Status.FAILED
    assert 'pip install "jax-cuda12-plugin==0.10.2"' in old.cure
