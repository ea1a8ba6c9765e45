# SPDX-License-Identifier: Apache-2.0
"""What colcon and pip install, what package.xml and the requirements name, and the floors the code stands on."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import clp_ros

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "clp_ros"
PLUGIN = ROOT / "lerobot_policy_clp"
ENVIRONMENTS = ROOT / "lerobot_env_clp"
EXECUTABLES = {"clp", "calibration", "conversion", "finetuning", "pipeline", "pruning", "policy", "simulation"}

# Which rosdep key brings an import. ROS packages are their own key.
ROSDEP_KEYS = {
    "cv2": "python3-opencv",
    "huggingface_hub": "python3-huggingface-hub-pip",
    "jinja2": "python3-jinja2",
    "matplotlib": "python3-matplotlib",
    "numpy": "python3-numpy",
    "packaging": "python3-packaging",
    "scipy": "python3-scipy",
    "pydantic": "python3-pydantic",
    "rich": "python3-rich",
    "rosbags": "python3-rosbags-pip",
    "torch": "python3-pytorch-pip",
    "tqdm": "python3-tqdm",
    "transformers": "python3-transformers-pip",
    "yaml": "python3-yaml",
}
NO_ROSDEP_KEY = {
    "accelerate",
    "backports",
    "daqp",
    "lazy_loader",
    "lerobot",
    "mcap",
    "mujoco",
    "peft",
    "pyarrow",
    "safetensors",
    "tokenizers",
}
PYPI_NAMES = {"PIL": "pillow", "backports": "backports.zstd", "cv2": "opencv-python-headless", "yaml": "PyYAML"}
# Python 3.14's, where backports.zstd is not needed.
LATER_STANDARD_LIBRARY = {"compression"}
# Imported in ROS branches only, and not on PyPI.
NOT_ON_PYPI = {"cv_bridge", "launch", "launch_ros", "rosbag2_py", "rosidl_runtime_py"}

# doc/explanation/architecture.md: a file imports only from floors below its own, and inside its own folder.
FLOORS = {
    "core": 0,
    **dict.fromkeys(("bags", "messages", "checkpoints"), 1),
    **dict.fromkeys(("policies", "robots"), 2),
    **dict.fromkeys(("datasets", "control"), 3),
    **dict.fromkeys(("calibration", "simulation", "training"), 4),
    **dict.fromkeys(("evaluation", "pruning"), 5),
    "report": 6,
    "jobs": 7,
    "nodes": 8,
    "cli": 9,
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules that a file imports anywhere in it, absolute, and the line."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and PLUGIN in path.parents:
                continue  # its modules lie side by side
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            # "from clp_ros import errors" imports a module too.
            names = [f"clp_ros.{alias.name}" for alias in node.names] if node.module == "clp_ros" else [node.module]
            yield from ((name, node.lineno) for name in names)


def foreign_imports(*folders: Path) -> set[str]:
    """Top-level names of all imports that are neither the standard library's nor our own."""
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = {name.partition(".")[0] for path in files for name, _ in imports(path)}
    return found - set(sys.stdlib_module_names) - {"clp_ros", PLUGIN.name, ENVIRONMENTS.name, *LATER_STANDARD_LIBRARY}


def pins(*files: str) -> dict[str, str]:
    """Normalised name -> version of every requirement; each must be pinned, without a location."""
    found = {}
    for file in files:
        for line in (ROOT / file).read_text().splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"([A-Za-z0-9._-]+)(\[[a-z,]+\])?==([0-9][A-Za-z0-9.+]*)", line)
            assert match, f"{file}: not a pin: {line}"
            name = normalised(match[1])
            assert name not in found, f"{file}: {name} is pinned twice"
            found[name] = match[3]
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build writes into the checkout."""
    target = tmp_path_factory.mktemp("workspace") / "clp_ros"
    names = ["package.xml", "setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "resource"]
    for name in [*names, "clp_ros", "config", "launch", "rosbags", PLUGIN.name, ENVIRONMENTS.name]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return target


@pytest.fixture(scope="module")
def colcon() -> str:
    found = shutil.which("colcon", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found:
        pytest.skip("no colcon (it is in requirements-dev.txt)")
    return found


@pytest.fixture(scope="module")
def colcon_prefix(colcon: str, tree: Path) -> Path:
    run(colcon, "build", cwd=tree.parent)
    return tree.parent / "install" / "clp_ros"


@pytest.fixture(scope="module")
def pip_prefix(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("pip")
    # --no-deps, no build isolation: nothing is downloaded.
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--prefix", str(prefix))
    run(*pip, "--ignore-installed", str(tree), cwd=tree.parent)
    return prefix


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def site_packages(prefix: Path) -> Path:
    (found,) = prefix.glob("**/clp_ros/core/errors.py")
    return found.parents[2]


def environment(prefix: Path) -> dict[str, str]:
    """The environment in which an installation under ``prefix`` is used, and the checkout is not seen."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python_path = os.pathsep.join(filter(None, [str(site_packages(prefix)), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PATH": path, "PYTHONPATH": python_path}


