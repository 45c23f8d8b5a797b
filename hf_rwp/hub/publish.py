"""A run's weights on the Hub: their place ahead of training, pushes beside it, and the last one after it."""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_rwp.hub.arguments import HubArguments
from hf_rwp.hub.push import BackgroundPush, PushError, hf_upload, push, reserve
from hf_rwp.runs.run import Run, on_main


def begin_publishing(args: HubArguments, accelerator: Any, folder: Path) -> BackgroundPush | None:
    """Make the repository ahead of training; returns what pushes beside it, where the strategy says so.

    folder: for what is being pushed. Collective. Raises PushError on all replicas if the repository will never be
    writable.
    """
    if not args.push_to_hub:
        return None
    private = args.hub_private or None
    on_main(accelerator, partial(reserve, str(args.hub_model_id), private=private), PushError)
    if args.hub_strategy == "end" or not accelerator.is_main_process:
        return None
    return BackgroundPush(folder, str(args.hub_model_id), revision=args.hub_revision, private=private)


def publish(args: HubArguments, run: Run) -> None:
    """Push the last weights, or the best ones. On the main process; exits with status 1 where that fails."""
    options: dict[str, Any] = {
        "revision": args.hub_revision,
        "private": args.hub_private or None,
        "tag": args.hub_tag,
    }
    try:
        if run.background is not None:
            run.background.finish()
        folder = run.write_best() if args.hub_strategy == "best" else run.model_folder
        print(f"Pushed to {push(folder, str(args.hub_model_id), message='End of training', **options)}")
    except PushError as error:
        raise SystemExit(f"error: {error}") from None
    except (OSError, RuntimeError, SafetensorError) as error:
        command = hf_upload(run.model_folder, str(args.hub_model_id), **options)
        raise SystemExit(
            f"error: nothing is pushed: {error}\n{run.model_folder} holds the last weights. This pushes them:\n\n"
            f"    {command}"
        ) from None
