# SPDX-License-Identifier: Apache-2.0
"""The ``clp`` command: a sub-command per job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clp_ros.errors import ClpError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0 done; 1 a fault the user can fix, told in one line on stderr; 2 wrong usage; 130 interrupted.
    """
    try:
        run(arguments)
        sys.stdout.flush()  # so that a pipe closed early shows here
    except ClpError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `clp inspect … | head` is no fault
    except OSError as error:  # a disk too full, a file taken away: not ours to foresee, but the user's to mend
        fix = "check the files and the room on the disk"
        print(f"error: {ClpError(error.strerror or repr(error), where=error.filename, fix=fix)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; faults are the caller's to tell.

    Raises:
        ClpError: A fault the user can fix.
        SystemExit: Wrong usage, or --help.
    """
    from clp_ros.cli.parser import make_parser

    options = make_parser().parse_args(arguments)
    options.run(options)
