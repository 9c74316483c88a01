"""Looking on while a step is dispatched, launch by launch."""

from launcher.autopar.programs.launches import Launch


class LaunchWatch:
    """Is told of every launch; this one takes no note of anything."""

    def begins(self, launch: Launch) -> None:
        """It is dispatched next."""

    def launched(self, launch: Launch, results: object) -> None:
        """It has been dispatched; these arrays are there when it is done."""
