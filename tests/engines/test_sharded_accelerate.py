"""An unchanged Accelerate loop where a mesh holds the weights: FSDP2, HSDP, tensor and context parallelism, on gloo."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
from distributed import chosen, night, run_each
from engines import (
    accelerator_of,
    gradients,
    llama,
    load_llama,
    next_word_loss,
    on_cpus,
    seen_weights,
    sentences,
    snapshot,
)
from sharded import Window, assert_same

from hf_rwp import RWP

WINDOWS, BATCH = 2, 2
CLIPPED = 1e-6 if torch.__version__ < (2, 9) else 1e-11  # torch 2.8 clips less exactly than that
SIZES = {
    "hsdp": {"dp_replicate_size": 2, "dp_shard_size": 2},
    "fsdp": {},
    "tp": {"tp_size": 2},
    "fsdp_cp": {"dp_shard_size": 2, "cp_size": 2},
}


@dataclass(frozen=True)
class Case:
    """clip: the norm that gradients are clipped to. folder: of a model that transformers shards as it loads it."""

    engine: str = "hsdp"
    alpha: float = 0.3
    accumulation: int = 1
    tied: bool = False
    clip: float | None = None
    folder: str | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    windows: int = WINDOWS

    @property
    def world(self) -> int:
        return 2 if self.engine in ("fsdp", "tp") else 4

    @property
    def replicas(self) -> int:
        return SIZES[self.engine].get("dp_replicate_size", 1)

    def replica(self, rank: int) -> int:
        return rank * self.replicas // self.world


def setup(case: Case):
    fsdp = None if case.engine == "tp" else case.fsdp
    accelerator = accelerator_of(fsdp, SIZES[case.engine], gradient_accumulation_steps=case.accumulation)
    model = load_llama(case.folder, **SIZES[case.engine]).train() if case.folder else llama(case.tied)
    optimizer = RWP(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, gamma=0.2, alpha=case.alpha)
    data = sentences(case.world * BATCH * case.accumulation * case.windows)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def record(case: Case) -> tuple[list[Window], list[float], list[torch.Tensor]]:
    """The windows, their gradients' norms if clipped, and what an evaluation after each saw, all as this rank did."""
    with on_cpus():
        accelerator, model, optimizer, loader = setup(case)
        evaluation = accelerator.prepare(torch.utils.data.DataLoader(sentences(11, seed=1), batch_size=BATCH))
    windows, norms, losses = [Window(snapshot(model))], [], []

    def stepping(*_: Any) -> None:
        windows[-1].stepped, windows[-1].gradient = snapshot(model), gradients(model)

    optimizer.optimizer.base.register_step_pre_hook(stepping)
    with seen_weights(model) as seen:
        for ids in loader:
            with accelerator.accumulate(model):
                loss = next_word_loss(model(ids), ids)
                windows[-1].batches.append((ids, ids))
                windows[-1].roles.append(optimizer.optimizer.role)
                accelerator.backward(loss)
                if accelerator.sync_gradients and case.clip is not None:
                    norm = accelerator.clip_grad_norm_(model.parameters(), case.clip)
                    norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                windows[-1].seen, seen[:] = seen[:], []
                windows.append(Window(snapshot(model)))
                losses.append(evaluate(accelerator, model, evaluation))
    return windows, norms, losses


@torch.no_grad()
def evaluate(accelerator, model, loader) -> torch.Tensor:
    model.eval()
    losses = [
        accelerator.gather_for_metrics(torch.stack([next_word_loss(model(s[None]), s[None]) for s in ids]))
        for ids in loader
    ]
    model.train()
    return torch.cat(losses)


