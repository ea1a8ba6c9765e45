# SPDX-License-Identifier: Apache-2.0
"""The command line as its users have it: processes of their own, exit codes, what stands on stdout and stderr."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_processes
from safetensors.numpy import save_file

from clp_ros import cli
from clp_ros.policies.registry import family_of

ROOT = Path(__file__).resolve().parents[1]
# Nothing about threads: their number decides the last bits, and the fixture calibrates in this process.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def clp(*arguments, cwd=None, command=("-m", "clp_ros.cli"), is_warm=True):
    """Runs a command; where a test is about what it imports or prints meanwhile, in an interpreter that is not warm."""
    words = [*command, *map(str, arguments)]
    if is_warm:
        done = warm_processes.run(words, ENVIRONMENT, cwd)
    else:
        done = subprocess.run(
            [sys.executable, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
        )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def succeeds(*arguments, **options) -> str:
    done = clp(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def prints_json(*arguments, **options):
    (line,) = succeeds(*arguments, "--json", **options).splitlines()
    return json.loads(line, parse_constant=pytest.fail)


def fails(*arguments, **options) -> str:
    """The one line of a fault that the user can fix."""
    done = clp(*arguments, **options)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def misused(*arguments, **options) -> str:
    done = clp(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: clp")
    return done.stderr


@pytest.fixture
def there(tiny_checkpoint, tiny_calibration, tmp_path) -> Path:
    """A folder with a hard name: a calibration in it, and a link to its checkpoint."""
    folder = tmp_path / "it's [my] folder"
    folder.mkdir()
    (folder / "base").symlink_to(tiny_checkpoint)
    (folder / "calibration").symlink_to(tiny_calibration)
    return folder


def test_calibrate_prune_verify_benchmark(there, tiny_calibration, recording):
    arguments = ["--checkpoint", "base", "--bag", recording, "--embodiment", "aloha_bimanual"]
    arguments += ["--task", "transfer_cube", "--samples", "4", "--device", "cpu"]
    printed = succeeds("calibrate", *arguments, "--output", "my calibration", cwd=there, is_warm=False)
    # The same inputs and seed in another process, to the byte.
    assert (there / "my calibration" / "cka.npz").read_bytes() == (tiny_calibration / "cka.npz").read_bytes()
    lines = printed.splitlines()
    assert lines[-2] == "4 frames of 1 episode, heatmaps and report.html in my calibration"
    command = shlex.split(lines[-1].removeprefix("next: "))
    assert command[:2] == ["clp", "prune"]

    dry = prints_json(*command[1:], "--dry-run", cwd=there)
    assert not (there / "my calibration_pruned").exists()
    pruned = prints_json(*command[1:], cwd=there)
    differing = {"output": None, "dry_run": True, "unchecked": "nothing is written in a dry run"}
    assert dry == pruned | differing
    assert (pruned["dry_run"], pruned["unchecked"]) == (False, None)
    assert pruned["layers"] == {"vlm": 10, "expert": 10}
    layers = pruned["units"]["vlm"]["layers"]
    assert (layers["removed"], len(layers["kept"])) == (pruned["removed"]["vlm"], 10)
    assert sorted(layers["removed"] + layers["kept"]) == list(range(16))
    assert pruned["output"] == str(there / "my calibration_pruned")
    found = prints_json("verify", "my calibration_pruned", cwd=there)
    assert (found["pruned"], found["source"], found["chunk"]) == (True, "unchanged", [50, 14])
    assert found["parameters"] == pruned["parameters"]["after"]
    quick = ["--runs", "1", "--no-train-step", "--threads", "2"]
    result = prints_json("benchmark", "base", "my calibration_pruned", *quick, cwd=there)
    assert [each["threads"] for each in result["checkpoints"]] == [2, 2]
    assert [each["parameters"] for each in result["checkpoints"]] == [
        pruned["parameters"][k] for k in ("before", "after")
    ]
    assert result["ratios"][1]["gflops"] > 1
    assert fails("calibrate", *arguments, "--output", "my calibration", cwd=there).endswith("add --overwrite)")


def test_make_checkpoint_prints_one_json_object_and_nothing_else(tmp_path):
    arguments = ["make-checkpoint", "--family", "smolvla", "--size", "tiny", "--output", "made here"]
    made = prints_json(*arguments, cwd=tmp_path)
    assert (made["output"], made["family"]) == (str(tmp_path / "made here"), "smolvla")
    assert made["bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert "is not empty" in fails(*arguments, cwd=tmp_path)


# Where there is no lerobot, as on a machine that only prunes. Runs one command after another.
LIGHT = """
import json, sys
sys.modules["lerobot"] = None
from clp_ros.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main([*arguments, "--json"])
    heavy = {"torch", "transformers", "matplotlib", "cv2", "rosbags", "rclpy"} & set(sys.modules)
    assert not heavy, (heavy, arguments)
    if code:
        sys.exit(code)
