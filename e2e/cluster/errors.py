"""The one exception a user of the cluster tool meets."""


class ClusterError(Exception):
    """What went wrong, with the numbers and the next step; printed without a traceback."""
