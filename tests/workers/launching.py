"""Start a script in several processes, with the launcher files that users have."""

import os
import signal
import subprocess
import sys

from fixtures.paths import ROOT


def start(script, *arguments, launcher: str = "ddp", num_processes: int = 2, options: tuple = ()) -> subprocess.Popen:
    """Start `accelerate launch` with `recipes/accelerate/<launcher>.yaml`, in a separate process group.

    Args:
        num_processes: of all machines.
        options: further ones of `accelerate launch`; they win over the file.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", f"recipes/accelerate/{launcher}.yaml", "--num_processes", num_processes),
        *("--main_process_port", 0, *options),  # 0: any free one
        *(script, *arguments),
    ]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,  # where the launcher files look for ds_configs/
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 600) -> str:
    """Wait for the end of a started process and return what it printed; nothing of it is left running."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"Still running after {timeout} s:\n{process.communicate()[0][-5000:]}") from None


def launch(script, *arguments, **options) -> str:
    """Run a script to its end, which must be a good one, and return what it printed."""
    process = start(script, *arguments, **options)
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    return output
