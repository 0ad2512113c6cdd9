"""Errors that a user can mend; the command line prints them without a traceback."""


class MmpoError(Exception):
    """Something outside the code has to change: a file, a recipe, a full disk.

    The message is written for the person who runs the command. It names the thing at fault and
    what to do about it, because it is all that the command line shows.
    """


class Stopped(Exception):
    """A command was asked to stop, and did so where it can go on. The message says where."""


class DataError(MmpoError):
    """A file or a row of the user's data cannot be used."""
