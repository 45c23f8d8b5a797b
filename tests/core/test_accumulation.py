"""`Accumulation.length`, said as a window begins, against the micro-steps after which Accelerate ended that window.

Real loaders and `Accelerator.accumulate`: 1 to 5 accumulation steps, 1 to 9 batches, 1 to 3 micro-steps to a batch:
less than a window, exactly one, one and a bit, several.
What cannot be known ahead has tests of its own, that say what is given instead: `inexact` is in their names.
"""

import gc
import itertools
import types
import weakref
from dataclasses import dataclass

import distributed
import pytest
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SkipDataLoader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hf_rwp.core import accumulation as module
from hf_rwp.core.accumulation import Accumulation

PLANS = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 5), (3, 2), (3, 3), (3, 4), (3, 6), (3, 8), (4, 7), (5, 3), (5, 6), (5, 9)]
SPLITS = range(1, 4)
KINDS = ["map", "iterable", "dispatched", "workers"]


class Stream(IterableDataset):
    """Numbers from 0 on; with a length if `sized`."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class SizedStream(Stream):
    def __len__(self):
        return self.count


def no_accelerate():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@dataclass
class Window:
    """said: the length that `Accumulation` gave. epoch, batch: where it began. micro_steps: that it had in the end."""

    said: int
    epoch: int
    batch: int
    micro_steps: int = 0


class Loop:
    """A training loop that writes down its windows."""

    def __init__(self, steps, kind="map", **options):
        no_accelerate()
        data = DataLoaderConfiguration(
            dispatch_batches=kind == "dispatched", use_stateful_dataloader=kind == "stateful"
        )
        plugin = GradientAccumulationPlugin(num_steps=steps, **options)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin, dataloader_config=data)
        self.kind = kind
        self.model = nn.Linear(1, 1)
        self.accumulation = Accumulation()
        self.windows = []
        self.opens = True
        self.epoch = -1

    def loader(self, batches):
        data = SizedStream(2 * batches) if self.kind == "iterable" else list(range(2 * batches))
        return self.accelerator.prepare(DataLoader(data, batch_size=2, num_workers=int(self.kind == "workers")))

    def micro_step(self, batch=0):
        with self.accelerator.accumulate(self.model):
            self.accumulation.advance()
            if self.opens:
                self.windows.append(Window(self.accumulation.length, self.epoch, batch))
            self.windows[-1].micro_steps += 1
            self.opens = self.accelerator.sync_gradients

    def train(self, loader, split=1, skip=(), stop=None):
        """One epoch: `split` micro-steps to a batch, none for those of `skip`, and a break before the batch `stop`."""
        self.epoch += 1
        for index, _ in enumerate(loader):
            if index == stop:
                break
            if index not in skip:
                for _ in range(split):
                    self.micro_step(index)

    @property
    def ended(self):
        return self.windows if self.opens else self.windows[:-1]

    def wrong(self, where=lambda window: True):
        return [window for window in self.ended if where(window) and window.said != window.micro_steps]


def plans(*others):
    """Accumulation steps, batches of an epoch, and each combination of the others."""
    return ((*plan, *rest) for plan, *rest in itertools.product(PLANS, *others))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_batch_to_a_micro_step_is_exact(kind):
    for steps, batches in plans():
        loop = Loop(steps, kind)
        loader = loop.loader(batches)
        for _ in range(3):
            loop.train(loader)
        assert len(loop.ended) == 3 * -(-batches // steps)
        assert not loop.wrong(), (steps, batches)


def test_batches_that_workers_load_are_exact():
    loop = Loop(3, "workers")
    loader = loop.loader(7)
    for skip in [(0, 1), (), (0,)]:
        loop.train(loader, 2, skip)
    assert not loop.wrong()


@pytest.mark.parametrize("kind", ["map", "dispatched"])
def test_split_batches_are_exact_from_the_second_batch_of_a_run_on(kind):
    """And in the second epoch of another split, which the first one shows."""
    for steps, batches, split in plans(SPLITS):
        loop = Loop(steps, kind)
        loader = loop.loader(batches)
        for epoch in range(4):
            loop.train(loader, split if epoch < 2 else 4 - split)
        known = [one for one in loop.wrong() if (one.epoch, one.batch) != (0, 0) and (one.epoch != 2 or split == 2)]
        assert not known, (steps, batches, split)


def test_inexact_a_runs_first_batch_is_taken_for_unsplit_until_seen():
    for steps, batches, split in plans(SPLITS):
        loop = Loop(steps)
        loop.train(loop.loader(batches), split)
        if loop.ended:
            first = loop.ended[0]
            assert first.said == min(steps, batches)
            assert first.said == first.micro_steps or (split > 1 and steps > batches), (steps, batches, split)


def test_the_last_batch_may_be_split_otherwise():
    for steps, batches, (split, last) in plans(itertools.permutations(SPLITS, 2)):
        loop = Loop(steps)
        loader = loop.loader(batches)
        for _ in range(3):
            loop.epoch += 1
            for index, _ in enumerate(loader):
                for _ in range(last if index == batches - 1 else split):
                    loop.micro_step(index)
        assert not loop.wrong(lambda window: (window.epoch, window.batch) != (0, 0)), (steps, batches, split, last)


def test_inexact_a_split_that_changes_is_taken_for_the_last_whole_batchs():
    loop = Loop(5)
    loop.epoch = 0
    for index, _ in enumerate(loop.loader(4)):
        for _ in range([2, 3, 1, 1][index]):
            loop.micro_step(index)
    assert [(window.said, window.micro_steps) for window in loop.ended] == [(4, 5), (4, 2)]
    loop = Loop(5)
    for index, _ in enumerate(loop.loader(6)):
        for _ in range([1, 1, 3, 1, 1, 1][index]):
            loop.micro_step(index)
    assert [(window.said, window.micro_steps) for window in loop.ended] == [(5, 5), (5, 3)]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_batches_skipped_at_the_beginning_are_exact(kind):
    """As in a resume by hand: `if step < resume_step: continue`."""
    for steps, batches in plans():
        for skipped in range(batches):
            loop = Loop(steps, kind)
            loader = loop.loader(batches)
            for skip in [range(skipped), (), range(skipped), range(skipped // 2)]:
                loop.train(loader, 1, skip)
            assert not loop.wrong(), (steps, batches, skipped)


def test_batches_skipped_in_the_middle_leave_all_windows_exact_but_those_they_fall_into():
    for steps, batches, split in plans([1, 3]):
        for skip in itertools.combinations(range(1, batches - 1), 2):
            loop = Loop(steps)
            loader = loop.loader(batches)
            for skipped in [skip, (), skip]:
                loop.train(loader, split, skipped)
            assert not [one for one in loop.wrong() if one.epoch == 1 or one.batch > max(skip)], (steps, batches, split)


def test_inexact_a_batch_that_will_be_skipped_is_counted_on():
    loop = Loop(4)
    loader = loop.loader(7)
    for skip in [(5,), (4,), ()]:
        loop.train(loader, 1, skip)
    pairs = [(window.said, window.micro_steps) for window in loop.ended]
    assert pairs == [(4, 4), (3, 2), (4, 4), (2, 2), (4, 4), (3, 3)]


def test_inexact_a_window_whose_last_batch_is_skipped_is_taken_to_end_with_the_epoch():
    for steps, batches in plans():
        loop = Loop(steps)
        loader = loop.loader(batches)
        for skip in [(batches - 1,), (), (batches - 1,), ()]:
            loop.train(loader, 1, skip)
        for window in loop.ended:
            assert window.said == min(steps, batches - window.batch)
            to_the_end = window.epoch % 2 == 0 and window.batch + steps >= batches
            assert window.said == window.micro_steps or to_the_end, (steps, batches)


@pytest.mark.parametrize("kept", [False, True])
def test_epochs_left_early_are_exact_but_for_windows_that_would_have_reached_the_end(kept):
    for steps, batches, stop in plans([0, 1, 2, 5, 8]):
        loop = Loop(steps)
        loader = loop.loader(batches)
        passes = [iter(loader) for _ in range(5)]
        for index, at in enumerate([stop, None, stop, stop, None]):
            loop.train(passes[index] if kept else loader, 1, (), at)
        for window in loop.ended:
            assert window.said == min(steps, batches - window.batch), (steps, batches, stop)
            broken_off = window.epoch in (0, 2, 3) and window.batch + steps > stop
            assert window.said == window.micro_steps or broken_off, (steps, batches, stop)


@pytest.mark.parametrize("used", [1, 2, 6, 7])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("split", [1, 2])
def test_an_iterator_that_is_kept_half_used_does_not_count_from_the_second_batch_on(used, before, split):
    loop = Loop(5)
    loader = loop.loader(8)
    iterators = [iter(loader) for _ in range(2)]
    sample, first = iterators if before else reversed(iterators)
    loop.epoch = 0
    for index, _ in enumerate(first):
        if index == 0:
            for _ in range(used):
                next(sample)
            gc.collect()  # the two are in one generation now
        if index == 2 and used < 7:
            next(sample)
        for _ in range(split):
            loop.micro_step(index)
    gc.collect()
    for skip in [(0, 1), ()]:
        loop.train(loader, split, skip)
    assert not loop.wrong(lambda window: (window.epoch, window.batch) != (0, 0))


def test_an_iterator_that_did_not_begin_does_not_count():
    loop = Loop(4)
    loader = loop.loader(7)
    for _ in loader:
        gc.collect()
        newer = iter(loader)
        loop.micro_step()
    assert not loop.wrong()
    assert newer.gi_frame


@pytest.mark.parametrize("kind", KINDS[:3])
def test_skip_first_batches_is_exact(kind):
    for steps, batches in plans():
        for skipped in range(batches):
            loop = Loop(steps, kind)
            loader = loop.loader(batches)
            loop.train(skip_first_batches(loader, skipped))
            loop.train(loader)
            assert len(loop.ended) == -(-(batches - skipped) // steps) + -(-batches // steps)
            assert not loop.wrong(), (steps, batches, skipped)


def test_a_stateful_loader_is_exact_also_when_it_resumes():
    pytest.importorskip("torchdata")
    for steps, batches in plans():
        for workers, seen in itertools.product([0, 2] if (steps, batches) == (4, 7) else [0], range(1, batches)):
            loop = Loop(steps, "stateful")
            loader = loop.accelerator.prepare(DataLoader(range(2 * batches), batch_size=2, num_workers=workers))
            for _ in zip(range(seen), loader, strict=False):
                pass
            state = loader.state_dict()
            loop = Loop(steps, "stateful")
            loader = loop.accelerator.prepare(DataLoader(range(2 * batches), batch_size=2, num_workers=workers))
            loader.load_state_dict(state)
            for skip in [(0,), ()] if batches - seen > 1 else [(), ()]:
                loop.train(loader, 1, skip)
            assert not loop.wrong(), (steps, batches, seen, workers)


def test_without_a_length_windows_are_full_and_inexact_at_the_end():
    for steps, batches in plans():
        loop = Loop(steps)
        loader = loop.accelerator.prepare(DataLoader(Stream(2 * batches), batch_size=2))
        for _ in range(2):
            loop.train(loader)
        for window in loop.ended:
            assert window.said == (1 if window.batch == batches - 1 else steps)


def test_a_length_that_is_too_short_gives_full_windows():
    loop = Loop(3)
    stream = SizedStream(16)
    loader = loop.accelerator.prepare(DataLoader(stream, batch_size=2))
    loop.epoch = 0
    stream.count, iterator = 8, iter(loader)
    stream.count = 16
    next(iterator)
    stream.count = 6
    for index, _ in enumerate(iterator):
        loop.micro_step(index)
    assert all(1 <= window.said <= 3 for window in loop.ended)


def test_without_sync_with_dataloader_all_windows_are_full():
    for steps, batches in plans():
        loop = Loop(steps, sync_with_dataloader=False)
        loader = loop.loader(batches)
        for skip in [(), (0,), ()]:
            loop.train(loader, 1, skip)
        assert {window.micro_steps for window in loop.ended} <= {steps}
        assert not loop.wrong()


def test_a_loader_that_accelerate_did_not_prepare_ends_no_window():
    for steps, batches in plans():
        loop = Loop(steps)
        loader = DataLoader(range(batches))
        skipping = skip_first_batches(DataLoader(SizedStream(batches)), 1)
        assert type(skipping) is SkipDataLoader
        for _ in range(2):
            loop.train(loader)
            loop.train(skipping)
        assert not loop.wrong(), (steps, batches)


def evaluate_inside(steps, batches, at, stop):
    """Three epochs with an evaluation after the batch `at`, left before its batch `stop` of 3."""
    loop = Loop(steps)
    loader, evaluation = loop.loader(batches), loop.loader(3)
    for _ in range(3):
        loop.epoch += 1
        for index, _ in enumerate(loader):
            loop.micro_step(index)
            if index == at:
                for place, _ in enumerate(evaluation):
                    if place == stop:
                        break
    return loop


def test_evaluation_in_the_middle_of_an_epoch_is_exact():
    for steps, batches, at in plans(range(3)):
        assert not evaluate_inside(steps, batches, at, None).wrong(), (steps, batches, at)


@pytest.mark.parametrize("stop", range(3))
def test_after_an_evaluation_left_by_break_windows_are_as_accelerates(stop):
    """It stays the active loader: left at its last batch (2) every micro-step ends a window, else no epoch ends one."""
    for steps, batches, at in itertools.product([2, 5], [5, 9], range(2)):
        loop = evaluate_inside(steps, batches, at, stop)
        assert not [window for window in loop.wrong() if window.batch > at], (steps, batches, at)


def test_a_pass_that_begins_where_an_evaluation_left_off_is_seen():
    """Broken off, evaluated in full and begun again: as many loaders are active as before."""
    loop = Loop(3)
    loader, evaluation = loop.loader(8), loop.loader(2)
    for _ in evaluation:
        break
    for stop in [3, None, 4, None]:
        loop.train(loader, 1, (), stop)
        list(evaluation)
    assert not loop.wrong(lambda window: window.epoch in (1, 3))


def test_a_pass_that_begins_where_a_broken_off_evaluation_was_active_is_seen():
    loop = Loop(3)
    loader, evaluation = loop.loader(7), loop.loader(2)
    for index, _ in enumerate(loader):
        loop.micro_step(index)
        if index == 1:
            next(iter(evaluation))
        if index == 3:
            break
    list(evaluation)
    loop.epoch = 0
    loop.train(loader)
    assert not loop.wrong()


def test_passes_over_another_loader_inside_an_epoch_are_exact_but_for_windows_they_come_in_between():
    for steps, batches, inner in plans(range(1, 5)):
        loop = Loop(steps)
        outer_loader, inner_loader = loop.loader(batches), loop.loader(inner)
        for _ in range(2):
            loop.epoch += 1
            for index, _ in enumerate(outer_loader):
                if index == 1:
                    for place, _ in enumerate(inner_loader):
                        loop.micro_step(10 + place)
                loop.micro_step(index)
        assert not loop.wrong(lambda window: window.batch > 0), (steps, batches, inner)


def test_steps_that_change_between_epochs_are_exact():
    loop = Loop(1)
    loader = loop.loader(7)
    for steps in [1, 4, 1, 3, 2, 5]:
        loop.accelerator.gradient_accumulation_steps = steps
        loop.train(loader, 2)
        assert loop.accumulation.steps == steps
    assert not loop.wrong()


irregular = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 1, 1, 2, 3]), st.sampled_from(["", "", "", "break", "evaluate", "look"])),
    min_size=1,
    max_size=9,
)


@given(st.integers(1, 5), st.integers(1, 9), st.lists(irregular, max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_whatever_went_before_an_ordinary_epoch_is_exact(steps, batches, epochs):
    loop = Loop(steps)
    loader, evaluation = loop.loader(batches), loop.loader(2)
    kept = []
    for epoch in epochs:
        loop.epoch += 1
        for index, (_, (split, event)) in enumerate(zip(loader, epoch, strict=False)):
            for _ in range(split):
                loop.micro_step(index)
            if event == "break":
                break
            if event == "evaluate":
                list(evaluation)
            if event == "look":
                kept.append(iter(evaluation))
                next(kept[-1])
    loop.train(loader)
    loop.train(loader)
    assert all(1 <= window.said <= steps for window in loop.ended)
    assert not loop.wrong(lambda window: window.epoch == loop.epoch)


def ranks_windows(kind):
    wrong = []
    for steps, batches, skipped in itertools.product([2, 3, 4], [1, 2, 5, 6], [0, 1]):
        loop = Loop(steps, kind)
        data = SizedStream(2 * batches) if kind == "dispatched" else range(2 * batches)
        loader = loop.accelerator.prepare(DataLoader(data, batch_size=2))
        assert loop.accelerator.num_processes == 2
        for skip in [range(skipped), ()] if len(loader) > 1 else [(), ()]:
            loop.train(loader, 1, skip)
        wrong += loop.wrong()
    return type(loader).__name__, wrong


@pytest.mark.parametrize(("kind", "loader"), [("map", DataLoaderShard), ("dispatched", DataLoaderDispatcher)])
def test_two_ranks_are_exact(kind, loader):
    assert distributed.run(2, ranks_windows, kind) == 2 * [(loader.__name__, [])]


def test_without_accelerate_every_window_is_one_micro_step():
    no_accelerate()
    accumulation = Accumulation()
    accumulation.advance()
    assert (accumulation.steps, accumulation.length) == (1, 1)


def without_index(function):
    """`function` as a version of Accelerate would have it that names its counter otherwise."""
    code = function.__code__
    names = tuple("position" if name == "batch_index" else name for name in code.co_varnames)
    return types.FunctionType(code.replace(co_varnames=names), function.__globals__)


def test_where_accelerate_names_it_otherwise_micro_steps_are_taken_for_batches(monkeypatch):
    monkeypatch.setattr(DataLoaderShard, "__iter__", without_index(DataLoaderShard.__iter__))
    for steps, batches in plans():
        loop = Loop(steps)
        loader, evaluation = loop.loader(batches), loop.loader(2)
        for _ in range(3):
            loop.train(loader)
            list(evaluation)
        assert not loop.wrong(), (steps, batches)
        for split, skip, stop in [(3, (), None), (2, (0,), 3), (2, (1,), None)]:
            loop.train(loader, split, skip, stop)
        assert all(1 <= window.said <= steps for window in loop.ended)


def test_generators_of_others_are_left_alone():
    class Reader:
        def __iter__(self):
            batch_index = "none yet"
            yield batch_index

    reader = iter(Reader())
    next(reader)
    loop = Loop(3)
    loader = loop.loader(5)
    loop.train(loader)
    assert not loop.wrong()
    assert not module._generators(Reader())


def test_the_garbage_collector_is_asked_once_a_pass(monkeypatch):
    asked = []
    get_objects = gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda generation: asked.append(generation) or get_objects(generation))
    loop = Loop(4)
    loader, evaluation = loop.loader(9), loop.loader(2)
    for epoch in range(1, 4):
        for index, _ in enumerate(loader):
            loop.micro_step(index)
            list(evaluation)
        assert asked.count(0) == epoch
    for _ in evaluation:
        break
    asked.clear()
    for _ in range(9):
        loop.micro_step()
    assert asked.count(0) == 1


def test_the_garbage_collector_is_not_asked_where_one_gradient_makes_a_step_or_accelerate_has_no_loader(monkeypatch):
    monkeypatch.setattr(gc, "get_objects", None)
    loop = Loop(1)
    loop.train(loop.loader(3))
    loop = Loop(3)
    loop.train(DataLoader(range(6)))
    loop.train(skip_first_batches(DataLoader(SizedStream(7)), 1))
    assert not loop.wrong()


def test_loaders_and_passes_are_not_kept_alive():
    loop = Loop(2)
    loader = loop.loader(5)
    a_pass = iter(loader)
    next(a_pass)
    loop.micro_step()
    alive = [weakref.ref(loader), weakref.ref(a_pass)]
    loop.accelerator.free_memory()
    del loader, a_pass
    gc.collect()
    assert [one() for one in alive] == [None, None]
