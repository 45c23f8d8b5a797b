"""Guarantee 7 where a mesh holds the weights: what Accelerate and torch's DCP save resumes bit for bit in the same
layout, and with the same noise and F in another one, on another number of processes.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import chosen, night, run_each
from engines import accelerator_of, llama, next_word_loss, on_cpus, plain_name, sentences
from engines import snapshot as weights_of
from sharded import HIDDEN, Case, Net, assert_same, mesh_of, seen_weights, shard, snapshot, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import mse_loss

from hf_rwp import RWP

OPTIONS = {"seed": 5, "eta": 20.0, "beta": 0.9}
BEFORE, AFTER = 2, 2  # windows
KINDS = ["nested", "flat", "full"]
TIMES = ["boundary", "middle"]


class Said(logging.Handler):
    """What the package's loggers said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Said":
        logging.getLogger("hf_rwp").addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("hf_rwp").removeHandler(self)


# torch's DCP


def build(engine: str, **options: Any) -> tuple[torch.nn.Module, RWP]:
    """The same model in any layout."""
    torch.manual_seed(0)
    case, model = Case(engine), Net(HIDDEN).double()
    shard(case, model, mesh_of(case))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, RWP(base, model, gamma=0.2, alpha=0.4, accumulation_steps=2, **{**OPTIONS, **options})


def go_on(model: Any, optimizer: Any, windows: range, half: bool = False) -> list[Any]:
    """Train, on the same batches in all processes; the weights that each forward pass saw.

    half: end in the middle of a micro-step, whose forward pass is done and whose backward pass is to come; on one
    replica its noise is in the weights.
    """
    with seen_weights(model) as seen:
        for index in range(windows.start * 2, windows.stop * 2 + 2 * half):
            generator = torch.Generator().manual_seed(index)
            x, y = (torch.randn(3, *of, dtype=torch.float64, generator=generator) for of in ((5, 6), (3,)))
            loss = mse_loss(model(x), y) / 2
            if index < windows.stop * 2 + half:
                loss.backward()
                if index % 2:
                    optimizer.step()
                    optimizer.zero_grad()
    return list(seen)


def options_of(kind: str) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=kind == "flat", full_state_dict=kind == "full")


def fisher(optimizer: Any) -> dict[str, torch.Tensor]:
    """F of every weight, whole. Collective."""
    named = {id(p): plain_name(name) for name, p in optimizer.model.named_parameters()}
    state = optimizer.state_dict()
    keys = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        name: whole(state["state"][key]["rwp_fisher"]).flatten()
        for key, name in enumerate(keys)
        if "rwp_fisher" in state["state"].get(key, {})
    } or {name: f.flatten() for name, f in state["rwp"]["fisher"].items()}


def save(engine: str, kinds: dict[str, list[str]], folder: str) -> dict[str, Any]:
    """Train, save, in the middle of a window too; and what another run does that is not interrupted.

    kinds: what to save, by the time of saving."""
    model, optimizer = build(engine)
    go_on(model, optimizer, range(BEFORE))
    found = {"at": snapshot(model), "fisher": fisher(optimizer)}
    for name in TIMES:
        if name == "middle":
            go_on(model, optimizer, range(BEFORE, BEFORE), half=True)
        for kind in kinds[name]:
            state = {
                "model": get_model_state_dict(model, options=StateDictOptions(full_state_dict=kind == "full")),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options_of(kind)),
            }
            dcp.save(state, checkpoint_id=str(Path(folder) / f"{engine}-{name}-{kind}"))
    model, optimizer = build(engine)
    found["seen"] = go_on(model, optimizer, range(BEFORE + AFTER))[2 * BEFORE :]
    return {**found, "after": snapshot(model), "fisher after": fisher(optimizer)}


