# SPDX-License-Identifier: Apache-2.0
"""Finds config/, launch/ and rosbags/ in the source tree, or under share/ of the installation's prefix."""

from pathlib import Path

from clp_ros.core.errors import ClpError


def resource_path(relative: str | Path) -> Path:
    """Finds a file or folder that clp_ros ships, as ``config/embodiments`` or ``rosbags/aloha_bimanual``.

    The source tree comes first (a checkout, ``pip install -e``, ``colcon build --symlink-install``), then
    ``share/clp_ros`` of the prefix that this package is installed under (colcon's install space, a virtual environment,
    a distribution's package), so neither ROS nor its environment variables are needed to find it.

    Args:
        relative: Path relative to the repository's root.

    Returns:
        An absolute path that exists.

    Raises:
        ClpError: The file is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    roots = [package.parent] if (package.parent / "package.xml").is_file() else []
    # Some systems put packages under <prefix>/local/lib: look up from the package instead of counting levels.
    roots += [parent / "share" / "clp_ros" for parent in package.parents]
    for root in roots:
        if (path := root / relative).exists():
            return path
    raise ClpError(
        f"the installed package has no {relative}",
        where=package,
        hint="give a path of your own, or install clp_ros again",
    )
