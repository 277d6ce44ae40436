"""A real launch: `accelerate launch` with the config that the run will have, and one real step of each kind in its processes."""

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
from dnal_dist.doctor.case import PRECISIONS, PROBED, Case, Finding, fails, passes, warns
from dnal_dist.doctor.network import CHECKOUT, gpu_facts

# The probe's images are no larger than this, where the network takes such ones.
SIZE = 64
# Seconds without a word after which processes with GPUs hang, rather than take their time.
SILENT = 15.0


class Launch:
    """The probe (probe.py), started in the background; `finding` waits for it. Leaving the context ends what is left of it."""

    def __init__(self, case: Case):
        # Of several nodes with one process each two are tried here, unless they would share a GPU and train on the CPU.
        self.gpus = bool(not case.cpu and gpu_facts())
        self.case, self.processes = case, min(case.processes if self.gpus else case.ranks, PROBED)
        self.begun, self.process = time.monotonic(), None

    def __enter__(self) -> "Launch":
        self.said: IO[bytes] = tempfile.TemporaryFile()
        if not self.case.quick and (self.case.config is not None or self.processes == 1):
            self.process = self._start()
        return self

    def _start(self) -> subprocess.Popen:
        path, self.result = self.case.scratch / "recipe.yaml", self.case.scratch / "probe.json"
        path.write_text(recipe.dump(self.case.settings), "utf-8")
        words = [sys.executable, "-m"]
        if self.case.config is not None:
            words += ["accelerate.commands.launch", "--config_file", str(self.case.config.path)]
            words += ["--num_processes", str(self.processes), "--num_machines", "1", "--machine_rank", "0"]
            words += ["--mixed_precision", self.case.config.precision]
            # Of the whole job only this machine is here; its port may be another's.
            words += ["--main_process_ip", "127.0.0.1", "--main_process_port", "0", "-m"]
        words += ["dnal_dist.doctor.probe", str(path), str(self.result), str(SIZE)]
        paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # As in the doctor itself (see doctor.main).
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self.case.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said, start_new_session=True
        )

    def finding(self, seconds: float) -> Finding:
        """Waits so many seconds at most."""
        case = self.case
        if case.quick:
            return passes("not started, by --quick")
        if self.process is None:
            return warns(
                f"{case.ranks} processes, but no Accelerate config to start them with", "--config-file recipes/accelerate/ddp.yaml"
            )
        try:
            code = self.process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self._end()
            code = None
        self.seconds = time.monotonic() - self.begun
        found = json.loads(self.result.read_text()) if self.result.is_file() else None
        if code:
            return fails(f"exit code {code}: {self._last()}", self._remedy())
        if code is None and (why := self._error()) and "alike" not in (found or {}):
            return fails(f"not at its end after {self.seconds:.0f} s: {why}", self._remedy())
        if found is not None:
            return self._judged(found)
        if code == 0:
            return fails(f"the launcher ended, but no process told anything: {self._last()}", f"try by hand: {self._by_hand()}")
        return self._apart()

    def _apart(self) -> Finding:
        """Of processes that have not met, though none has failed."""
        up = self._up()
        told = f"{len(up)} of {self.processes} processes were up after {self.seconds:.0f} s; they had not met, and none had failed"
        if self.gpus and len(up) == self.processes and self._silence() > SILENT:
            return fails(f"{told}: {self._last()}", f"see with NCCL_DEBUG=INFO where it hangs: {self._by_hand()}")
        told += "; this machine may be busy, or its file system slow to load Python's packages from"
        return warns(told, f"ask again later, or try by hand: {self._by_hand()}")

    def _up(self) -> list[float]:
        """When each process that has come so far had imported all it needs, in seconds since 1970."""
        return [path.stat().st_mtime for path in self.result.parent.glob(f"{self.result.name}.*.up")]

    def _silence(self) -> float:
        """Seconds since a process told anything."""
        told = [self.result.stat().st_mtime] if self.result.is_file() else []
        return time.time() - max([*self._up(), *told], default=time.time())

    def _by_hand(self) -> str:
        """The probe, which needs no shards and leaves one small file."""
        config = self.case.config
        launcher = "python" if config is None else f"accelerate launch --config_file {config.path} --num_processes {self.processes}"
        return f"{launcher} -m dnal_dist.doctor.probe recipes/digits.yaml probe.json {SIZE}"

    def _judged(self, found: dict) -> Finding:
        case, config = self.case, self.case.config
        asked = "single" if config is None else config.expected(self.processes)
        precision = "float32" if config is None else PRECISIONS.get(config.precision, config.precision)
        losses = ", ".join(f"{kind} {loss:.3g} in {took:.1f} s" for kind, (loss, took) in found["steps"].items())
        told = f"{found['world_size']} of {case.ranks} processes, {found['device']}, {found['precision']}; loss of a step "
        told += f"{losses or 'not known'} ({', '.join([*found.get('reduced', ()), f'{self.seconds:.0f} s with the start'])})"
        if "backend" not in found:
            return self._late(f"the network was not yet wrapped: {told}", found)
        told = f"{found['backend']} on {told}"
        remedy = f"correct {config.path}" if config else "give --config-file"
        if found["backend"] != asked:
            return fails(f"{asked} was asked for; found {told}", f"{remedy}: distributed_type, zero_stage or fsdp_version")
        if found["world_size"] != self.processes:
            return fails(f"{self.processes} processes were asked for; found {told}", f"{remedy}: num_processes, use_cpu")
        if found["precision"] != precision:
            return fails(f"{precision} was asked for; found {told}", f"{remedy}: mixed_precision")
        if wrong := [kind for kind, (loss, _) in found["steps"].items() if not abs(loss) < float("inf")]:
            return fails(
                f"the loss of the {wrong[0]} step is no finite number: {told}",
                "lower keys 'phases.*.optimizer.lr', or set mixed_precision to no",
            )
        if "alike" not in found:
            return self._late(f"the steps did not all come to an end: {told}", found)
        if not found["alike"]:
            return fails(f"the processes do not have the same weights after a step: {told}", "look at the network between GPUs")
        return passes(told)

    def _late(self, told: str, found: dict) -> Finding:
        # Small operations by the thousand, on processors that others may be using.
        if found["device"] == "CPU":
            when = "when this machine is less busy"
            return warns(told, f"look at it {when}" if self.case.cpu else f"look at it on a node with a GPU, or {when}")
        if self._silence() < SILENT:
            return warns(told, "look at it when this machine and its file system are less busy")
        return fails(told, "look at GPU and network with nvidia-smi and NCCL_DEBUG=INFO")

    def _last(self) -> str:
        """The line that says why, of all that the launcher and its processes printed."""
        return self._error() or (self._lines()[-1:] or ["nothing was printed"])[0][:300]

    def _error(self) -> str | None:
        lines = self._lines()
        own = [line for line in lines if line.startswith("error: ")]
        errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        # The launcher's own comes last, and only tells that a process failed.
        return next((line[:300] for line in own or errors), None)

    def _lines(self) -> list[str]:
        self.said.seek(0)
        return [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]

    def _remedy(self) -> str:
        path = self.case.config.path if self.case.config else "an Accelerate config"
        return f"correct what it names, in the recipe or in {path}"

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self._end()
        self.said.close()
