# SPDX-License-Identifier: Apache-2.0
"""What the pages promise is there: links, commands, launch files, parameters, YAML and keys."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from clp_ros.cli import main
from clp_ros.cli.parser import make_parser
from clp_ros.robots.embodiment import load_embodiment
from clp_ros.robots.task import load_task, read_task

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "doc" / "README.md"
MEASUREMENTS = ROOT / "doc" / "reference" / "measurements" / "README.md"
PAGES = [
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "rosbags/README.md",
            "checkpoints/README.md",
            "lerobot_policy_clp/README.md",
            "lerobot_env_clp/README.md",
        )
    ),
    *sorted(ROOT.glob("doc/**/*.md")),
]
NODES = ("calibration", "finetuning", "pruning", "policy")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def links(text: str) -> list[str]:
    return re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", without_code(re.sub(r"\[`([^`]*)`\]", r"[\1]", text)))


def anchors(text: str) -> set[str]:
    """The anchors a Markdown page gets from its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[list[str]]:
    """Every command of a page's shell blocks, as words; comments and heredocs left out."""
    found = []
    for block in blocks(text, "(?:bash|sh)"):
        block = re.sub(r"<<'?(\w+)'?.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", ";", "|", "&")), len(words))
                found.append(words[:end])
                words = words[end + 1 :]
    return [words for words in found if words]


def clp_command(words: list[str]) -> list[str] | None:
    if words[0] == "clp":
        return words[1:]
    if words[0] == "torchrun" and "clp_ros.cli" in words:
        return words[words.index("clp_ros.cli") + 1 :]
    return words[4:] if words[:4] == ["ros2", "run", "clp_ros", "clp"] else None


@cache
def sub_parsers() -> dict[str, set[str]]:
    """The options of every sub-command."""
    commands = next(action for action in make_parser()._actions if action.choices)
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


@cache
def launch_arguments(path: Path) -> set[str]:
    """The arguments of a launch file, by reading it and what it is built of: launch need not be installed.

    Names that are passed by position or keyword to the shared descriptions, and those of DeclareLaunchArgument; a
    robot's topics by its YAML.
    """
    names: set[str] = set()
    shared = {"node_description": "launch_node.py", "job_description": "launch_job.py", "_description": ""}
    built = {"policy_description", "embodiment_description", "task_description"}
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        function = call.func.id if isinstance(call.func, ast.Name) else ""
        texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        if function == "DeclareLaunchArgument":
            names |= set(texts[:1]) - {"object"}
        elif function in shared:
            given = texts if function == "_description" else texts[1:]  # the first is the node's name
            names |= set(given) | {keyword.arg for keyword in call.keywords if keyword.arg}
            names |= launch_arguments(ROOT / "clp_ros" / "nodes" / shared[function]) if shared[function] else set()
        elif function in built:
            names |= launch_arguments(ROOT / "clp_ros" / "nodes" / "launch_policy.py")
            if function == "task_description":
                task = read_task(texts[0])
                names |= topic_arguments(task.embodiment) | ({"object"} if task.objects else set())
            elif function == "embodiment_description":
                names |= topic_arguments(texts[0])
    return names


def topic_arguments(embodiment: str) -> set[str]:
    robot = load_embodiment(embodiment)
    states = [f"{name}_{what}_topic" for name in robot.joint_states for what in ("joint_states", "robot_description")]
    return (
        {f"{name}_topic" for name in robot.cameras}
        | {f"{name}_controller_topic" for name in robot.controllers}
        | {*states, *(["speed_scaling_topic"] if robot.speed_scaling else [])}
    )


@cache
def node_parameters(node: str) -> dict[str, object]:
    """Parameters and defaults by the node's code: the PARAMETERS of its module or its settings', read without rclpy."""
    modules = (ROOT / "clp_ros" / "nodes" / f"{name}.py" for name in (node, f"{node}_settings"))
    for statement in (each for module in modules if module.exists() for each in ast.parse(module.read_text()).body):
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == "PARAMETERS":
            return {name: default for name, (default, _) in ast.literal_eval(statement.value).items()}
    raise AssertionError(f"{node}.py has no PARAMETERS")


