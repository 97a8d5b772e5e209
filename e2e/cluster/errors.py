"""The exceptions a user of the cluster tool meets."""


class ClusterError(Exception):
    """What went wrong, with the numbers and the next step; printed without a traceback."""


class DaemonEndedError(ClusterError):
    """A daemon ended while it was waited for; the text quotes its log."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name