def assert_mixed(case: Case, ranks: list[Any], tolerance: float = 1e-14) -> None:
    """Every step used the paper's mix, at clean weights, and so did evaluation; peers shared role and noise."""
    net = llama(case.tied)
    for number, windows in enumerate(zip(*(own[0] for own in ranks), strict=True)):
        clean = windows[0].weights
        for window in windows:
            assert_same(window.weights, clean)
        if number == case.windows:
            break
        noises = [reference.noises(window.seen, clean) for window in windows]
        for rank, own in enumerate(noises):
            assert_same(windows[rank].stepped, clean)
            index = case.replica(rank) if case.replicas > 1 else None
            order = [index] * case.accumulation if index is not None else range(case.accumulation)
            assert [noise is not None for noise in own] == [case.alpha == 1 or at % 2 == 1 for at in order]
            peer = next(other for other in range(case.world) if case.replica(other) == case.replica(rank))
            assert_same(own, noises[peer])
        expected = reference.mixed_gradient(
            net,
            clean,
            [noise for own in noises for noise in own],
            [batch for window in windows for batch in window.batches],
            next_word_loss,
            case.alpha,
        )
        factor = 1.0
        if case.clip is not None:
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected.values()])).item()
            factor = min(1.0, case.clip / (norm + 1e-6))
            assert factor < 1
            for _, norms, _ in ranks:
                assert norms[number] == pytest.approx(norm, rel=1e-9)
        for window in windows:
            assert window.gradient.keys() == expected.keys()
            for name, gradient in window.gradient.items():
                rtol = 1e-11 if case.clip is None else CLIPPED
                torch.testing.assert_close(gradient, expected[name] * factor, rtol=rtol, atol=tolerance)
        after = ranks[0][0][number + 1].weights
        with torch.no_grad():
            rows = sentences(11, seed=1)
            outputs = [torch.func.functional_call(net, after, (row[None],)) for row in rows]
            plain = torch.stack([next_word_loss(o, row[None]) for o, row in zip(outputs, rows, strict=True)])
        for _, _, losses in ranks if case.engine in ("hsdp", "fsdp") else ():
            torch.testing.assert_close(losses[number], plain, rtol=1e-6, atol=0)


CASES = {
    "hsdp": Case(tied=True, windows=5),
    "hsdp, accumulation, checkpointing": Case(accumulation=2, fsdp={"activation_checkpointing": True}),
    "hsdp, tied, checkpointing": Case(tied=True, fsdp={"activation_checkpointing": True}),
    "hsdp, clipping": Case(accumulation=3, clip=0.05, fsdp={"reshard_after_forward": False}),
    "hsdp, alpha 1": Case(alpha=1.0),
    "fsdp": Case("fsdp", accumulation=2, windows=5),
    "fsdp, tied, checkpointing": Case("fsdp", accumulation=2, tied=True, fsdp={"activation_checkpointing": True}),
    "fsdp, tied, clipping": Case("fsdp", accumulation=3, tied=True, clip=0.05),
    "fsdp, no reshard": Case("fsdp", 1.0, fsdp={"reshard_after_forward": False}),
    "context parallel": Case("fsdp_cp", accumulation=2),
}
NIGHT = ["hsdp, tied, checkpointing", "hsdp, alpha 1", "fsdp, tied, clipping"]


@pytest.fixture(scope="module")
def runs(request):
    """By case, what every rank saw."""
    names, found = chosen(request, "name"), {}
    for world in (4, 2):
        cases = {name: case for name, case in CASES.items() if case.world == world and name in names}
        answers = run_each(world, record, [(case,) for case in cases.values()], timeout=120, keep_group=True)
        found |= dict(zip(cases, answers, strict=True))
    return found


@pytest.mark.parametrize("name", night(CASES, NIGHT))
def test_step_gradient_is_the_mix_through_prepare(runs, name):
    assert_mixed(CASES[name], runs[name])


def test_step_gradient_is_the_mix_where_transformers_loads_the_parts(tmp_path):
    llama().save_pretrained(tmp_path)
    cases = [Case("tp", accumulation=accumulation, folder=str(tmp_path)) for accumulation in (2, 3)]
    answers = run_each(2, record, [(case,) for case in cases], timeout=120, keep_group=True)
    for case, ranks in zip(cases, answers, strict=True):
        assert_mixed(case, ranks)