def load(engine: str, of: str, name: str, kind: str, folder: str) -> dict[str, Any]:
    """Load what `save(of)` saved into a new run of `engine`, and train on."""
    model, optimizer = build(engine, seed=77)
    with Said() as said:
        load_into(model, optimizer, Path(folder) / f"{of}-{name}-{kind}", kind)
    own = [(group["rwp_seed"], group["rwp_windows"]) for group in optimizer.param_groups]
    found = {"at": snapshot(model), "own": own, "fisher": fisher(optimizer), "said": said.lines}
    found["seen"] = go_on(model, optimizer, range(BEFORE, BEFORE + AFTER))
    return {**found, "after": snapshot(model), "fisher after": fisher(optimizer)}


def load_into(model: Any, optimizer: Any, folder: Path, kind: str) -> None:
    model_options = StateDictOptions(full_state_dict=kind == "full")
    state = {
        "model": get_model_state_dict(model, options=model_options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options_of(kind)),
    }
    dcp.load(state, checkpoint_id=str(folder))
    set_model_state_dict(model, state["model"], options=model_options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options_of(kind))


ELSEWHERE = {"fsdp": ["fsdp2ranks", "tp2ranks", "plain"], "hsdp": ["hsdp_tp"], "fsdp_tp": ["fsdp2ranks"]}
SAME = [("fsdp", "boundary", kind) for kind in KINDS]
SAME += [(engine, "middle", kind) for engine in ELSEWHERE for kind in KINDS]
SAME_NIGHT = [("fsdp", "boundary", "flat"), ("fsdp", "boundary", "full"), ("fsdp", "middle", "full")]
SAME_NIGHT += [("hsdp", "middle", "nested"), ("hsdp", "middle", "flat")]
SAME_NIGHT += [("fsdp_tp", "middle", "nested"), ("fsdp_tp", "middle", "flat")]
OTHER = [(of, to, kind) for of, engines in ELSEWHERE.items() for to in engines for kind in ("nested", "full")]
OTHER_NIGHT = [("fsdp", "fsdp2ranks", "full"), ("fsdp", "tp2ranks", "nested"), ("fsdp", "plain", "nested")]
OTHER_NIGHT += [("hsdp", "hsdp_tp", "full"), ("fsdp_tp", "fsdp2ranks", "nested")]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What was saved, by engine; and what came of loading it, by (engine, of, name, kind)."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    loads = sorted((of, of, name, kind) for of, name, kind in chosen(request, "engine", "name", "kind"))
    loads += sorted((to, of, "middle", kind) for of, to, kind in chosen(request, "of", "to", "kind"))
    wanted = {load[1:] for load in loads}
    saves = [
        (engine, {at: [kind for kind in KINDS if (engine, at, kind) in wanted] for at in TIMES}) for engine in ELSEWHERE
    ]
    saved, loaded = {}, {}
    for function, cases, found in ((save, saves, saved), (load, loads, loaded)):
        for world in (4, 2, 1):
            here = [case for case in cases if Case(case[0]).world == world]
            answers = run_each(world, function, [(*case, folder) for case in here], timeout=120, keep_group=True)
            found.update(zip([case[0] if function is save else case for case in here], answers, strict=True))
    return saved, loaded


@pytest.mark.parametrize(("engine", "name", "kind"), night(SAME, SAME_NIGHT))
def test_resume_is_bit_exact_in_the_same_layout(runs, engine, name, kind):
    saved, loaded = runs
    for through, again in zip(saved[engine], loaded[engine, engine, name, kind], strict=True):
        assert_same(again["at"], through["at"])
        assert set(again["own"]) == {(5, BEFORE)}
        assert sum("rwp_seed" in line for line in again["said"]) == 1
        lost = kind == "flat"  # torch takes back no state that the base has not
        assert sum("no F of ARWP" in line for line in again["said"]) == len(again["said"]) - 1 == lost
        assert any(f.any() for f in through["fisher"].values())
        if not lost:
            assert_same(again["fisher"], through["fisher"])
            assert_same(again["seen"], through["seen"])
            assert_same(again["after"], through["after"])
            assert_same(again["fisher after"], through["fisher after"])


