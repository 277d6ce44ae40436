"""Networks of other libraries and of the user's own code, by name."""

import importlib
import inspect
import sys
import typing
from pathlib import Path

from torch import nn

from dnal_dist.common.errors import InputError
from dnal_dist.common.paths import expanded

KEY = "key 'model.name'"
# Arguments by which libraries read weights in ways of their own, pickles among them.
REFUSED = {"weights", "weights_backbone", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def make(name: str, num_classes: int | None = None, arguments: dict | None = None, pretrained: bool = False) -> nn.Module:
    """The module called `name`, freshly initialised: torchvision:NAME, timm:NAME or PACKAGE.MODULE:FUNCTION, which gets `arguments`
    and num_classes, if that is given; or compact:FOLDER, with the weights of that run's compact network, but for a last layer of
    another number of classes. Raises InputError that says what is not there."""
    library, _, own = name.partition(":")
    arguments = dict(arguments or {})
    if refused := sorted(REFUSED & arguments.keys()):
        raise InputError(
            f"key 'model.arguments.{refused[0]}': weights come by key 'model.pretrained' or 'model.init_from'; remove it"
        )
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if pretrained:
        arguments["pretrained"] = True
    maker = {"torchvision": _torchvision, "timm": _timm, "compact": _compact}.get(library, _function)(name, library, own, arguments)
    try:
        module = maker(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise InputError(f"{KEY}: {name} cannot be made with {arguments} ({_line(error)}); see key 'model.arguments'") from None
    if not isinstance(module, nn.Module):
        raise InputError(f"{KEY}: {name} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _torchvision(name: str, library: str, own: str, arguments: dict):
    from torchvision import models

    if own not in models.list_models(module=models):  # its classifiers
        raise InputError(f"{KEY}: torchvision has no {own!r}; `torchvision.models.list_models()` names what it has")
    builder = models.get_model_builder(own)
    arguments.setdefault("weights", None)
    # Auxiliary classifiers belong to another way of training.
    known = inspect.signature(builder).parameters
    if own in ("googlenet", "inception_v3"):
        arguments.setdefault("aux_logits", False)
        arguments.setdefault("init_weights", False)
        arguments.setdefault("transform_input", True)  # as their published weights expect
    elif "aux_logits" in known:
        arguments.setdefault("aux_logits", False)
    return builder


def _timm(name: str, library: str, own: str, arguments: dict):
    try:
        import timm
    except ImportError:
        raise InputError(f"{KEY}: {name} needs timm; pip install 'dnal-dist[timm]'") from None
    if not timm.is_model(own.partition(".")[0]):
        raise InputError(f"{KEY}: timm has no {own!r}; `timm.list_models()` names what it has")
    return lambda **settings: timm.create_model(own, **settings)


def _compact(name: str, library: str, own: str, arguments: dict):
    # Which imports this module.
    from dnal_dist.nets.compact import load
    from dnal_dist.nets.whole import whole

    folder = Path(expanded(own, f"{KEY}: "))
    try:
        network = whole(load(folder / "compact" if (folder / "compact").is_dir() else folder))
    except ValueError as error:
        raise InputError(f"{KEY}: {error}; give the folder of a finished run") from None

    def made(num_classes: int | None = None) -> nn.Module:
        with_classes(network, num_classes)
        return network

    return made


def with_classes(network: nn.Module, num_classes: int | None) -> str | None:
    """Give a compact network a last Linear with random weights, if it is for another number of classes; returns its path then."""
    linear = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear)]
    if num_classes is None or (linear and linear[-1][1].out_features == num_classes):
        return None
    if not linear:
        raise InputError("key 'model.num_classes': the network ends without a Linear layer, so its classes stay; leave it out")
    path, last = linear[-1]
    holder, _, child = path.rpartition(".")
    network.get_submodule(holder)._modules[child] = nn.Linear(last.in_features, num_classes, last.bias is not None)
    return path


def _function(name: str, library: str, own: str, arguments: dict):
    """A class of modules, or a function that says by its annotation that it returns one: a recipe calls nothing else."""
    if library.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(f"{KEY}: {name}: {library} is a module of Python itself; give your own, as PACKAGE.MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(library), own)
    except ImportError as error:
        raise InputError(f"{KEY}: {name}: {_line(error)}; is the folder of {library} on PYTHONPATH?") from None
    except (AttributeError, ValueError):
        raise InputError(f"{KEY}: {name}: module {library} has no {own!r}") from None
    if not _gives_a_module(found):
        raise InputError(
            f"{KEY}: {name} is neither a class of torch.nn.Module nor a function annotated as returning one; write "
            f"`def {own}(...) -> torch.nn.Module:`"
        )
    return found


def _gives_a_module(found) -> bool:
    if not isinstance(found, type):
        try:
            found = typing.get_type_hints(found).get("return")
        except Exception:  # annotations are anything
            return False
    return isinstance(found, type) and issubclass(found, nn.Module)
