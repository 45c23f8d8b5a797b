"""The last screen of a run: its figures, what RWP did in words, and the commands that come next."""

import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_rwp.runs.counts import class_count, few_classes
from hf_rwp.runs.given import OF_A_SESSION, Flags, join_flags
from hf_rwp.runs.records import Results, Row, aligned
from hf_rwp.runs.screen import fitted

COLUMNS = 80
_SPACE, _LINE_END = "\0", "\n"
# A rise of the loss by r makes the right class exp(-r) times as likely: by a twentieth less, by two fifths less.
FLAT, SHARP = 0.05, 0.5
SMALL, USUAL = 0.05, "5 to 70 %"  # noise relative to the weights of the largest layer
_FEW = 50  # gradients at noisy weights: their mean loss is not yet one of all images
_GUESSING = 0.9  # of the loss of guessing: what is nearer to it has learned next to nothing
_DATA = ("data_dir", "dataset", "dataset_config", "train_split", "validation_split", "image_column", "label_column")


def last_screen(results: Results, written: Sequence[Path], next_commands: Mapping[str, str]) -> str:
    """All of it. written: paths in the run's folder. next_commands: by what each is for, see `commands`."""
    parts = [summary(results), wrapped(in_words(results)), said_of_files(written), with_comments(next_commands)]
    return "\n\n".join(part for part in parts if part)


def said_of_files(written: Sequence[Path]) -> str:
    """Which files there are now, with the folder of the first, which all of them are below, as it can be copied."""
    folder = written[0].parent
    place, *names = map(_quoted, (folder, *(path.relative_to(folder) for path in written)))
    return wrapped(f"Wrote to {place}: {', '.join(names)}")


def summary(results: Results) -> str:
    """The results as two columns of text."""
    final, arguments = results["final"], results["arguments"]
    rows: dict[str, Any] = {
        "method": method_of(arguments),
        "replicas": results["hardware"]["replicas"],
        "epochs": f"{final['epoch']:g}",
        "top-1": f"{final['top1']:.2%}",
    }
    if "top5" in final and not few_classes(results):
        rows["top-5"] = f"{final['top5']:.2%}"
    if "best" in results:
        rows["top-1, best checkpoint"] = f"{results['best']['top1']:.2%}"
    if "top1_ema" in final:
        rows["top-1, average of weights"] = f"{final['top1_ema']:.2%}"
    unreadable = final.get("unreadable_images", 0) + final.get("unreadable_eval_images", 0)
    if unreadable:
        rows["unreadable images"] = unreadable
    if "train_loss" in final:
        rows["training loss"] = f"{final['train_loss']:.4f}"
    rows["training seconds"] = f"{results['seconds']:.1f}"
    speed = final["images_per_second"]
    rows["images per second"] = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    if "rwp" in final:
        rwp = final["rwp"]
        losses = [
            f"{loss:.4f}" if loss is not None else "-" for loss in map(final.get, ("loss_clean", "loss_perturbed"))
        ]
        rows |= {
            "placement": rwp["placement"],
            "slots, clean / perturbed": f"{rwp['slots']['clean']} / {rwp['slots']['perturbed']}",
            "loss, clean / perturbed": " / ".join(losses),
        }
        for which, layer in rwp["relative_noise"].items():
            rows[f"noise / weights, {which} layer"] = f"{layer['size']:.2g} ({layer['name']})"
    return fitted(aligned(rows), indent=" " * (max(map(len, rows)) + 2))


def noise_sizes(report: Mapping[str, Any]) -> str:
    """The noise's size relative to the weights of the largest layer, as `RWP.report` measured it; empty before."""
    layer = report["relative_noise"].get("largest")
    return f"{layer['size']:.2g} in the largest layer ({layer['name']})" if layer else ""


def in_words(results: Results) -> str:
    """What RWP did, for someone who does not know its terms; empty for SAM."""
    final, arguments = results["final"], results["arguments"]
    method = method_of(arguments)
    if method != "rwp" or "rwp" not in final:
        return "Plain training: no weight was perturbed." if method == "base" else ""
    slots = final["rwp"]["slots"]
    count = slots["clean"] + slots["perturbed"]
    if not slots["perturbed"]:
        return f"RWP did nothing: no gradient of {count:,} was perturbed (a gamma of 0, or --rwp_start not reached)."
    said = f"RWP took {slots['perturbed']:,} of {count:,} gradients with noise in the weights."
    largest = final["rwp"]["relative_noise"].get("largest")
    return f"{said} {_verdict(results, largest)}" if largest and math.isfinite(largest["size"]) else said


def _verdict(results: Results, layer: Mapping[str, Any]) -> str:
    """What the noise did to the loss of the last epoch. layer: the largest, and the noise's size relative to it."""
    final: Row = results["final"]
    size = f"Noise of {layer['size']:.2g} times" if layer["size"] > 1 else f"Noise of {_percent(layer['size'])} of"
    noise = f"{size} the largest layer's weights ({layer['name']})"
    if "loss_clean" not in final or "loss_perturbed" not in final:
        return f"{noise} was in all of the last epoch, so that what it did to the loss was not measured."
    clean, perturbed = final["loss_clean"], final["loss_perturbed"]
    rise = perturbed - clean
    what = f"raised the training loss by {_figure(rise)}" if rise > 0 else "did not raise the training loss"
    return f"{noise} {what} in the last epoch, from {clean:.4f} to {perturbed:.4f}: {flatness(results, rise, layer)}."