def test_colcon_takes_it_for_ament_python(colcon: str, tree: Path) -> None:
    # An invalid package.xml is built as plain Python without a word.
    assert run(colcon, "list", "--base-paths", str(tree), cwd=tree.parent).split() == [
        "clp_ros",
        str(tree),
        "(ros.ament_python)",
    ]


@pytest.mark.parametrize("kind", ["colcon", "pip"])
def test_everything_is_installed(kind: str, tree: Path, request: pytest.FixtureRequest) -> None:
    prefix = request.getfixturevalue(f"{kind}_prefix")
    share = prefix / "share"
    assert (share / "ament_index" / "resource_index" / "packages" / "clp_ros").is_file()
    assert (share / "clp_ros" / "package.xml").is_file()
    for folder in ("config", "launch", "rosbags"):
        expected = {path.relative_to(tree) for path in (tree / folder).rglob("*") if path.is_file()}
        assert expected <= {path.relative_to(share / "clp_ros") for path in (share / "clp_ros").rglob("*")}
    for folder in ("dds", "embodiments", "nodes", "tasks"):
        assert any((share / "clp_ros" / "config" / folder).iterdir())
    modules = {
        path.relative_to(tree) for path in (tree / "clp_ros").rglob("*.py*") if path.parent.name != "__pycache__"
    }
    assert modules == {
        path.relative_to(site_packages(prefix))
        for path in site_packages(prefix).rglob("clp_ros/**/*.py*")
        if path.parent.name != "__pycache__"
    }
    programs = prefix / ("lib/clp_ros" if kind == "colcon" else "bin")
    assert {path.name for path in programs.iterdir()} == EXECUTABLES
    assert all(os.access(path, os.X_OK) for path in programs.iterdir())


