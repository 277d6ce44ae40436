"""Networks of other libraries and of the user's own code, by name."""

import importlib
import inspect

from torch import nn

from dnal_dist.common.errors import InputError

KEY = "key 'model.name'"


def make(name: str, num_classes: int | None = None, arguments: dict | None = None) -> nn.Module:
    """The module called `name`, freshly initialised: torchvision:NAME, timm:NAME or PACKAGE.MODULE:FUNCTION, which gets `arguments`
    and num_classes, if that is given. Raises InputError that says what is not there."""
    library, _, own = name.partition(":")
    arguments = dict(arguments or {})
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    maker = {"torchvision": _torchvision, "timm": _timm}.get(library, _function)(name, library, own, arguments)
    try:
        module = maker(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{KEY}: {name} cannot be made with {arguments} ({_line(error)}); see key 'model.arguments'") from None
    if not isinstance(module, nn.Module):
        raise InputError(f"{KEY}: {name} gives a {type(module).__name__}, not a torch.nn.Module")
    return module


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _torchvision(name: str, library: str, own: str, arguments: dict):
    from torchvision import models

    if own not in models.list_models():
        raise InputError(f"{KEY}: torchvision has no {own!r}; `torchvision.models.list_models()` names what it has")
    builder = models.get_model_builder(own)
    arguments.setdefault("weights", None)
    # Auxiliary classifiers belong to another way of training.
    known = inspect.signature(builder).parameters
    if own in ("googlenet", "inception_v3"):
        arguments.setdefault("aux_logits", False)
        arguments.setdefault("init_weights", False)
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


def _function(name: str, library: str, own: str, arguments: dict):
    try:
        found = getattr(importlib.import_module(library), own)
    except ImportError as error:
        raise InputError(f"{KEY}: {name}: {_line(error)}; is the folder of {library} on PYTHONPATH?") from None
    except AttributeError:
        raise InputError(f"{KEY}: {name}: module {library} has no {own!r}") from None
    if not callable(found):
        raise InputError(f"{KEY}: {name} is no function or class")
    return found
