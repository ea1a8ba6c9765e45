# SPDX-License-Identifier: Apache-2.0
"""The ``clp`` command, with one sub-command for each job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from clp_ros.core.errors import ClpError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0: done; 1: an error that the user can fix, printed as one line on stderr; 2: wrong usage; 130: interrupted.
    """
    try:
        run(arguments)
        sys.stdout.flush()  # raises BrokenPipeError here if the reader has closed the pipe
    except ClpError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `clp inspect … | head` is not an error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, compared by name to avoid the import
            raise
        hint = "use --device cpu, or a GPU with more free memory"
        print(f"error: {ClpError(str(error).splitlines()[0], where='the GPU', hint=hint)}", file=sys.stderr)  # noqa: T201
        return 1
    except OSError as error:  # such as a full disk or a removed file
        hint = "check the files and the free space on the disk"
        print(f"error: {ClpError(error.strerror or repr(error), where=error.filename, hint=hint)}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command. The caller reports errors.

    Raises:
        ClpError: The user can fix the error.
        SystemExit: Wrong usage, or --help.
    """
    from clp_ros.cli.parser import make_parser
    from clp_ros.core import processes
    from clp_ros.core.threads import using_threads

    options = make_parser().parse_args(arguments)
    output = getattr(options, "output", None)
    if output is not None and not output.name.strip("."):
        # The output replaces the folder under its name. "." has no name, so the absolute path is used.
        options.output = output.resolve()
    if processes.world_size() > 1 and options.name not in ("calibrate", "finetune"):
        with processes.together():  # only the first process prints it
            raise ClpError(
                "the command runs in one process",
                where=f"clp {options.name}",
                hint="start it without torchrun or accelerate",
            )
    with using_threads(getattr(options, "threads", 0)):
        options.call(options)
