"""The one exception that means "the user can mend this": the command line prints it and exits with 2."""


class UserError(Exception):
    """What was given, what was expected, and what to do, in one message."""


class NothingToShow(UserError):
    """A report has nothing to show, because no SAE of a suite has what it is about; other reports may have."""
