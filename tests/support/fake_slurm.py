"""Stand-ins for Slurm's commands, for what does not need a cluster.

Each is a shell script in a folder that comes first on PATH; they write what they are asked into `asked`, and
answer what the files beside them say.
"""

import os
import pathlib

import pytest

# A run that is small enough to be trained by the way.
TINY = (
    "logger=jsonl", "model.layers=2", "model.hidden=32", "model.heads=2", "model.seq_len=32",
    "parallel=single", "cluster.hosts=1", "cluster.devices_per_host=1", "train.steps=20",
    "train.eval_batches=0",
)  # fmt: skip
_COMMANDS = {
    "sbatch": """
echo "sbatch $*" >>"$here/asked"
if [ "$1" = --test-only ]; then
  cat >>"$here/tested"
  [ ! -e "$here/refusal" ] || { cat "$here/refusal" >&2; exit 1; }
  exit 0
fi
[ ! -e "$here/late-refusal" ] || { cat "$here/late-refusal" >&2; exit 1; }
number=$(( $(cat "$here/number" 2>/dev/null || echo 100) + 1 ))
echo $number >"$here/number"
echo "Submitted batch job $number"
""",
    "squeue": """
echo "squeue $*" >>"$here/asked"
[ ! -e "$here/squeue-fails" ] || { cat "$here/squeue-fails" >&2; exit 1; }
case "$*" in
  *%T*--jobs=*|*--jobs=*%T*) cat "$here/state" 2>/dev/null || echo RUNNING ;;
  *) cat "$here/queue" 2>/dev/null; true ;;
esac
""",
    "scontrol": """
echo "scontrol $*" >>"$here/asked"
[ ! -e "$here/requeue-fails" ] || exit 1
[ "$1" = requeue ] || cat "$here/show" 2>/dev/null
exit 0
""",
    "srun": """
echo "srun $*" >>"$here/asked"
[ ! -e "$here/srun" ] || . "$here/srun"
""",
}


class FakeSlurm:
    """The folder of the stand-ins."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, body in _COMMANDS.items():
            script = folder / name
            script.write_text(f'#!/bin/bash\nhere="{folder}"\n{body}')
            script.chmod(0o755)

    def say(self, name: str, text: str) -> None:
        """Let a command answer this from now on."""
        (self.folder / name).write_text(text)

    @property
    def asked(self) -> list[str]:
        """What the commands were asked so far, without the paths of scripts."""
        try:
            return (self.folder / "asked").read_text().splitlines()
        except FileNotFoundError:
            return []

    @property
    def submitted(self) -> int:
        """How many jobs were submitted."""
        return sum(line.startswith("sbatch /") for line in self.asked)

    def on_path(self) -> str:
        """A PATH with it first."""
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def fake_slurm(tmp_path_factory, monkeypatch) -> FakeSlurm:
    """Slurm, for this test."""
    fake = FakeSlurm(tmp_path_factory.mktemp("slurm") / "bin")
    monkeypatch.setenv("PATH", fake.on_path())
    return fake
