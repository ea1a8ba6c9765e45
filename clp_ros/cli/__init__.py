# SPDX-License-Identifier: Apache-2.0
"""The ``clp`` command: a sub-command per job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clp_ros.core.errors import ClpError


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
        print("interrupted; nothing half-written was left behind", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `clp inspect … | head` is no fault
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        hint = "use --device cpu, or a GPU with more free memory"
        print(f"error: {ClpError(str(error).splitlines()[0], where='the GPU', hint=hint)}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:  # a disk too full, a file taken away: not ours to foresee, but the user's to mend
        hint = "check the files and the free space on the disk"
        print(f"error: {ClpError(error.strerror or repr(error), where=error.filename, hint=hint)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; faults are the caller's to tell.

    Raises:
        ClpError: A fault the user can fix.
        SystemExit: Wrong usage, or --help.
    """
    from clp_ros.cli.parser import make_parser
    from clp_ros.core import processes
    from clp_ros.core.threads import using_threads

    options = make_parser().parse_args(arguments)
    output = getattr(options, "output", None)
    if output is not None and not output.name.strip("."):
        # "." has no name to make another of, and is no place to stand once the folder has been put in its place.
        options.output = output.resolve()
    if processes.world_size() > 1 and options.name != "calibrate":
        with processes.together():  # the first process alone prints it
            raise ClpError(
                "the command runs in one process",
                where=f"clp {options.name}",
                hint="start it without torchrun or accelerate",
            )
    with using_threads(getattr(options, "threads", 0)):
        options.call(options)
