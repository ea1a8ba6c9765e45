# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning node: its parameters, and a run over DDS."""

import yaml

from clp_ros.core.resources import resource_path
from clp_ros.nodes.finetuning import PARAMETERS


def test_the_parameter_file_says_what_the_node_declares() -> None:
    document = yaml.safe_load(resource_path("config/nodes/finetuning.yaml").read_text(encoding="utf-8"))
    assert document == {"/**": {"ros__parameters": {name: default for name, (default, _) in PARAMETERS.items()}}}
