"""The exceptions that users see as a message, without a traceback."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something in a config, checkpoint, data folder or command line that its author can mend.

    The message is one line: what is wrong, with its value, and what is allowed. tools/ print it and exit with 1.
    """


def check_least(options: Any, **least: int) -> None:
    """Refuse options of a command line, numbers or lists of them, below the least value of each."""
    for name, value in least.items():
        given = getattr(options, name)
        for each in given if isinstance(given, list) else [given]:
            if each is not None and each < value:
                raise UserError(f'--{name} {each} is less than {value}')


class Stopped(Exception):
    """Training was asked to end, has saved a checkpoint and can be resumed. tools/ print it and exit with 75."""