@pytest.mark.parametrize("kind", ["colcon", "pip"])
def test_an_installation_finds_its_own_files(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prefix = request.getfixturevalue(f"{kind}_prefix")
    code = "from clp_ros.core.resources import resource_path; print(resource_path('config/embodiments'))"
    found = run(sys.executable, "-c", code, cwd=tmp_path, env=environment(prefix))
    assert found.strip() == str(prefix / "share" / "clp_ros" / "config" / "embodiments")


def test_the_checkout_comes_before_any_installation() -> None:
    from clp_ros.core.resources import resource_path

    assert resource_path("config/embodiments") == ROOT / "config" / "embodiments"


def test_what_is_not_shipped_is_an_error_of_the_users() -> None:
    from clp_ros.core.errors import ClpError
    from clp_ros.core.resources import resource_path

    with pytest.raises(ClpError, match="config/embodiments/no_such_robot"):
        resource_path("config/embodiments/no_such_robot.yaml")


@pytest.mark.parametrize("kind", ["colcon", "pip"])
def test_the_installed_command_runs(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prefix = request.getfixturevalue(f"{kind}_prefix")
    clp = prefix / ("lib/clp_ros/clp" if kind == "colcon" else "bin/clp")
    assert "usage: clp" in run(str(clp), "--help", cwd=tmp_path, env=environment(prefix))


def test_every_executable_has_its_function(colcon_prefix: Path) -> None:
    (entry_points,) = colcon_prefix.glob("**/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    scripts = dict(parser["console_scripts"])
    assert set(scripts) == EXECUTABLES
    for script in scripts.values():
        module, _, function = script.partition(":")
        source = ROOT / f"{module.strip().replace('.', '/')}.py"
        source = source if source.exists() else source.with_suffix("") / "__init__.py"
        functions = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert function.strip() in functions, script


def test_one_version() -> None:
    assert manifest().findtext("version") == clp_ros.__version__
    assert f"\n{clp_ros.__version__} (" in (ROOT / "CHANGELOG.rst").read_text()


def test_package_xml_names_every_import() -> None:
    named = {element.text for element in manifest() if element.tag in ("depend", "exec_depend")}
    wanted = foreign_imports(PACKAGE, ROOT / "launch") - NO_ROSDEP_KEY
    assert {ROSDEP_KEYS.get(name, name) for name in wanted} <= named


def test_requirements_pin_every_import() -> None:
    pinned = pins("requirements.txt", "requirements-ros.txt", "requirements-simulation.txt")
    for name in foreign_imports(PACKAGE, ROOT / "launch") - NOT_ON_PYPI:
        assert {normalised(PYPI_NAMES.get(name, name)), f"ros-{normalised(name)}"} & set(pinned), name


def test_the_plugin_is_a_distribution_of_its_own() -> None:
    # Whoever trains on a cluster installs it beside lerobot, and nothing of ours.
    found = {name for path in PLUGIN.rglob("*.py") for name, _ in imports(path)}
    assert not [name for name in found if name.partition(".")[0] == "clp_ros"]
    wanted = {normalised(PYPI_NAMES.get(name, name)) for name in foreign_imports(PLUGIN)}
    assert wanted <= pins("requirements.txt", "constraints.txt").keys()


def test_the_environments_are_a_distribution_of_their_own() -> None:
    """It needs clp_ros, lerobot and what these bring. lerobot imports it by its name."""
    wanted = {normalised(PYPI_NAMES.get(name, name)) for name in foreign_imports(ENVIRONMENTS)}
    assert wanted <= pins("requirements.txt", "constraints.txt").keys()
    assert (ENVIRONMENTS / "COLCON_IGNORE").exists()
    text = (ENVIRONMENTS / "pyproject.toml").read_text()
    assert f'name = "{ENVIRONMENTS.name}"' in text


# What the Makefile installs together.
LEROBOT_05 = ("requirements-lerobot-0.5.txt", "constraints-lerobot-0.5.txt", "requirements-no-deps.txt")
LEROBOT_06 = (
    "requirements.txt",
    "requirements-ros.txt",
    "requirements-dev.txt",
    "requirements-simulation.txt",
    "requirements-no-deps.txt",
    "constraints.txt",
)


@pytest.mark.parametrize("files", [LEROBOT_05, LEROBOT_06])
def test_every_version_is_pinned_once(files: tuple[str, ...]) -> None:
    assert len(pins(*files)) > 130


# What the how-to page about LIBERO installs, in an environment of its own.
LIBERO = ("requirements-libero.txt", "requirements-libero-assets.txt")


def test_every_requirements_file_is_installed() -> None:
    assert {path.name for path in ROOT.glob("*.txt")} == {*LEROBOT_05, *LEROBOT_06, *LIBERO}
    page = (ROOT / "doc" / "how-to" / "libero.md").read_text()
    assert all(name in page for name in LIBERO)


def test_the_environments_differ_by_lerobot_and_what_it_asks_for_only() -> None:
    older, newer = pins(LEROBOT_05[0]), pins("requirements.txt", "requirements-dev.txt")
    differing = {name for name in older.keys() & newer.keys() if older[name] != newer[name]}
    assert differing == {"lerobot", "torch", "torchvision", "transformers"}
    assert pins("requirements.txt").keys() <= older.keys()
    assert older["lerobot"].startswith("0.5.")


def test_every_room_stands_on_a_floor() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FLOORS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "moved_modules.py"}


def test_files_import_from_lower_floors_only() -> None:
    wrong = []
    for path in sources():
        own = path.relative_to(PACKAGE).parts[0]
        for module, line in imports(path):
            name, *rest = module.split(".")
            other = rest[0] if rest else ""
            # clp_ros itself holds its version, and names of all rooms, which are imported when they are asked for.
            if name != "clp_ros" or other in (own, "", "__version__") or path.parent == PACKAGE:
                continue
            assert other in FLOORS, f"{path}:{line}: {module} stands on no floor"
            if FLOORS[other] >= FLOORS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong


def test_ros_stays_on_the_roof() -> None:
    ros = {element.text for element in manifest() if element.tag == "exec_depend"} - set(ROSDEP_KEYS.values())
    ros -= {"ament_index_python"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in sources()
        if path.parent not in (PACKAGE / "nodes", PACKAGE / "bags", PACKAGE / "messages")
        for module, line in imports(path)
        if module.partition(".")[0] in ros
    ]
    assert not wrong


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """The Makefile with the files its set-up depends on, and no environment."""
    if not shutil.which("make"):
        pytest.skip("no make")
    for folder in (PLUGIN.name, ENVIRONMENTS.name):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / "pyproject.toml", tmp_path / folder)
    for path in [ROOT / "Makefile", ROOT / "package.xml", *ROOT.glob("setup.*"), *ROOT.glob("*.txt")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("ROS_DISTRO", "MAKEFLAGS")} | variables
    return subprocess.run(
        ["make", "-C", str(folder), *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("target", "ready", "requirements"),
    [
        ("setup", ".venv/.ready-wheels", "requirements-dev.txt"),
        ("setup-lerobot-0.5", ".venv-lerobot-0.5/.ready", "requirements-lerobot-0.5.txt"),
    ],
)
def test_make_sets_up_once_and_again_when_requirements_change(
    makefile: Path, target: str, ready: str, requirements: str
) -> None:
    assert make(makefile, "-q", target).returncode == 1
    made = makefile / ready
    made.parent.mkdir()
    made.touch()
    assert make(makefile, "-q", target).returncode == 0
    for file in (
        requirements,
        "requirements-no-deps.txt",
        "lerobot_policy_clp/pyproject.toml",
        "lerobot_env_clp/pyproject.toml",
    ):
        os.utime(makefile / file, (made.stat().st_mtime + 10,) * 2)
        assert make(makefile, "-q", target).returncode == 1
        os.utime(makefile / file, (made.stat().st_mtime - 10,) * 2)


def test_lerobot_05_needs_no_ros(makefile: Path) -> None:
    for ros in ({}, {"ROS_DISTRO": "jazzy"}):
        commands = make(makefile, "-n", "test-lerobot-0.5", PYTHON="python3", **ros).stdout
        assert "-r requirements-lerobot-0.5.txt -c constraints-lerobot-0.5.txt" in commands
        assert "-e lerobot_policy_clp -e lerobot_env_clp" in commands
        assert "requirements-ros.txt" not in commands
        assert "--system-site-packages" not in commands


def test_the_tests_that_run_with_lerobot_05_are_there(makefile: Path) -> None:
    commands = make(makefile, "-n", "test-lerobot-0.5", PYTHON="python3").stdout
    (named,) = re.findall(r"-m pytest (.+)", commands)
    named = [word for word in named.split() if word.startswith("test")]
    assert len(named) > 2
    assert all((ROOT / name).exists() for name in named)


def test_make_takes_a_sourced_ros_instead_of_the_wheels(makefile: Path) -> None:
    alone, sourced = (
        make(makefile, "-n", "setup", PYTHON="python3", **ros).stdout for ros in ({}, {"ROS_DISTRO": "jazzy"})
    )
    assert "-r requirements-ros.txt" in alone
    assert "-r requirements-ros.txt" not in sourced
    assert "--system-site-packages" in sourced
    # An environment made for the one is not taken for the other.
    (makefile / ".venv").mkdir()
    (makefile / ".venv" / ".ready-wheels").touch()
    assert make(makefile, "-q", "setup", ROS_DISTRO="jazzy").returncode == 1


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (0, 5), (2, 0)])
def test_make_test_runs_both_halves_and_fails_if_either_does(makefile: Path, codes: tuple[int, int]) -> None:
    python = makefile / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"""#!/bin/sh
echo "ran: $*"
case "$*" in *"not real_time"*) exit {codes[0]};; esac
exit {codes[1]}
""")
    python.chmod(0o755)
    (makefile / ".venv" / ".ready-wheels").touch()
    result = make(makefile, "test")
    assert result.stdout.count("ran: -m pytest") == 2
    assert (result.returncode == 0) == (codes == (0, 0))
    assert [f"exit code {code}" in result.stderr for code in codes if code] == [True for code in codes if code]


WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def workflow_commands() -> str:
    """All that the jobs of the public CI run, with each matrix's targets in place of ``matrix.target``."""
    commands = []
    for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values():
        targets = " ".join(job.get("strategy", {}).get("matrix", {}).get("target", []))
        commands += [step["run"].replace("${{ matrix.target }}", targets) for step in job["steps"] if "run" in step]
    return "\n".join(commands).replace("\\\n", " ")


def test_the_public_ci_makes_targets_that_are_there(makefile: Path) -> None:
    lines = [line for line in workflow_commands().splitlines() if line.strip().startswith("make ")]
    words = {word for line in lines for word in line.replace("-C src/clp_ros", "").split()[1:]} - {"--keep-going"}
    assert words == {"setup", "lint", "test", "test-lerobot-0.5"}
    for target in words:
        assert make(makefile, "-n", target, PYTHON="python3").returncode == 0, target


def test_the_public_ci_names_paths_that_are_there() -> None:
    paths = set(re.findall(r"src/clp_ros/([\w./*-]+)", workflow_commands())) - {".venv/bin/activate"}
    paths |= set(re.findall(r"\btest/\w+\.py", workflow_commands()))
    assert len(paths) >= 2
    assert all(list(ROOT.glob(path)) for path in paths)


def test_rosdep_skips_what_the_requirements_bring() -> None:
    # On Ubuntu 24.04 pip refuses to install into the system's Python.
    from_pypi = {element.text for element in manifest() if element.text.endswith("-pip")}
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for text in (readme, workflow_commands()):
        (skipped,) = re.findall(r'rosdep install [^"\n]*--skip-keys "([^"]+)"', text)
        assert set(skipped.split()) == from_pypi


