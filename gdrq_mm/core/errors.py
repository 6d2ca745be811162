"""The one exception that users see as a message, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something in a config, checkpoint, data folder or command line that its author can mend.

    The message is one line: what is wrong, with its value, and what is allowed. tools/ print it and exit with 1.
    """


class Stopped(Exception):
    """Training was asked to end, has saved a checkpoint and can be resumed. tools/ print it and exit with 75."""


@contextmanager
def building(what: str, verb: str = 'cannot be built') -> Iterator[None]:
    """Turn what a registry or a constructor raises on a wrong config into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error.args[0]) if error.args else type(error).__name__).splitlines()[0]
        raise UserError(f'{what} {verb}: {reason} (GDRQ_DEBUG=1 shows where)') from error
