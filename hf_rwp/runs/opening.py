"""The first lines of a run: what it found, what it trains, on what and where; the same facts for its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_rwp.runs.given import Given
from hf_rwp.runs.records import scrub_paths
from hf_rwp.runs.screen import fitted
from hf_rwp.runs.sharded import replicas_of_run


def model_facts(name: str, module: nn.Module, source: str | None) -> dict[str, Any]:
    """source: where its weights are from; None for random ones."""
    sizes = {parameter.requires_grad: 0 for parameter in module.parameters()} | {True: 0}
    for parameter in module.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    facts = {"name": name, "weights": sum(sizes.values()), "from": source}
    return facts | ({"trained": sizes[True]} if sizes.get(False) else {})


def data_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `Found.facts` says, without places on this machine and the names of files."""
    kept = {name: value for name, value in found.items() if name != "firsts"}
    return kept | {"notes": [scrub_paths(note) for note in found["notes"]]}


def step_facts(accelerator: Accelerator, per_process: int, parts: int, mixes: bool) -> dict[str, Any]:
    """Images of a step. per_process: of them. parts: that each process's are cut into. mixes: whether RWP mixes two."""
    facts = {"images": per_process * accelerator.num_processes, "images_per_process": per_process, "parts": parts}
    if mixes:
        facts["gradients"] = "side by side, on different replicas" if replicas_of_run(accelerator) > 1 else "by turns"
    return facts


def opening(
    accelerator: Accelerator,
    given: Given,
    found: Sequence[str],
    model: dict[str, Any],
    step: dict[str, Any] | None,
    output_dir: str | Path,
    checkpoint: Path | None = None,
) -> list[str]:
    """The lines. given: the flags. found: what was found in the data. model, step: as above; None without training.

    checkpoint: whose weights come in place of the model's own.
    """
    origin = checkpoint.name if checkpoint else model["from"]
    source = f", weights from {origin}" if origin else ", random weights"
    trained = f", {model['trained']:,} of them trained" if "trained" in model else ""
    replicas, processes = replicas_of_run(accelerator), accelerator.num_processes
    shards = f" of {processes // replicas} processes each" if processes != replicas else ""
    lines = [
        *given.lines(),
        *found,
        f"model: {model['name']}, {model['weights']:,} weights{trained}{source}",
        f"devices: {_counted(replicas, 'replica')}{shards} on {accelerator.device.type}, mixed precision: "
        f"{accelerator.mixed_precision}",
    ]
    if step is not None:
        lines.append(f"images per step: {step['images']:,}{_parts(step, processes)}")
    return [*lines, f"writes to: {output_dir}"]


def say(accelerator: Accelerator, lines: Sequence[str]) -> None:
    """Print the lines in the main process, none wider than its terminal."""
    accelerator.print(fitted("\n".join(lines)), flush=True)


def _parts(step: dict[str, Any], processes: int) -> str:
    said = [f"{step['images_per_process']:,} a process"] if processes > 1 else []
    halved = step["parts"] == 2 and step.get("gradients") == "by turns"
    if halved:
        said.append("in halves, a clean and a perturbed gradient")
    elif step["parts"] > 1:
        said.append(f"in {step['parts']} parts")
    if "gradients" in step and not halved:
        said.append(f"clean and perturbed gradients {step['gradients']}")
    return f" ({', '.join(said)})" if said else ""


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
