"""`python -m launcher`: the same as the console script `launcher`."""

import sys

from launcher import early_stop, standard_streams

early_stop.listen()
standard_streams.outlive_readers()

from launcher.cli import main  # noqa: E402 - importing takes a moment, in which a signal may come

if __name__ == "__main__":
    sys.exit(main())