def flatness(results: Results, rise: float, layer: Mapping[str, Any]) -> str:
    """How flat the loss is around the weights, as far as its rise by noise tells. rise: in nats."""
    if results["arguments"].get("bce_loss"):
        return "a mean over classes, which has no scale from flat to sharp"
    classes = class_count(results)
    if classes and classes > 1 and results["final"]["loss_clean"] > _GUESSING * math.log(classes):
        return f"little is learned yet (guessing has {math.log(classes):.2f}), so that this says nothing of flatness"
    if results["final"]["rwp"]["slots"]["perturbed"] < _FEW:
        return "too few gradients to tell flat from sharp"
    if rise >= SHARP:
        return "sharp. A smaller --rwp_gamma disturbs less"
    if layer["size"] < SMALL:
        return f"noise too small to tell flat from sharp (usual are {USUAL})"
    return "flat" if rise <= FLAT else "neither flat nor sharp"


def commands(
    folder: Path,
    recipe: str,
    results: Results,
    given: Flags,
    *,
    logs: Path | None,
    processes: int = 1,
    repo_id: str | None = None,
) -> dict[str, str]:
    """What to do next, by what it is for: to predict, to look, and to compare, or to push where that was meant.

    Curves are compared with those of an earlier run, where there is one. recipe: the command of `hf-rwp`. given: the
    flags that the run was given. logs: TensorBoard's, if there are any. processes: that trained. repo_id: on the Hub,
    where the run was to go and was not pushed.
    """
    model, method = str(folder), method_of(results["arguments"])
    found = {"predict": shlex.join(["hf-rwp", "predict", model, "IMAGE"])}
    found["look"] = shlex.join(["tensorboard", "--logdir", str(logs)] if logs else ["hf-rwp", "landscape", model])
    other = beside(folder, method)
    found |= curves_beside(folder, other)
    if repo_id:
        return found | {"push": shlex.join(["hf-rwp", "push", str(folder / "model"), repo_id])}
    if other is not None and (other / "model").is_dir():
        data = {name: given[name] for name in _DATA if name in given}
        return found | {"compare": shlex.join(["hf-rwp", "landscape", model, str(other), *join_flags(data)])}
    kept = {name: values for name, values in given.items() if name not in OF_A_SESSION and not _is_own(name)}
    start = ["hf-rwp", recipe, *(["--processes", str(processes)] if processes > 1 else [])]
    words = [*start, f"--rwp={'true' if method == 'base' else 'false'}", *join_flags(kept)]
    return found | {"compare": shlex.join(words)}


def curves_beside(folder: Path, other: Path | None) -> dict[str, str]:
    """The command that draws a run's curves beside those of `other`, else of the run before it in its row of folders
    (outputs/NAME, outputs/NAME/2, ...); empty where there is neither."""
    if other is None and folder.name.isdigit():
        number = int(folder.name) - 1
        before = folder.with_name(str(number)) if number > 1 else folder.parent
        other = before if (before / "results.json").is_file() else None
    return {} if other is None else {"curves": shlex.join(["hf-rwp", "curves", str(folder), str(other)])}


def beside(folder: Path, method: str) -> Path | None:
    """The finished run that differs from the one in `folder` by the method in its name, if there is one."""
    places = [folder, folder.parent] if folder.name.isdigit() else [folder]  # outputs/NAME/2
    name = next((path.name for path in places if f"_{method}_" in path.name), "")
    others = [another for another in ("base", "rwp") if another != method] if name else []
    found = [places[-1].with_name(name.replace(f"_{method}_", f"_{another}_")) for another in others]
    return next((path for path in found if (path / "results.json").is_file()), None)


def with_comments(next_commands: Mapping[str, str]) -> str:
    """Commands to copy, each with what it is for as the shell's comment.

    One that a line does not hold stands below its comment, on lines that the shell takes for one; one that has lines
    of its own keeps them.
    """
    room = COLUMNS - max(map(len, next_commands), default=0) - 4
    width = max((len(command) for command in next_commands.values() if len(command) <= room), default=0)
    return "\n".join(
        f"{command:<{width}}  # {name}"
        if len(command) <= room
        else f"# {name}\n{command if _LINE_END in command else continued(command)}"
        for name, command in next_commands.items()
    )


def continued(command: str) -> str:
    """A command of a shell on lines that end in a backslash, parted between its words; a longer word stays whole."""
    return wrapped(" ".join(map(_quoted, shlex.split(command))), COLUMNS - 2, indent="    ").replace("\n", " \\\n")


def method_of(arguments: Mapping[str, Any]) -> str:
    return arguments.get("method") or ("rwp" if arguments.get("rwp") else "base")


def _is_own(name: str) -> bool:
    """Whether a flag is of the method, or of where this run goes."""
    return name in ("method", "rwp") or name.startswith(("rwp_", "sam_", "hub_", "push_to_hub"))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def _figure(rise: float) -> str:
    return f"{rise:.2f}" if rise >= 0.1 else f"{rise:.1g}"


def _quoted(word: str | Path) -> str:
    """As a shell takes it, and `wrapped` leaves it whole."""
    return shlex.quote(str(word)).replace(" ", _SPACE)


def wrapped(text: str, columns: int = COLUMNS, indent: str = "") -> str:
    """Text in lines, all but the first indented. Words stay whole, and `_SPACE` is a space that parts none."""
    options: Any = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, columns, **options).replace(_SPACE, " ")