def test_every_key_is_one_that_rosdep_resolves() -> None:
    # colcon knows the build type by <export>; rosdep has no key for it and would end with an error.
    assert "ament_python" not in {element.text for element in manifest()}
    assert manifest().findtext("export/build_type") == "ament_python"


def test_colcon_test_runs_pytest(colcon: str, colcon_prefix: Path, tree: Path) -> None:
    # Without a requirement named pytest in setup.py colcon runs unittest, which finds nothing.
    (tree / "test").mkdir()
    (tree / "test" / "test_one.py").write_text("def test_one():\n    pass\n")
    arguments = ("--event-handlers", "console_direct+", "--return-code-on-test-failure")
    assert "1 passed" in run(colcon, "test", *arguments, cwd=tree.parent)


@pytest.mark.parametrize("has_idle_scheduling", [True, False])
def test_ci_runs_every_part_whatever_fails(tmp_path: Path, has_idle_scheduling: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    chrt = tmp_path / "bin" / "chrt"
    chrt.parent.mkdir()
    chrt.write_text('#!/bin/sh\nshift 2\nexec "$@"\n' if has_idle_scheduling else "#!/bin/sh\nexit 1\n")
    chrt.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    env["PATH"] = f"{chrt.parent}:{env['PATH']}"
    targets = "setup", "setup-lerobot-0.5", "lint", "test-parallel", "test-real-time", "test-lerobot-0.5"
    for failing in (*targets, None):
        rules = "\n".join(f"{name}:\n\t@echo ran {name}; exit {int(name == failing)}" for name in targets)
        (tmp_path / "Makefile").write_text(rules + "\n")
        result = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, check=False)
        ran = [line.removeprefix("ran ") for line in result.stdout.splitlines() if line.startswith("ran ")]
        assert (sorted(ran[:2]), ran[2:]) == (sorted(targets[:2]), list(targets[2:]))  # the first two at the same time
        assert (result.returncode == 0) == (failing is None)


def test_what_is_slow_runs_in_test_all_only(makefile: Path) -> None:
    for target in ("test", "test-lerobot-0.5"):
        commands = make(makefile, "-n", target, PYTHON="python3").stdout
        assert commands.count("-m pytest") == commands.count("and not slow") > 0
    commands = make(makefile, "-n", "test-all", PYTHON="python3").stdout
    assert commands.count("-m pytest") == 3
    assert "not slow" not in commands


def test_make_says_what_is_missing(makefile: Path) -> None:
    result = make(makefile, "setup", "PYTHON=")
    assert result.returncode != 0
    assert "error: no Python 3.12" in result.stderr
    assert not (makefile / ".venv").exists()


def names_in(path: Path) -> Iterator[tuple[str, int]]:
    """Every name, attribute and string of a file that is code, not prose: no comments and no docstrings."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value, node.lineno
        elif isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
    yield from imports(path)


# What may name a family: the old import paths, the demo's choice of a policy, and what only LeRobot's code names so.
NAME_FAMILIES = {"moved_modules.py", "jobs/demo.py", "core/compat/lerobot.py"}


def test_nothing_but_its_folder_names_a_family() -> None:
    """Its folder of clp_ros/policies, that is, and its files of the plugin."""
    families = sorted(path.parent for path in PACKAGE.glob("policies/*/family.py"))
    assert len(families) >= 5
    word = re.compile(rf"(?<![a-z])({'|'.join(folder.name for folder in families)})(?![a-z])", re.IGNORECASE)
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name!r}"
        for path in sources()
        if path.parent not in families and str(path.relative_to(PACKAGE)) not in NAME_FAMILIES
        for name, line in names_in(path)
        if word.search(name)
    ]
    assert not found


def test_every_family_is_registered(colcon_prefix: Path) -> None:
    (entry_points,) = colcon_prefix.glob("**/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entry_points)
    names = [path.parent.name for path in PACKAGE.glob("policies/*/family.py")]
    assert dict(parser["clp_ros.policy_families"]) == {name: f"clp_ros.policies.{name}.family:FAMILY" for name in names}
