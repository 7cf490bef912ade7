"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, a file or a row, told in one line.

    The message names the file, key or row, what was found, and what would be right. The command
    line prints it without a traceback and exits with status 2.
    """
