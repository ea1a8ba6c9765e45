# SPDX-License-Identifier: Apache-2.0
"""The one exception for faults a user can fix."""


class ClpError(ValueError):
    """A fault in what the user gave: it says what is wrong, where, and what to do.

    The command line prints it as one line (``error: what, where, what to do``) and exits with 1; a node logs it and
    shows it on /diagnostics. A broken invariant of our own is a plain ``ValueError`` or ``RuntimeError`` instead.

    Args:
        what: What is wrong, without a full stop.
        where: The file, key, topic, joint or layer at fault.
        fix: What the user can do about it.
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        # One line whatever a library's own message held: the command line promises exactly one.
        super().__init__(" ".join(", ".join(part for part in (what, self.where, fix) if part).split()))


class NotHereError(ClpError):
    """Something that is needed is not on this machine: a package that is not installed, a file not downloaded."""