def table(text: str, first_heading: str) -> dict[str, list[str]]:
    """A Markdown table by the code in its first column; a cell that names several things gives several rows."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for name in re.findall(r"`([^`]+)`", cells[0]):
            rows[name] = cells[1:]
    return rows


@every_page
def test_style(page: Path) -> None:
    """One sentence a line, no line over 220 characters, no paragraph in a table cell."""
    previous = ""
    for line in without_blocks(page.read_text()).splitlines():
        if line.startswith("|"):
            long = [cell for cell in line.strip("|").split(" | ") if len(cell) > 160]
            assert not long, f"a table cell of more than 160 characters: {long}"
            previous = ""
            continue
        assert len(line) <= 220, f"more than 220 characters: {line}"
        text = line.strip()
        if text.startswith(("#", "!", "<")):
            previous = ""
            continue
        item = re.match(r"([-*]|\d+\.) ", text)
        if previous and text and not item:
            assert re.search(r"[.:!?][*)]*$", previous), f"a sentence goes on in the next line: {previous}"
        sentences = re.sub(r"`[^`]*`|\]\([^)]*\)", "x", re.sub(r"^([-*]|\d+\.) |\*\*[^*]+[.:?]\*\* ", "", text))
        assert not re.search(r"[\w)][.!?]\*{0,2} +[A-Z\[]", sentences), f"more than one sentence: {line}"
        previous = text


@every_page
def test_paths_and_names_in_the_text_exist(page: Path) -> None:
    folders = "|".join(
        ("clp_ros", "doc", "config", "launch", "test", "benchmarks", "rosbags", "lerobot_policy_clp", "lerobot_env_clp")
    )
    for code in re.findall(r"`([^`\n]+)`", without_blocks(page.read_text())):
        if re.fullmatch(rf"({folders})/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(r"clp_ros(\.\w+)+", code):
            assert is_defined(code), code


def test_pages_that_the_code_names_exist() -> None:
    sources = [path for folder in ("clp_ros", "config", "launch", "benchmarks") for path in (ROOT / folder).rglob("*")]
    for path in (path for path in sources if path.suffix in (".py", ".yaml", ".xml")):
        for name in re.findall(r"(?<![\w/])[\w/-]+\.md", path.read_text()):
            assert name.startswith("benchmarks/pages/") or (ROOT / name).is_file(), f"{path}: {name}"


def is_defined(name: str) -> bool:
    """Whether a dotted name of clp_ros is a module, or something that its module defines."""
    path, parts = ROOT, name.split(".")
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path /= f"{parts.pop(0)}.py"
    source = path / "__init__.py" if path.is_dir() else path
    return (
        not parts
        or re.search(rf"^(class|def) {parts[0]}\b|^{parts[0]}\b", source.read_text(), re.MULTILINE) is not None
    )


def test_the_floors_of_the_architecture_are_those_tested() -> None:
    tree = ast.parse((ROOT / "test" / "test_packaging.py").read_text())
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS")
    floors = eval(compile(ast.Expression(value), "FLOORS", "eval"))
    text = (ROOT / "doc" / "explanation" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    assert {room: int(floor) for floor, room in rows} == floors


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_the_index() -> None:
    assert INDEX in {(ROOT / link).resolve() for link in links((ROOT / "README.md").read_text())}
    indexes = [INDEX, MEASUREMENTS]
    linked = {(index.parent / link).resolve() for index in indexes for link in links(index.read_text())}
    assert set(PAGES) - {ROOT / "README.md", INDEX} <= linked


@every_page
def test_commands_parse(page: Path) -> None:
    for words in command_lines(page.read_text()):
        if (arguments := clp_command(words)) is None:
            continue
        try:
            make_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"clp does not take: {shlex.join(words)}")


@every_page
def test_commands_in_the_text_exist(page: Path) -> None:
    options = set().union(*sub_parsers().values())
    if page.parent == MEASUREMENTS.parent:
        options |= {
            one for file in ROOT.glob("benchmarks/*.py") for one in re.findall(r'"(--[a-z-]+)"', file.read_text())
        }
    text = without_blocks(page.read_text())
    for code in re.findall(r"`([^`]+)`", text):
        words = code.split()
        if words[0] == "clp" and len(words) > 1:
            assert words[1] in sub_parsers(), code
            wanted = sub_parsers()[words[1]]
        elif words[0].startswith("--") and "=" not in words[0] and not words[0].startswith(("--policy", "--env")):
            wanted = options
        else:
            continue
        unknown = {word for word in words if word.startswith("--")} - wanted
        # Options of other programs, where the text says whose they are.
        others = {"--clock", "--show-args", "--loop", "--rate", "--camera-rate", "--seconds", "--rename_map"}
        assert not unknown - others, code


@every_page
def test_launch_files_and_arguments_exist(page: Path) -> None:
    for words in command_lines(page.read_text()):
        if words[:3] != ["ros2", "launch", "clp_ros"]:
            continue
        path = ROOT / "launch" / words[3]
        assert path.is_file(), words[3]
        given = {word.partition(":=")[0] for word in words[4:] if ":=" in word}
        assert given <= launch_arguments(path), f"{words[3]} has no argument {given - launch_arguments(path)}"


def code_words(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", re.sub(r"\([^)]*\)", "", cell)))


def test_launch_files_of_the_reference_are_those_there() -> None:
    text = (ROOT / "doc" / "reference" / "launch-files.md").read_text()
    rows, robots, states = table(text, "file"), table(text, "robot"), table(text, "robot's states")
    tasks = {file: robot for robot, cells in robots.items() for file in re.findall(r"`(\w+\.launch\.py)`", cells[-1])}
    assert {*rows, *robots, *tasks} == {path.name for path in ROOT.glob("launch/*.launch.py")}
    assert len(tasks) == len(list(ROOT.glob("config/tasks/*.yaml")))
    common = {"params_file", "namespace", "log_level"}
    for name, cells in rows.items():
        assert set().union(*map(code_words, cells)) == launch_arguments(ROOT / "launch" / name) - common, name
    policy = launch_arguments(ROOT / "launch" / "policy.launch.py")
    for name, (*topics, _) in robots.items():
        arguments = set().union(*map(code_words, topics + states[name]))
        assert arguments == launch_arguments(ROOT / "launch" / name) - policy, name
    for name, robot in tasks.items():
        assert read_task(name.removesuffix(".launch.py")).embodiment == robot.removesuffix(".launch.py")


@pytest.mark.parametrize("node", NODES)
def test_parameters_of_the_reference_are_those_there(node: str) -> None:
    rows = table((ROOT / "doc" / "reference" / f"{node}-node.md").read_text(), "parameter")
    parameters = node_parameters(node)
    assert set(rows) == set(parameters)
    for name, (default, *_) in rows.items():
        assert yaml.safe_load(default.strip("`")) == parameters[name], name


@pytest.mark.parametrize("node", NODES)
def test_parameter_files_hold_the_defaults(node: str) -> None:
    document = yaml.safe_load((ROOT / "config" / "nodes" / f"{node}.yaml").read_text())
    assert document["/**"]["ros__parameters"] == node_parameters(node)


@pytest.mark.parametrize("page", ["reference/embodiment", "tutorial/bag-to-pruned-checkpoint"])
def test_yaml_is_what_the_loaders_take(page: str, tmp_path: Path) -> None:
    embodiment, *rest = blocks((ROOT / "doc" / f"{page}.md").read_text(), "yaml")
    actions = [block for block in rest if block.startswith("actions:")]
    tasks = [block for block in rest if block not in actions]
    (tmp_path / "robot.yaml").write_text(embodiment)
    robot = load_embodiment(tmp_path / "robot.yaml")
    assert robot.name == "my_robot"
    for block in actions:
        (tmp_path / "commanded.yaml").write_text(embodiment + block)
        commanded = load_embodiment(tmp_path / "commanded.yaml").actions.topics.values()
        assert {entry.type.split("/")[-1] for entry in commanded} == {"JointState", "Float64MultiArray"}
    for task in tasks:
        (tmp_path / "task.yaml").write_text(task)
        assert load_task(tmp_path / "task.yaml", robot).embodiment == "my_robot"


def test_every_key_of_an_embodiment_and_a_task_is_explained() -> None:
    from clp_ros.robots.actions import ActionJoint, Actions, ActionTopic
    from clp_ros.robots.embodiment import Camera, Controller, Embodiment, Joint, JointStates, Sync
    from clp_ros.robots.task import Task

    text = (ROOT / "doc" / "reference" / "embodiment.md").read_text()
    explained = {name.split(".")[-1].split(": ")[-1] for name in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
                 for name in re.findall(r"`([^`]+)`", name)}  # fmt: skip
    for schema in (Embodiment, Camera, JointStates, Controller, Joint, Sync, Task, Actions, ActionTopic, ActionJoint):
        assert set(schema.model_fields) <= explained, schema.__name__


def test_every_command_is_in_the_reference() -> None:
    rows = table((ROOT / "doc" / "reference" / "command-line.md").read_text(), "command")
    assert {name.removeprefix("clp ") for name in rows} == set(sub_parsers())


def test_every_exported_name_is_in_the_reference() -> None:
    import clp_ros

    assert set(table((ROOT / "doc" / "reference" / "python.md").read_text(), "name")) == set(clp_ros.__all__)


def test_the_examples_in_python_run(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").symlink_to(tiny_checkpoint)
    (tmp_path / "rosbags").symlink_to(ROOT / "rosbags")
    monkeypatch.chdir(tmp_path)
    page = ROOT / "doc" / "reference" / "python.md"
    for program in blocks(page.read_text(), "python"):
        exec(compile(program, page.name, "exec"), {})
    assert (tmp_path / "pruned" / "clp.json").is_file()


def test_the_errors_of_the_tutorial_are_those_printed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (ROOT / "doc" / "tutorial" / "bag-to-pruned-checkpoint.md").read_text()
    reported = re.findall(r"^```\n(error: .*)\n```$", text, re.MULTILINE)
    robot = blocks(text, "yaml")[0].replace("feature:", "featur:", 1)
    (tmp_path / "my_robot.yaml").write_text(robot)
    bag, task = str(ROOT / "rosbags" / "aloha_bimanual"), "Pick up the cube."
    checkpoint = ["--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "output")]
    embodiment = ["--embodiment", str(tmp_path / "my_robot.yaml")]
    for line, command in zip(
        reported,
        (
            ["calibrate", *checkpoint, "--bag", bag, *embodiment, "--task", task],
            ["prune", *checkpoint, "--remove", "vlm=5"],
        ),
        strict=True,
    ):
        assert main(command) == 1
        printed = capsys.readouterr().err.strip().replace(str(tmp_path), "/tmp/my_robot")
        assert printed == line