@pytest.mark.parametrize(("of", "to", "kind"), night(OTHER, OTHER_NIGHT))
def test_another_layout_goes_on_with_the_same_noise(runs, of, to, kind):
    saved, loaded = runs
    through = saved[of][0]
    clean = through["at"]
    for again in loaded[to, of, "middle", kind]:
        assert_same(again["at"], clean)
        assert set(again["own"]) == {(5, BEFORE)}
        assert any("no F of ARWP" in line for line in again["said"]) == (to == "plain")
        if to != "plain":
            assert_same(again["fisher"], through["fisher"])
            for name, weight in again["after"].items():
                torch.testing.assert_close(weight, through["after"][name], rtol=1e-11, atol=1e-13)
    if to != "plain":  # to the rounding of a cut filter's norm, whose squares are added up in another order
        seen = [again["seen"][:2] for again in loaded[to, of, "middle", kind]]
        assert all(any(alike(own, run["seen"][:2]) for run in saved[of]) for own in seen)
        assert not all(alike(own, [clean, clean]) for own in seen)


def alike(some: Any, others: Any) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(some, others, strict=True) for name in a]
    return all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in pairs)


# Accelerate's save_state and load_state


def accelerated(sizes: dict[str, int], state: str, folder: str, do: str, seed: int = 5) -> dict[str, Any]:
    """do: `through`, train without a break; `save`, in the middle of a micro-step; `load`, and train on."""
    with on_cpus():
        fsdp = {"state_dict_type": state, "activation_checkpointing": True}
        accelerator = accelerator_of(fsdp, sizes, gradient_accumulation_steps=2)
        model = llama(tied=True)
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = RWP(base, model, gamma=0.2, alpha=0.4, **{**OPTIONS, "seed": seed})
        model, optimizer = accelerator.prepare(model, optimizer)
    rwp, folder = optimizer.optimizer, f"{folder}/{'-'.join([state, *sizes])}"
    with Said() as said:
        if do == "load":
            accelerator.load_state(folder)
    for index in range(*{"through": (0, 8), "save": (0, 4), "load": (4, 8)}[do]):
        ids = sentences(2, seed=10 * index + dist.get_rank())
        with accelerator.accumulate(model):
            accelerator.backward(next_word_loss(model(ids), ids))
            optimizer.step()
            optimizer.zero_grad()
    if do == "save":
        for _ in range(2):  # the second one's noise is in the weights, on some
            loss = next_word_loss(model(sentences(2)), sentences(2))
            accelerator.save_state(folder)
            loss.backward()
    own = {key: rwp.param_groups[0][key] for key in ("rwp_seed", "rwp_windows")}
    return {"at": weights_of(model), "own": own, "fisher": fisher(rwp), "said": said.lines}


LAYOUTS = {"fsdp": (2, {}), "hsdp": (4, {"dp_replicate_size": 2, "dp_shard_size": 2})}
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"


@pytest.fixture(scope="module")
def accelerated_runs(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("accelerated"))
    found = {}
    for layout, (world, sizes) in LAYOUTS.items():
        states = sorted(state for own, state in chosen(request, "layout", "state") if own == layout)
        cases = [(sizes, state, folder, do) for state in states for do in ("through", "save")]
        cases += [(sizes, state, folder, "load", 77) for state in states]
        answers = run_each(world, accelerated, cases, timeout=120, keep_group=True)
        found |= {(layout, case[1], case[3]): ranks for case, ranks in zip(cases, answers, strict=True)}
    return found


@pytest.mark.parametrize(
    ("layout", "state"),
    night([(layout, state) for layout in LAYOUTS for state in (SHARDED, FULL)], [("fsdp", FULL), ("hsdp", SHARDED)]),
)
def test_resume_through_accelerate_is_bit_exact(accelerated_runs, layout, state):
    through, again = (accelerated_runs[layout, state, do] for do in ("through", "load"))
    for one, other in zip(through, again, strict=True):
        assert other["own"] == one["own"] == {"rwp_seed": 5, "rwp_windows": 4}
        assert_same(other["at"], through[0]["at"])
        assert_same(other["fisher"], one["fisher"])
        assert one["fisher"].keys() == one["at"].keys()
        assert [line for line in other["said"] if "place of" in line] == other["said"] != []
