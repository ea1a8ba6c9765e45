# SPDX-License-Identifier: Apache-2.0
"""What ROS messages hold, without ROS: images and stamps."""
