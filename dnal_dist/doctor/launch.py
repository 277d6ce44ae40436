"""A real launch: `accelerate launch` with the config of the run, and one real step of each kind in its processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO

from dnal_dist import recipe
from dnal_dist.doctor.case import PRECISIONS, Case, Finding, fails, passes, warns
from dnal_dist.doctor.network import CHECKOUT, gpu_facts

# More than two processes would show nothing further, and a login node has few cores.
PROCESSES = 2
# The probe's images are no larger than this, where the network takes such small ones.
SIZE = 64
# Seconds without a sign of life after which processes with GPUs hang, rather than take their time.
SILENT = 15.0
# Facts of the probe in their order, and what was not reached without them.
STAGES = {
    "up": "no process was up",
    "world_size": "the processes had not joined one another",
    "backend": "the network was not yet wrapped",
    "alike": "not all steps finished",
}


class Launch:
    """The probe (probe.py), started in the background; `finding` waits for it. Leaving the context ends its processes."""

    def __init__(self, case: Case):
        self.gpus = bool(not case.cpu and gpu_facts())
        # Two nodes of one process each are tried here, unless they would share a GPU.
        self.case, self.processes = case, min(case.processes if self.gpus else case.ranks, PROCESSES)
        self.begun, self.process = time.monotonic(), None

    def __enter__(self) -> "Launch":
        self.output: IO[bytes] = tempfile.TemporaryFile()
        if not self.case.quick and (self.case.config is not None or self.processes == 1):
            self.process = self._start()
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.end()
        self.output.close()

    def _start(self) -> subprocess.Popen:
        path, self.result = self.case.scratch / "recipe.yaml", self.case.scratch / "probe.json"
        path.write_text(recipe.dump(self.case.settings), "utf-8")
        words = [sys.executable, "-m"]
        if self.case.config is not None:
            words += ["accelerate.commands.launch", "--config_file", str(self.case.config.path)]
            words += ["--num_processes", str(self.processes), "--num_machines", "1", "--machine_rank", "0"]
            words += ["--mixed_precision", self.case.config.precision]
            # Only this machine of the job takes part; its port may be in use.
            words += ["--main_process_ip", "127.0.0.1", "--main_process_port", "0", "-m"]
        words += ["dnal_dist.doctor.probe", str(path), str(self.result), str(SIZE)]
        paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread, as in the doctor itself (see __main__).
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.case.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finding(self, seconds: float) -> Finding:
        """Waits at most `seconds`."""
        case = self.case
        if case.quick:
            return passes("not started, by --quick")
        if self.process is None:
            config = "--config-file recipes/accelerate/ddp.yaml"
            return warns(f"{case.ranks} processes, but no Accelerate config to start them with", config)
        try:
            code = self.process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            code = None
        taken = time.monotonic() - self.begun
        facts = json.loads(self.result.read_text()) if self.result.is_file() else {}
        silence = time.time() - self.result.stat().st_mtime if facts else 0.0
        unfinished = "alike" not in facts
        if code or (unfinished and (code == 0 or self._error())):
            found = f"not finished after {taken:.0f} s" if code is None else f"exit code {code}"
            where = case.config.path if case.config else "its config"
            return fails(f"{found}: {self._last()}", f"correct it in the recipe or in {where}")
        return self.judge(facts, taken, silence)

    def judge(self, facts: dict, taken: float, silence: float) -> Finding:
        """The finding for the probe's facts. taken, silence: seconds since the start and since the last sign of life."""
        case, config = self.case, self.case.config
        if (missing := next((words for key, words in STAGES.items() if key not in facts), None)) is not None:
            return self._late(f"{missing} after {taken:.0f} s, and none had failed", facts, silence)
        expected = "single" if config is None else config.expected(self.processes)
        precision = "float32" if config is None else PRECISIONS.get(config.precision, config.precision)
        losses = ", ".join(f"{kind} {loss:.3g} in {seconds:.1f} s" for kind, (loss, seconds) in facts["steps"].items())
        found = (
            f"{facts['backend']} on {facts['world_size']} of {case.ranks} processes, {facts['device']}, {facts['precision']}; loss "
        )
        found += f"of a step {losses} ({', '.join([*facts['reduced'], f'{taken:.0f} s with the start'])})"
        remedy = f"correct {config.path}" if config else "give --config-file"
        for name, wanted, got, keys in (
            ("", expected, facts["backend"], "distributed_type, zero_stage or fsdp_version"),
            (" processes", self.processes, facts["world_size"], "num_processes, use_cpu"),
            ("", precision, facts["precision"], "mixed_precision"),
        ):
            if wanted != got:
                return fails(f"expected {wanted}{name}, found {found}", f"{remedy}: {keys}")
        if wrong := [kind for kind, (loss, _) in facts["steps"].items() if not abs(loss) < float("inf")]:
            remedy = "lower keys 'phases.*.optimizer.lr', or set mixed_precision to no"
            return fails(f"the loss of the {wrong[0]} step is not finite: {found}", remedy)
        if not facts["alike"]:
            return fails(f"the processes do not have the same weights after a step: {found}", "check the network between GPUs")
        return passes(found)

    def _late(self, found: str, facts: dict, silence: float) -> Finding:
        """For what has not ended: where GPUs were silent for long it hangs, elsewhere cores and file systems may be busy."""
        config = self.case.config
        launcher = "python" if config is None else f"accelerate launch --config_file {config.path} --num_processes {self.processes}"
        by_hand = f"{launcher} -m dnal_dist.doctor.probe recipes/digits.yaml probe.json {SIZE}"
        if self.gpus and facts and silence > SILENT:
            return fails(f"{found}: {self._last()}", f"see with NCCL_DEBUG=INFO where it hangs: {by_hand}")
        return warns(f"{found}; this machine may be busy", f"run the doctor again later, or try by hand: {by_hand}")

    def _last(self) -> str:
        """The line that names the reason, of all that the launcher and its processes printed."""
        return self._error() or (self._lines()[-1:] or ["nothing was printed"])[0][:300]

    def _error(self) -> str | None:
        lines = self._lines()
        own = [line for line in lines if line.startswith("error: ")]
        # The launcher's own error comes last, and only reports that a process failed.
        errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return next((line[:300] for line in own or errors), None)

    def _lines(self) -> list[str]:
        self.output.seek(0)
        return [line.strip() for line in self.output.read().decode(errors="replace").splitlines() if line.strip()]
