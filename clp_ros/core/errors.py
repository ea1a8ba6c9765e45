# SPDX-License-Identifier: Apache-2.0
"""The exception for faults that a user can remedy."""

from __future__ import annotations

import warnings
from typing import Self


class ClpError(ValueError):
    """A fault that a user can remedy: where it is, what is wrong and what to do.

    ``str()`` gives one line, ``<where>: <what> (hint: <hint>)``. The command line prints it after ``error:`` and exits
    with 1. Nodes write it to their log, to /diagnostics and into the answer of a service. A fault of this package
    itself is a ``ValueError`` or ``RuntimeError`` instead.

    Args:
        what: What is wrong: one sentence, without a full stop.
        where: The file, topic, parameter, option or joint at fault. None if the caller adds it with :meth:`at`.
        hint: What the user can do, as an imperative. None if there is nothing more to say.
        fix: Old name of ``hint``, accepted until 0.3.
    """

    def __init__(
        self, what: str, *, where: object | None = None, hint: str | None = None, fix: str | None = None
    ) -> None:
        if fix is not None:
            warnings.warn("ClpError(fix=...) is now ClpError(hint=...)", DeprecationWarning, stacklevel=2)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = fix if hint is None else hint
        place = f"{self.where}: " if self.where else ""
        advice = f" (hint: {self.hint})" if self.hint else ""
        # A message of a library in `what` may have several lines.
        super().__init__(" ".join(f"{place}{what}{advice}".split()))

    def at(self, where: object, before: str = "") -> Self:
        """Returns the same fault with its place, for a caller that knows the file, topic or parameter.

        Args:
            where: Replaces ``where``.
            before: Text to put before ``what``.
        """
        return type(self)(before + self.what, where=where, hint=self.hint)

    @property
    def fix(self) -> str | None:
        """Old name of ``hint``."""
        warnings.warn("ClpError.fix is now ClpError.hint", DeprecationWarning, stacklevel=2)
        return self.hint


class NotHereError(ClpError):
    """A package that is not installed, or a file that is not downloaded."""
