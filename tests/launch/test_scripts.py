"""Launch scripts and manifests: they parse, match the code, and call stand-ins correctly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tilelli_jax.eval.recall import serve
from tilelli_jax.training import distributed

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAIN = ["-m", "tilelli_jax.train", "--distributed"]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True,
                          timeout=60, env=os.environ | environment, cwd=ROOT)


@pytest.fixture
def stand_in(tmp_path):
    """Returns a function that creates a command logging its arguments, one per line, and a PATH with it."""
    def make(name: str) -> tuple[Path, str]:
        log = tmp_path / "arguments"
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {log}\n')
        command.chmod(0o755)
        return log, f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return make


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK)


def test_slurm_starts_training_with_its_arguments(stand_in):
    log, path = stand_in("srun")
    result = run("slurm.sh", "--config", "configs/demo.yaml", "run_dir=/a b", PATH=path, PYTHON="py")
    assert result.returncode == 0, result.stderr
    assert log.read_text().splitlines() == ["--kill-on-bad-exit=1", "py", *TRAIN, "--config",
                                            "configs/demo.yaml", "run_dir=/a b"]
    assert run("slurm.sh", PATH=path).returncode == 2


def test_slurm_has_a_task_per_gpu_and_requests_the_signal():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")


TPU = {"TPU": "name", "ZONE": "zone", "TYPE": "v5p-16"}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["create"], ["create", "name", "--zone=zone", "--accelerator-type=v5p-16",
                  "--version=v2-alpha-tpuv5"]),
    (["log"], ["ssh", "name", "--zone=zone", "--worker=0"]),
    (["stop"], ["ssh", "name", "--zone=zone", "--worker=0"]),
    (["delete"], ["delete", "name", "--zone=zone"]),
])
def test_tpu_vm_calls_gcloud(stand_in, arguments, expected):
    log, path = stand_in("gcloud")
    result = run("tpu_vm.sh", *arguments, PATH=path, **TPU)
    assert result.returncode == 0, result.stderr
    logged = log.read_text().splitlines()
    assert logged[:3] == ["compute", "tpus", "tpu-vm"]
    assert logged[3:3 + len(expected)] == expected


def test_tpu_vm_runs_on_all_workers_with_arguments_as_given(stand_in, tmp_path):
    """Runs the remote command in a local shell, as the workers would, in a stand-in for the clone."""
    log, path = stand_in("gcloud")
    assert run("tpu_vm.sh", "run", "--config", "c.yaml", "run_dir=/a b/$c", PATH=path, **TPU).returncode == 0
    before, _, command = log.read_text().partition("--command=")
    assert before.splitlines()[-1] == "--worker=all"
    python = tmp_path / "tilelli_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    # Hide this machine's processes, which may include training.
    (tmp_path / "bin" / "pgrep").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "pgrep").chmod(0o755)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    output, deadline = tmp_path / "tilelli_jax" / "train.log", time.monotonic() + 30
    while not (output.exists() and output.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert output.read_text().splitlines() == [*TRAIN, "--config", "c.yaml", "run_dir=/a b/$c"]


def test_tpu_vm_prints_its_usage(stand_in):
    _, path = stand_in("gcloud")
    result = run("tpu_vm.sh", "start", PATH=path, **TPU)
    assert result.returncode == 2
    assert "launch/tpu_vm.sh install" in result.stderr
    assert run("tpu_vm.sh", "run", PATH=path, **TPU).returncode == 2


# pod.sh ---------------------------------------------------------------------------------------


def pod(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    """Starts pod.sh with a Python program in place of the interpreter; `sys.argv` has its arguments."""
    python = tmp_path / "python"
    imports = "import signal, sys, time\nfrom pathlib import Path\n"
    python.write_text(f"#!{sys.executable}\n{imports}{program}")
    python.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(LAUNCH / "pod.sh"), "--config", "c.yaml", "a=b c"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHON": str(python), "RUN_DIR": str(tmp_path / "run"), "SUMMARY_PAUSES": "0.1"})


COMPLETE = "run = Path(sys.argv[-1].partition('=')[2]); run.mkdir(); (run / 'summary.json').touch()\n"


def test_pod_succeeds_when_the_run_is_complete(tmp_path):
    process = pod(tmp_path, COMPLETE + "print(*sys.argv[1:], sep='|')")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "|".join([*TRAIN, "--config", "c.yaml", "a=b c", f"run_dir={tmp_path / 'run'}"]) + "\n"


def test_pod_requests_a_restart_when_the_run_is_not_complete(tmp_path):
    assert pod(tmp_path, "pass").wait(30) == 75


@pytest.mark.parametrize("status", [1, 2])
def test_pod_fails_with_the_status_of_training(tmp_path, status):
    assert pod(tmp_path, COMPLETE + f"sys.exit({status})").wait(30) == status


@pytest.mark.parametrize(("rest", "status"), [("", 75), (COMPLETE, 0), ("sys.exit(3)", 3)])
def test_pod_forwards_sigterm_and_waits(tmp_path, rest, status):
    program = f"""
