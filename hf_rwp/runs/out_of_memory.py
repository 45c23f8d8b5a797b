"""Where memory ends: what to try, the batch in smaller parts where that is possible, or a smaller one."""

import os
import traceback
from typing import Any

from hf_rwp.core.placement import fewest_micro_steps

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "OutOfMemoryError", "ALLOC_FAILED")
_SMALLER = "a smaller model, or smaller images or texts"
_MAKING = {"create_model", "create_small_model", "from_pretrained"}  # no batch is there yet
_EVALUATIONS = {"evaluate", "evaluation_loop", "validate"}


def advice(error: BaseException, arguments: Any) -> str | None:
    """What to say of an error where memory ended; None for other errors. arguments: the flags; None if not known."""
    told = isinstance(error, RuntimeError) or type(error).__name__ == "ProcessRaisedException"  # of torch's spawn
    if not (isinstance(error, MemoryError) or (told and _is_sign(str(error)))):
        return None
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    tried = f"try {_SMALLER}" if names & _MAKING else _try(arguments, bool(names & _EVALUATIONS))
    return f"out of memory{_where(error)}: {tried}"


def _is_sign(message: str) -> bool:
    return any(sign in message for sign in _SIGNS)


def _where(error: BaseException) -> str:
    on_cpu = isinstance(error, MemoryError) or "CPU" in str(error) or "can't allocate" in str(error)
    return "" if on_cpu else " on the GPU"


def _try(arguments: Any, evaluating: bool) -> str:
    names = ("per_device_train_batch_size", "batch_size")
    name = next((name for name in names if isinstance(getattr(arguments, name, None), int)), None)
    if name is None:
        return f"try a smaller batch, or {_SMALLER}"
    if name == "batch_size" and hasattr(arguments, "gradient_accumulation_steps") and not evaluating:
        return _smaller_parts(arguments)
    if name == "per_device_train_batch_size" and not evaluating:
        return _more_parts(arguments)
    if name == "per_device_train_batch_size":
        name = "per_device_eval_batch_size"
    size = getattr(arguments, name)
    half = size // 8 * 4 or size // 2
    return f"try --{name} {half} (it was {size}), or {_SMALLER}" if half else f"try {_SMALLER}"


def _smaller_parts(arguments: Any) -> str:
    """For `batch_size` of a whole step, which its parts are cut from."""
    size, parts = arguments.batch_size, max(arguments.gradient_accumulation_steps, _fewest_parts(arguments))
    more = next((count for count in range(2 * parts, size // 2 + 1, parts) if size % count == 0), None)
    half = size // 2 // parts * parts
    smaller = f"--batch_size {half} (it was {size})" if half > parts else _SMALLER
    if more is None:
        return f"try {smaller}"
    return (
        f"try --gradient_accumulation_steps {more}, the same {size} to a step in parts of {size // more}; or {smaller}"
    )


def _more_parts(arguments: Any) -> str:
    """For Trainer's batch, of which a step has as many as it accumulates."""
    size, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    part = size // (_fewest_parts(arguments) if steps == 1 else 1)
    smaller = next((count for count in range(part // 2, 0, -1) if size * steps % count == 0), None)
    if smaller is None:
        return f"try {_SMALLER}"
    return (
        f"try --per_device_train_batch_size {smaller} --gradient_accumulation_steps {size * steps // smaller}, the "
        f"same {size * steps} to a step"
    )


def _fewest_parts(arguments: Any) -> int:
    """What RWP cuts a batch into that is not accumulated; without it one."""
    if not getattr(arguments, "rwp", False) or arguments.rwp_gamma == 0:
        return 1
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    replicas = 1 if sharded else int(os.environ.get("WORLD_SIZE", "1"))
    return fewest_micro_steps(replicas, arguments.rwp_alpha, arguments.rwp_antithetic)