"""


def json_shape(value):
    """Names and kinds, whatever the values; null and a number or a text are one kind."""
    if isinstance(value, dict):
        return {name: json_shape(item) for name, item in value.items()}
    return list if isinstance(value, list) else None


def test_prune_and_inspect_import_nothing_heavy(there):
    def light(*commands):
        lines = succeeds(json.dumps(commands), command=("-c", LIGHT), cwd=there, is_warm=False).splitlines()
        assert len(lines) == len(commands)
        return [json.loads(line, parse_constant=pytest.fail) for line in lines]

    prune = ["prune", "--checkpoint", "base", "--calibration", "calibration"]
    (plan,) = light([*prune, "--dry-run"])
    ways = {
        "default": prune,
        "by hand": ["prune", "--checkpoint", "base", "--remove", f"vlm={','.join(map(str, plan['removed']['vlm']))}"],
        "budget": [*prune, "--budget", "expert=4"],
        "mse": [*prune, "--criterion", "mse", "--budget", "vlm=2"],
        "random": [*prune, "--criterion", "random", "--seed", "5"],
        "threshold": [*prune, "--threshold", "0.9"],
    }
    commands = [["inspect", "calibration"]]
    for output, way in ways.items():
        commands += [[*way, "--output", output], [*way, "--output", output, "--dry-run"], ["inspect", output]]
    calibration, *answers = light(*commands)
    for done, dry, found in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
        assert json_shape(done) == json_shape(dry) == json_shape(plan)
        assert [module["layers"] for module in found["modules"]] == [done["layers"]["vlm"]] * 2
        assert found["parameters"] == done["parameters"]["after"] < done["parameters"]["before"]
        assert found["manifest"]["steps"][-1]["criterion"] == done["criterion"]
        assert done["removed"]["vlm"] == done["removed"]["expert"]
        assert done["unchecked"] == "lerobot is not installed here"
    same = [(there / name / "model.safetensors").read_bytes() for name in ("default", "by hand")]
    assert same[0] == same[1]
    assert [len(module["adjacent"]) for module in calibration["modules"]] == [15, 15]
    assert calibration["family"] == "smolvla"


def test_what_a_person_reads(there):
    assert "smolvla" in succeeds("inspect", "base", cwd=there)
    assert "vlm" in succeeds("inspect", "calibration", cwd=there)
    remove = ["prune", "--checkpoint", "base", "--remove", "vlm=1,2,5,6,14,15"]
    expected = "vlm: removed 1, 2, 5, 6, 14, 15; 10 layers left\nexpert: removed 1, 2, 5, 6, 14, 15; 10 layers left\n"
    dry = succeeds(*remove, "--dry-run", cwd=there)
    assert dry.startswith(expected)
    assert succeeds(*remove, "--output", "out [x]", cwd=there) == dry.rstrip("\n") + ", in out [x]\n"
    table = succeeds("prune", "--checkpoint", "base", "--calibration", "calibration", "--dry-run", cwd=there)
    assert table.count("× removed") == 6


def test_usage_faults_exit_with_2(there):
    prune = ["prune", "--checkpoint", "base"]
    assert "required: COMMAND" in misused()
    assert "invalid choice" in misused("prume")
    assert "one of the arguments --calibration --remove is required" in misused(*prune, "--output", "o")
    both = [*prune, "--output", "o", "--calibration", "calibration", "--remove", "vlm=1,2"]
    assert "not allowed with argument --calibration" in misused(*both)
    assert "required: --output" in misused(*prune, "--calibration", "calibration")
    more = [*prune, "--output", "o", "--remove", "vlm=1,2", "--budget", "vlm=2"]
    assert "not allowed with --budget" in misused(*more, cwd=there)
    calibrate = ["calibrate", "--checkpoint", "c", "--bag", "b", "--embodiment", "e", "--task", "t", "--output", "o"]
    assert "invalid int value: 'many'" in misused(*calibrate, "--samples", "many")
    for seed in ("-1", "x", str(2**64)):
        assert "is not a whole number from 0" in misused(*calibrate, f"--seed={seed}")
    assert "invalid choice: 'huge'" in misused(
        "make-checkpoint", "--family", "smolvla", "--size", "huge", "--output", "o"
    )


def faulty(there, recording):
    prune = ["prune", "--checkpoint", "base", "--output", "o"]
    planned = [*prune, "--calibration", "calibration"]
    calibrate = ["calibrate", "--checkpoint", "base", "--output", "o", "--task", "transfer_cube"]
    robot = ["--embodiment", "aloha_bimanual"]
    return {
        "does not exist": ["inspect", "nowhere"],
        "the folder is not a calibration": [*prune, "--calibration", "nowhere"],
        "unknown criterion 'ckq' (hint: did you mean 'cka'?)": [*planned, "--criterion", "ckq"],
        "budget: there is no module 'vml' (hint: did you mean 'vlm'?)": [*planned, "--budget", "vml=2"],
        "is not MODULE=K": [*planned, "--budget", "6"],
        "their budgets differ": [*planned, "--budget", "vlm=2", "expert=4"],
        "cannot remove 16 of 16 layers": [*planned, "--budget", "vlm=16"],
        "nothing would be removed": [*planned, "--threshold", "1.5"],
        "prune: threshold must be a finite number, not -inf": [*planned, "--threshold=-inf", "--budget", "vlm=2"],
        "the output folder is inside calibration or contains it": [
            *("prune", "--checkpoint", "base", "--calibration", "calibration", "--overwrite"),
            *("--output", "calibration/pruned"),
        ],
        "module vlm: without layers 1, its 2 kinds of layers": [*prune, "--remove", "vlm=1"],
        "is not MODULE=1,2,5": [*prune, "--remove", "vlm"],
        "unknown device 'tpu'": ["verify", "base", "--device", "tpu"],
        "unknown family 'smolvls'": ["make-checkpoint", "--family", "smolvls", "--size", "tiny", "--output", "o"],
        "the output folder is inside base or contains it": [
            *calibrate,
            *robot,
            "--bag",
            recording,
            "--output",
            "base/o",
        ],
        f"{there}: the output folder is inside": [
            *calibrate,
            *robot,
            "--bag",
            recording,
            "--output",
            ".",
            "--overwrite",
        ],
        "did you mean 'aloha_bimanual'": [*calibrate, "--embodiment", "aloha_bimanul", "--bag", recording],
        "nobag": [*calibrate, *robot, "--bag", "nobag"],
        "the output is a file, not a folder": [*prune, "--remove", "vlm=1,2", "--output", "file"],
    }


def test_faults_are_told_in_one_line_and_leave_nothing(there, recording, monkeypatch, capsys):
    # In this process: the way into a process of its own is the same for all of them, and slow.
    monkeypatch.chdir(there)
    (there / "file").write_text("a file")
    before = sorted(there.iterdir())
    for message, arguments in faulty(there, recording).items():
        assert cli.main([str(word) for word in arguments]) == 1, message
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: "), message
        assert printed.err.count("\n") == 1
        assert message in printed.err
        assert sorted(there.iterdir()) == before


def test_faults_of_a_loaded_checkpoint_are_one_line_too(tiny_checkpoint, tmp_path):
    copied = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (copied / "policy_preprocessor.json").unlink()
    assert "policy_preprocessor.json is missing" in fails("verify", copied)
    shutil.rmtree(copied / "vlm")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vlm_model_name": str(tmp_path / "gone")}))
    assert "lerobot cannot build the model" in fails("benchmark", copied, "--json")


def test_pruning_checks_the_processors_that_it_copies(tiny_checkpoint, tmp_path, capsys):
    prune = ["prune", "--remove", "vlm=1,2", "--checkpoint", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = tmp_path / "base" / "policy_preprocessor.json"
    document = json.loads(path.read_text())
    document["steps"].append({"registry_name": "somebodys_step", "config": {}})
    path.write_text(json.dumps(document))
    assert cli.main(prune) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not fully checked against lerobot: ")
    assert last.endswith("has no processor step somebodys_step; run `clp verify` before it is used")
    shutil.rmtree(tmp_path / "out")
    path.unlink()
    assert cli.main(prune) == 1
    assert "policy_preprocessor.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_that_one_stands_in_may_be_the_output(there, tmp_path):
    here = tmp_path / "pruned here"
    here.mkdir()
    pruned = prints_json("prune", "--checkpoint", there / "base", "--remove", "vlm=1,2", "--output", ".", cwd=here)
    assert pruned["output"] == str(here)
    assert prints_json("inspect", here)["parameters"] == pruned["parameters"]["after"]


def test_a_gpu_that_is_too_small_is_told(monkeypatch, capsys):
    def too_large(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    monkeypatch.setattr(cli, "run", too_large)
    assert cli.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the GPU: CUDA out of memory. Tried to allocate 2.00 GiB. (hint: use --device cpu")


def test_an_output_that_is_not_empty_is_replaced_only_when_asked(there):
    arguments = ["prune", "--checkpoint", "base", "--remove", "vlm=1,2", "--output", "out"]
    (there / "out").mkdir()
    (there / "out" / "mine").write_text("kept")
    assert "is not empty" in fails(*arguments, cwd=there)
    assert (there / "out" / "mine").read_text() == "kept"
    succeeds(*arguments, "--overwrite", cwd=there)
    assert not (there / "out" / "mine").exists()
    assert sorted(path.name for path in there.iterdir()) == ["base", "calibration", "out"]


def test_ctrl_c_leaves_nothing_behind(there, recording):
    arguments = ["calibrate", "--checkpoint", "base", "--bag", str(recording), "--embodiment", "aloha_bimanual"]
    arguments += ["--task", "transfer_cube", "--samples", "400", "--output", "interrupted", "--device", "cpu"]
    # The command says on stdout, through its own progress, that it is in the midst of the frames.
    script = (
        "import sys\n"
        "from clp_ros.calibration import calibrate as calibration\n"
        "add = calibration.Calibrator.add\n"
        "def interrupt(self, *frame):\n"
        "    add(self, *frame)\n"
        "    print('one more frame', flush=True)\n"
        "calibration.Calibrator.add = interrupt\n"
        "from clp_ros.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    printed, errors = there.parent / "stdout", there.parent / "stderr"
    process = warm_processes.Program(["-c", script, *arguments], printed, errors, ENVIRONMENT, there)
    try:
        while printed.read_text().count("one more frame\n") < 2:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.read_text() == "interrupted; nothing half-written was left behind\n"
    assert sorted(path.name for path in there.iterdir()) == ["base", "calibration"]


@pytest.mark.parametrize("job", ["make-checkpoint", "calibrate"])
def test_a_full_disk_is_told_and_leaves_nothing(there, recording, job):
    # A limit on the size of a file stands for it; the error comes from the same calls.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
    limited += "from clp_ros.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--family", "smolvla", "--size", "tiny"]
    if job == "calibrate":
        arguments = ["--checkpoint", "base", "--bag", recording, "--embodiment", "aloha_bimanual"]
        arguments += ["--task", "transfer_cube", "--samples", "1", "--device", "cpu"]
    line = fails(job, *arguments, "--output", "o", cwd=there, command=("-c", limited))
    assert "File too large" in line
    assert sorted(path.name for path in there.iterdir()) == ["base", "calibration"]


def test_a_pipe_closed_early_is_no_fault(there):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [sys.executable, "-m", "clp_ros.cli", "inspect", "base", "--json"]
        done = subprocess.run(
            command, cwd=there, env=ENVIRONMENT, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_version():
    for arguments in (
        [],
        *([name] for name in ("calibrate", "prune", "inspect", "benchmark", "make-checkpoint", "verify")),
    ):
        assert succeeds(*arguments, "--help").startswith("usage: clp")
    assert succeeds("--version").startswith("clp ")


@pytest.mark.skipif(version("lerobot").startswith("0.5."), reason="this lerobot has GR00T N1.5")
def test_a_checkpoint_for_another_lerobot_is_told_which_one(tmp_path):
    config = {"type": "groot", "tokenizer_assets_repo": "lerobot/eagle2hg-processor-groot-n1p5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layers = {
        module.layer_prefix.format(layer=layer) + "weight": np.zeros(2, np.float32)
        for module in family_of(config, "config.json").layer_stacks(config)
        for layer in range(module.layers)
    }
    save_file(layers, tmp_path / "model.safetensors")
    reported = f"groot needs lerobot >=0.5.1,<0.6, but {version('lerobot')} is installed"
    for command in (("verify",), ("benchmark", "--device", "cpu")):
        assert reported in fails(*command, tmp_path)
    assert "llm" in succeeds("inspect", tmp_path)
