"""The errors users meet. Each message says what came, what was expected and what to do.

A command line prints the message as one line and exits with code 2; no traceback reaches a user.
"""

#: Longest message; what a foreign file says may be of any length.
_MOST, _HEAD = 4000, 2800


def shortened(message: str) -> str:
    """Return a message with its middle left out if it is longer than anybody reads."""
    if len(message) <= _MOST:
        return message
    left_out = len(message) - _MOST
    return f"{message[:_HEAD]} … ({left_out:,} characters left out) … {message[_HEAD + left_out :]}"


class SeekforgeError(Exception):
    """Base of every error that is the input's or the environment's fault, not a bug of ours.

    A message is of bounded length: names and values of foreign files stand in it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class ConfigError(SeekforgeError):
    """A config file lacks a key, has one of the wrong type, or describes a model we do not do."""


class CheckpointError(SeekforgeError):
    """A checkpoint folder is incomplete, damaged, or does not match its config."""


class ShapeError(SeekforgeError):
    """A tensor has another shape or dtype than the operator's contract says."""


class ProgramError(SeekforgeError):
    """A program folder is damaged, of another version, or cannot be specialized as asked."""


class TargetError(SeekforgeError):
    """A build target is unknown or cannot do what was asked."""


class EngineError(SeekforgeError):
    """An engine folder is damaged, of another version, or does not compute what it should."""


class RequestError(SeekforgeError, ValueError):
    """A generation request cannot be served: empty prompt, too long, bad sampling parameter."""


class OptionError(SeekforgeError, ValueError):
    """An option has a value that it does not take, is missing, or does not go with another: wrong usage."""


class OutputError(SeekforgeError):
    """A result cannot be written: folder not empty, disk full, no permission."""


class EnvironmentFault(SeekforgeError):
    """A package or device that the command needs is missing here."""
