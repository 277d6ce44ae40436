"""The command `dnal`, one subcommand for each command of the package: `dnal train digits` is `python -m dnal_dist.train digits`."""

import importlib
import sys

from dnal_dist.common.shipped import shipped

# Module and purpose of each subcommand.
COMMANDS = {
    "train": ("dnal_dist.train", "train a recipe, from its shards to the compact network and the report"),
    "recipe": ("dnal_dist.recipe.__main__", "check a recipe, print the schema, copy the packaged recipes and Accelerate configs"),
    "gate": ("dnal_dist.gate", "what can be gated in a network, what is coupled, and what stays whole and why"),
    "cost": ("dnal_dist.cost", "MACs and parameters of a recipe's network or of a run, layer by layer"),
    "export": ("dnal_dist.export.__main__", "write files of a run's network that load without this project, each proven equal"),
    "evaluate": ("dnal_dist.evaluate", "accuracy of a run's network or of an export, class by class, and its worst images"),
    "latency": ("dnal_dist.latency", "how much faster a run's network is than the full one, in several runtimes"),
    "predict": ("dnal_dist.predict", "classes of images by an exported network"),
    "plan": ("dnal_dist.plan", "memory and traffic of a recipe on each backend"),
    "doctor": ("dnal_dist.doctor.__main__", "check machine, data and recipe before a job is submitted"),
    "submit": ("submit", "submit a recipe or a sweep to a SLURM cluster"),
    "runs": ("dnal_dist.runs", "list runs and their jobs"),
    "report": ("dnal_dist.report.__main__", "write the report of a run, or compare runs"),
    "dashboard": ("dnal_dist.dashboard", "write a W&B or TensorBoard dashboard"),
    "stream": ("dnal_dist.stream", "prove from a run's receipts that each epoch had every sample once"),
    "chaos": ("dnal_dist.chaos.__main__", "kill and resume a run at random, and compare it with an undisturbed one"),
    "make_shards": ("data_tools.make_shards", "make webdataset shards from images"),
    "index": ("data_tools.index", "write the index of shards that were made elsewhere"),
    "verify": ("data_tools.verify", "check shards against their index"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: dnal COMMAND ...     (dnal COMMAND --help for the arguments of a command)\n")
        print("\n".join(f"  {command:<13}{purpose}" for command, (_, purpose) in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: no command is called {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"dnal {name}"]
    if name == "submit":
        # Its modules are scripts of one folder.
        sys.path.insert(0, str(shipped("slurm")))
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
