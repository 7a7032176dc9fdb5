"""Every launcher of recipes/accelerate starts the training recipe, on CPUs here, and trains the same model.

Those of clusters, in recipes/launchers, are checked by the schemas of their own tools, and by what they would start.
"""

import json
import os
import re
import socket
import subprocess

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from fixtures.golden_model import converted_directory
from fixtures.paths import ROOT
from fixtures.recipes import write_config
from workers.launching import finish, launch, start


DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
LAUNCHERS = {"cpu": 1, "single_gpu": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}
OFFLOAD = ("zero2_offload", "zero3_offload")


def test_deepspeed_files_leave_to_trainer_what_it_knows():
    assert [path.stem for path in DS_CONFIGS] == ["zero2", "zero2_offload", "zero3", "zero3_offload"]
    for path in DS_CONFIGS:
        config = json.loads(path.read_text())
        # An optimizer named here would be DeepSpeed's own, which compiles for minutes and knows no parameter groups.
        assert not {"optimizer", "scheduler"} & config.keys()
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert config[name] == "auto"
        zero = config["zero_optimization"]
        assert zero["stage"] == int(path.stem[4])
        assert ("offload_optimizer" in zero) == path.stem.endswith("offload")


def arguments(directory, num_processes: int) -> tuple:
    config = write_config(directory / "tiny.yaml", per_device_train_batch_size=2 // num_processes, lora_dropout=0.0)
    return (ROOT / "recipes" / "train.py", "--config", config, "--output_dir", directory / "run")


def losses(directory) -> list[float]:
    state = json.loads((directory / "run" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cpu")
    launch(*arguments(directory, 1), launcher="cpu", num_processes=1)
    return losses(directory)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [*LAUNCHERS, *OFFLOAD])
def test_launcher(launcher, expected, tmp_path):
    options = ()
    if launcher in OFFLOAD:
        launcher, options = launcher[:5], ("--deepspeed_config_file", f"ds_configs/{launcher}.json")
    num_processes = LAUNCHERS[launcher]
    output = launch(
        *arguments(tmp_path, num_processes), launcher=launcher, num_processes=num_processes, options=options
    )
    assert "Done." in output
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "predictions.png").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["hardware"]["num_processes"] == num_processes
    assert record["launcher"]["zero_stage"] == {"zero2": 2, "zero3": 3}.get(launcher)


@pytest.mark.slow
def test_two_machines(expected, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        start(
            *arguments(tmp_path, 2),
            launcher="multi_node",
            options=("--main_process_port", port, "--machine_rank", rank),
        )
        for rank in (0, 1)
    ]
    for output in [finish(machine) for machine in machines]:
        assert "Traceback" not in output, output[-5000:]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_evaluation_gives_the_same_figures_on_any_number_of_processes_in_any_engine(tmp_path):
    """A converted LISA on five images, so that one process has an image more than the other."""
    source = {"shapes": {"num_train_scenes": 2, "num_validation_scenes": 5, "image_size": 64}}
    written = []
    for launcher, num_processes in (("cpu", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)):
        output_dir = tmp_path / launcher
        arguments = ("--eval_sources", json.dumps(source), "--output_dir", output_dir, "--use_cpu", "true")
        launch(
            *(ROOT / "recipes" / "eval.py", converted_directory(), *arguments),
            *("--generation_max_new_tokens", 4),
            launcher=launcher,
            num_processes=num_processes,
        )
        written.append(json.loads((output_dir / "evaluation.json").read_text())["benchmarks"])
    assert written == written[:1] * 4
    assert written[0]["shapes"]["num_items"] == 5


# Clusters

CLUSTERS = ROOT / "recipes" / "launchers"


@pytest.fixture
def run_script(tmp_path):
    """Run a shell script with stubs for the tools of a cluster, and return what it passes to `accelerate launch`."""
    stubs = {
        "accelerate": 'printf "%s\\n" "$@" > arguments',
        "scontrol": "echo first; echo second",
        "srun": 'SLURM_NODEID=1 exec "$@"',
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(*command, code=0, **variables):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == code
        command, *arguments = (tmp_path / "arguments").read_text().splitlines()
        assert command == "launch"
        args = launch_command_parser().parse_args(arguments)
        assert (ROOT / args.config_file).is_file() and (ROOT / args.training_script).is_file()
        assert args.training_script_args[:2] == ["--config", "recipes/configs/lisa_7b.yaml"]
        assert "auto" in args.training_script_args
        return args

    return run


def test_slurm(run_script):
    script = CLUSTERS / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    variables = {"SLURM_JOB_NODELIST": "x", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    args = run_script("bash", script, "--run_name", "a name", **variables)
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip) == (2, 16, 1, "first")
    assert args.training_script_args[-2:] == ["--run_name", "a name"]
    simple_slurm = pytest.importorskip("simple_slurm")
    options = re.findall(r"^#SBATCH --(\S+)=(\S+)$", script.read_text(), re.MULTILINE)
    assert len(options) == script.read_text().count("#SBATCH") > 5
    for name, value in options:
        simple_slurm.Slurm().add_arguments(name.replace("-", "_"), value)  # exits at an unknown one


def test_kubernetes(run_script, tmp_path):
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    command = [word.replace("/volume/", f"{tmp_path}/") for word in container["command"]]
    # A training that ends before it has a model was stopped: the pod starts again.
    args = run_script(*command, code=1, JOB_COMPLETION_INDEX="1", **variables)
    model = tmp_path / "outputs" / "lisa_7b" / "config.json"
    model.parent.mkdir(parents=True)
    model.touch()
    run_script(*command, JOB_COMPLETION_INDEX="1", **variables)
    number = job["spec"]["completions"]
    assert number == job["spec"]["parallelism"] == args.num_machines
    assert args.num_processes == number * container["resources"]["limits"]["nvidia.com/gpu"]
    name = job["metadata"]["name"]
    assert args.main_process_ip == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in (service, job):
        kubernetes_validate.validate(document, "1.34", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": job["spec"] | {"completion": 2}}, "1.34", strict=True)


def test_an_eviction_in_kubernetes_reaches_the_training(tmp_path):
    _, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    training = tmp_path / "accelerate"
    training.write_text("#!/bin/bash\ntrap 'touch saved; exit' TERM\ntouch started\nwhile true; do sleep 0.1; done\n")
    training.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NUM_MACHINES": "2"}
    command = [word.replace("/volume/", f"{tmp_path}/") for word in container["command"]]
    with subprocess.Popen(command, env=environment, cwd=tmp_path) as pod:
        while not (tmp_path / "started").exists():
            assert pod.poll() is None
        pod.terminate()
        assert pod.wait(20) == 1 and (tmp_path / "saved").exists()


def test_skypilot(run_script):
    path = CLUSTERS / "skypilot.yaml"
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    task = yaml.safe_load(path.read_text())
    args = run_script("bash", "-c", task["run"], SKYPILOT_NUM_GPUS_PER_NODE="8", **variables)
    assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 1)
    assert args.main_process_ip == "10.0.0.1"
    sky = pytest.importorskip("sky")  # needs a separate environment
    found = sky.Task.from_yaml(str(path))
    assert found.num_nodes == task["num_nodes"] and "H100" in str(found.resources)
