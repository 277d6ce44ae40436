"""The user's Accelerate config, as the environment that the launcher makes of it, and what of it is refused. Nothing is started."""

import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

from dnal_dist.common.errors import InputError, reason
from dnal_dist.common.shipped import named
from dnal_dist.distributed.wrapper import MIN_PARAMS

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class AccelerateConfig(NamedTuple):
    """What the Accelerate config asks for."""

    backend: str | None
    """fsdp2, zero1, zero2 or zero3; None: DDP, or no backend where there is one process."""
    dtype: torch.dtype
    """Of convolutions and activations: float32, bfloat16 or float16."""
    accumulation: int
    """Micro-batches of a process's local batch; 1 where none is set."""
    activation_checkpointing: bool
    settings: dict
    """See wrapper.Options."""


def read() -> AccelerateConfig:
    """What the Accelerate config asks for, from the environment that the launcher made of it. Raises InputError for what cannot be
    done, or would be done otherwise."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise InputError(
            f"the Accelerate config asks for mixed_precision {precision}; choose one of {', '.join(PRECISIONS)}, or unset "
            "ACCELERATE_MIXED_PRECISION where there is no config"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise InputError(
            "the Accelerate config asks for torch.compile: set dynamo_backend to 'no', and key 'training.compile' to true; "
            "or unset ACCELERATE_DYNAMO_BACKEND where there is no config"
        )
    for variable, name in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if _is_on(variable):
            raise InputError(
                f"the Accelerate config asks for {name}; use one of {named('recipes/accelerate')}, or unset {variable} where there "
                "is no config"
            )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    accumulation = int(accumulation) if accumulation.isdigit() else 1
    backend, settings, checkpointing = None, {}, False
    if _is_on("ACCELERATE_USE_FSDP"):
        backend, settings, checkpointing = _fsdp()
    elif _is_on("ACCELERATE_USE_DEEPSPEED"):
        backend, settings, own = _deepspeed()
        # With a configuration file of DeepSpeed's own, Accelerate leaves these to it.
        precision = own.precision if precision == "no" else precision
        accumulation = max(accumulation, own.accumulation)
    elif "WORLD_SIZE" not in os.environ:
        _check_launcher()
    if precision == "fp16" and backend is not None:
        raise InputError("the Accelerate config asks for mixed_precision fp16, which only goes with DDP here; choose bf16")
    return AccelerateConfig(backend, PRECISIONS[precision], max(1, accumulation), checkpointing, settings)


def check_launched() -> None:
    """Raise InputError if variables of a launcher are set, but not all that it sets: they were left by another start."""
    alone = {
        "WORLD_SIZE": "1",
        "PMI_SIZE": "1",
        "OMPI_COMM_WORLD_SIZE": "1",
        "MV2_COMM_WORLD_SIZE": "1",
        "RANK": "0",
        "PMI_RANK": "0",
    }
    left = [name for name, harmless in alone.items() if os.environ.get(name, harmless) != harmless]
    if "LOCAL_RANK" in os.environ:
        left.append("LOCAL_RANK")
    # A launcher sets all of these; one that is missing would be waited for.
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") if name not in os.environ]
    left, missing = (left, lacking[0]) if lacking else ([], "")
    if not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        on = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if _is_on(name)]
        left, missing = (on, "ACCELERATE_MIXED_PRECISION") if on else (left, missing)
    if left:
        raise InputError(
            f"{', '.join(f'{name}={os.environ[name]}' for name in left)} is set, as a launcher does, but no {missing}: "
            f"unset {' '.join(left)}, or start by accelerate launch"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


def _fsdp() -> tuple[str, dict, bool]:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "the Accelerate config asks for FSDP in its first version; set fsdp_version: 2, as in "
            f"{named('recipes/accelerate/fsdp2.yaml')}"
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise InputError("the Accelerate config asks for fsdp_offload_params; these networks are small: set it to false")
    plugin = FullyShardedDataParallelPlugin()
    if plugin.transformer_cls_names_to_wrap:
        raise InputError(
            "the Accelerate config names fsdp_transformer_layer_cls_to_wrap; networks are divided by block here: leave it out"
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "")
    settings = {"reshard_after_forward": bool(plugin.reshard_after_forward), "min_params": plugin.min_num_params or MIN_PARAMS}
    if policy == "NO_WRAP":
        settings["min_params"] = float("inf")
    return "fsdp2", settings, bool(plugin.activation_checkpointing)


class Own(NamedTuple):
    """What a configuration file of DeepSpeed's says of what Accelerate's says otherwise."""

    precision: str
    accumulation: int


def without_deepspeed(error: Exception) -> InputError:
    """The refusal of ZeRO on a machine where DeepSpeed is missing or broken; DDP and FSDP2 do not need it."""
    return InputError(
        f"the Accelerate config asks for DeepSpeed, which cannot be imported ({reason(error)}): pip install deepspeed, or use "
        f"{named('recipes/accelerate/ddp.yaml')} or fsdp2.yaml"
    )


def _deepspeed() -> tuple[str, dict, Own]:
    try:
        plugin = DeepSpeedPlugin()
    except ImportError as error:
        raise without_deepspeed(error) from None
    given = plugin.deepspeed_config
    zero = {key: value for key, value in given["zero_optimization"].items() if value != "auto"}
    if (stage := zero.get("stage")) not in (1, 2, 3):
        raise InputError(
            f"the Accelerate config asks for zero_stage {stage}; choose 1, 2 or 3, or {named('recipes/accelerate/ddp.yaml')}"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.pop(key, None) or {}).get("device", "none") != "none":
            raise InputError(f"the Accelerate config asks for DeepSpeed's {key}; these networks are small: set its device to none")
    clipping = given.get("gradient_clipping", "auto")
    if clipping not in ("auto", 0, 0.0, None):
        raise InputError(
            f"the Accelerate config asks for gradient_clipping {clipping}; leave it out, and set keys "
            "'phases.*.optimizer.clip_norm' and 'architecture.optimizer.clip_norm'"
        )
    if own := [key for key in ("optimizer", "scheduler") if key in given]:
        raise InputError(f"the DeepSpeed configuration has its own {' and '.join(own)}; the recipe has that: leave it out")
    passed = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown", "comms_logger"}
    used = {"zero_optimization", "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping"}
    settled = {"train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print", "zero_allow_untested_optimizer"}
    if unknown := [key for key, value in given.items() if key not in passed | used | settled and value != "auto"]:
        raise InputError(f"the DeepSpeed configuration says {', '.join(unknown)}, which is not heeded here: leave it out")
    on = [name for name in ("bf16", "fp16") if (given.get(name) or {}).get("enabled") is True]
    accumulation = given.get("gradient_accumulation_steps")
    own = Own(on[0] if on else "no", accumulation if isinstance(accumulation, int) else 1)
    configuration = {key: value for key, value in given.items() if key in passed and value != "auto"}
    # Sizes of batches only matter to its log: a step is one call, whatever it is made of.
    configuration |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": 2**62}
    configuration |= {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    return f"zero{stage}", {"deepspeed": configuration}, own


def _check_launcher() -> None:
    """Raise InputError if this process is alone because Accelerate let go of what its config asks for: with --cpu it starts one
    process without a word, whatever else is said there."""
    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return
    if not _is_on("ACCELERATE_USE_CPU") or not any(word.endswith("launch") for word in words):
        return
    from accelerate.commands.config.config_args import default_yaml_config_file, load_config_from_file

    path = _said(words, "config_file", default_yaml_config_file)
    config = load_config_from_file(path) if Path(path).is_file() else None
    kind = "DDP" if config is None else str(getattr(config.distributed_type, "value", config.distributed_type))
    processes = int(_said(words, "num_processes", "0")) or (config and config.num_processes) or 1
    if kind in ("FSDP", "DEEPSPEED") or processes > 1:
        path = "the command line" if config is None else path
        raise InputError(
            f"{path} asks for {kind} with {processes} processes, but with --cpu Accelerate starts a single one without it; "
            "leave --cpu out, since whether there is a GPU is found out here"
        )


def _said(words: list[str], option: str, default: str) -> str:
    """The value of an option of the launcher's, in any of its spellings."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            return value if equals else following
    return default