def stop(*_):
    time.sleep(0.3)  # saving takes time
    Path({str(tmp_path / "stopped")!r}).touch()
    {rest}
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
Path({str(tmp_path / "started")!r}).touch()
time.sleep(600)
"""
    process = pod(tmp_path, program)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == status
    assert (tmp_path / "stopped").exists()


# Manifests ------------------------------------------------------------------------------------


def jobset(kind: str):
    manifest = yaml.safe_load((LAUNCH / f"jobset-{kind}.yaml").read_text())
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return manifest, replicated, job, container


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset(kind):
    manifest, _, job, container = jobset(kind)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    pod_spec = job["template"]["spec"]
    assert pod_spec["restartPolicy"] == "Never"  # podFailurePolicy requires it
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["onExitCodes"]["containerName"] == container["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod_spec["volumes"]}
    script, option, config = container["command"]
    assert (script, option) == ("launch/pod.sh", "--config")
    assert (ROOT / config).is_file()
    environment = {item["name"]: item.get("value") for item in container["env"]}
    run_dir = Path(environment["RUN_DIR"])
    assert any(run_dir.is_relative_to(mount["mountPath"]) for mount in container["volumeMounts"])


def test_jobset_of_gpus_connects_the_processes():
    manifest, replicated, job, container = jobset("gpu")
    environment = {item["name"]: item for item in container["env"]}
    name = manifest["metadata"]["name"]
    host, _, port = environment[distributed.COORDINATOR]["value"].rpartition(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert int(port) in {item["containerPort"] for item in container["ports"]}
    assert environment[distributed.NUM_PROCESSES]["value"] == str(job["parallelism"])
    field = environment[distributed.PROCESS_ID]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_jobset_of_tpus_has_a_pod_per_node_of_the_slice():
    _, _, job, container = jobset("tpu")
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]


def test_sky():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert (ROOT / task["envs"]["CONFIG"]).is_file()
    assert "launch/pod.sh --config" in task["run"]
    for name in (distributed.COORDINATOR, distributed.NUM_PROCESSES, distributed.PROCESS_ID):
        assert f"export {name}=" in task["run"]
    for step in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[step], text=True).returncode == 0


def test_readme_mentions_every_file():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        if path.is_file() and path.name != "README.md":
            assert path.name in text, path.name
    for name in re.findall(r"configs/[\w.-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("file", ["serve-deployment.yaml", "sky-serve.yaml"])
def test_the_servers_start_with_options_that_exist(file: str) -> None:
    """Their command parses, and the probes ask the address on which it listens."""
    documents = list(yaml.safe_load_all((LAUNCH / file).read_text()))
    if file == "sky-serve.yaml":
        words = documents[0]["run"].replace("$OPTIONS", documents[0]["envs"]["OPTIONS"]).split()
        probed = documents[0]["service"]["readiness_probe"]["path"], documents[0]["resources"]["ports"]
        assert words[1:3] == ["-m", "tilelli_jax.serve"]
        words = words[3:]
    else:
        container = documents[0]["spec"]["template"]["spec"]["containers"][0]
        words, ports = container["command"], {documents[1]["spec"]["ports"][0]["targetPort"]}
        probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe")]
        ports |= {port["containerPort"] for port in container["ports"]} | {probe["port"] for probe in probes}
        assert words[:2] == ["tilelli", "serve"] and len(ports) == 1
        labels = documents[0]["spec"]["template"]["metadata"]["labels"]
        assert documents[0]["spec"]["selector"]["matchLabels"] == labels == documents[1]["spec"]["selector"]
        assert container["env"][0]["name"] == serve.KEY
        words, probed = words[2:], (probes[0]["path"], ports.pop())
    options = serve._options(words)
    assert options.host == "0.0.0.0" and probed == ("/health", options.port)
