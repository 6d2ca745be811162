"""The one exception that users see as a message, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something in a config, checkpoint, data folder or command line that its author can mend.

    The message is one line: what is wrong, with its value, and what is allowed. tools/ print it and exit with 1.
    """


class Stopped(Exception):
    """Training was asked to end, has saved a checkpoint and can be resumed. tools/ print it and exit with 75."""
