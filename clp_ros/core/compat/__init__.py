# SPDX-License-Identifier: Apache-2.0
"""Private names of other libraries that clp_ros uses, one file a library; ``clp_ros.nodes.compat`` has rclpy's.

A private name may change in any release of its library. Each one is used here only, with the reason why no public name
does the same; ``test/core/compat`` has a test a name, which fails first when the library changes. Code that needs one
imports the file inside a function, as it imports the library.
"""
