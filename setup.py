# SPDX-License-Identifier: Apache-2.0
"""Build of clp_ros, by colcon (ament_python) and by pip alike. Name, version and the like stand in package.xml."""

from pathlib import Path
from xml.etree import ElementTree

from setuptools import find_packages, setup

# colcon, pip and their front ends all run this file in its own folder, and data_files must be relative to it.
MANIFEST = ElementTree.parse("package.xml").getroot()
NAME = MANIFEST.findtext("name")
MAINTAINER = MANIFEST.find("maintainer")


def data_files() -> list[tuple[str, list[str]]]:
    """What goes to share/: the resource marker, package.xml and every file under config/, launch/ and rosbags/."""
    share = Path("share", NAME)
    files = {"share/ament_index/resource_index/packages": [f"resource/{NAME}"], str(share): ["package.xml"]}
    for path in sorted(path for folder in ("config", "launch", "rosbags") for path in Path(folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
            files.setdefault(str(share / path.parent), []).append(str(path))
    return list(files.items())


setup(
    name=NAME,
    version=MANIFEST.findtext("version"),
    description=MANIFEST.findtext("description"),
    license=MANIFEST.findtext("license"),
    maintainer=MAINTAINER.text,
    maintainer_email=MAINTAINER.get("email"),
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={"": ["py.typed", "*.pyi", "*.jinja", "*.css"]},
    data_files=data_files(),
    python_requires=">=3.12",
    # The ranges it may work with; the requirements files pin the versions it is tested with, for either lerobot.
    install_requires=[
        "accelerate>=1.10,<2",
        "backports.zstd; python_version < '3.14'",
        "daqp>=0.8,<0.12",
        "huggingface_hub>=1.0,<2",
        "Jinja2>=3",
        "lazy_loader>=0.4,<1",
        "lerobot[pi,smolvla,training]>=0.5.1,<0.7",
        "matplotlib>=3.10",
        "mcap>=1.2,<2",
        "numpy>=2.0,<2.3",
        "opencv-python-headless>=4.9,<5",
        "packaging",
        "peft>=0.18,<1",
        "pydantic>=2",
        "PyYAML",
        "rich",
        "pyarrow>=14",
        "rosbags>=0.11,<0.12",
        "safetensors>=0.4.3",
        "scipy",
        "tokenizers",
        "torch>=2.7,<2.12",
        "tqdm",
        "transformers>=5.3,<5.6",
    ],
    # lerobot's own extra for GR00T without flash-attn (0.5 asks for it, nothing needs it) and decord, a video reader.
    extras_require={
        "groot": ["diffusers", "dm-tree", "peft", "timm"],
        "simulation": ["gym-aloha>=0.1.1,<0.2", "mujoco>=3.2"],
        # colcon test takes pytest where it stands here.
        "test": ["hypothesis", "pytest<9"],
    },
    # Not zipped: ROS and clp_ros.core.resources look for plain files.
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "clp = clp_ros.cli:main",
            "calibration = clp_ros.nodes.calibration:main",
            "conversion = clp_ros.nodes.conversion:main",
            "finetuning = clp_ros.nodes.finetuning:main",
            "pipeline = clp_ros.nodes.pipeline:main",
            "pruning = clp_ros.nodes.pruning:main",
            "policy = clp_ros.nodes.policy:main",
            "simulation = clp_ros.nodes.simulation:main",
        ],
        # Other distributions add families in the same group: doc/how-to/add-a-family.md.
        "clp_ros.policy_families": [
            f"{folder.parent.name} = {NAME}.policies.{folder.parent.name}.family:FAMILY"
            for folder in sorted(Path(NAME, "policies").glob("*/family.py"))
        ],
    },
)
