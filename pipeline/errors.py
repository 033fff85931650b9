"""What is told in one line instead of a traceback: mistakes of the user, and faults of the machine.

The lowest room: it imports nothing, and every other may call it. Any other exception is a bug of ours.
"""


class UserError(Exception):
    """A mistake that the user can mend: one line says what is wrong and how. The command line ends with code 2."""


class MachineError(UserError):
    """A fault of the machine, not of the settings: a full disk, no right to write, a file that is lost or damaged."""


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, at most so many characters; its type where there is no message."""
    if isinstance(error, KeyError):
        return f"no {error} in it"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:most]
