"""What `python -m launcher.bench --help` says."""

from launcher.bench.__main__ import BENCHMARKS, main


def test_help_says_what_each_benchmark_is(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in BENCHMARKS:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 3
