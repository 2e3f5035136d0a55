"""What counts of a journal after a kill, and after a loss of power; old hidden states go when no run needs them."""

import itertools

import pytest
import torch

from llmq.checkpoint import journal as module
from llmq.checkpoint.batches import Batches
from llmq.checkpoint.journal import Journal


@pytest.fixture
def boot(tmp_path, monkeypatch):
    """`boot()` starts the system anew."""
    file = tmp_path / "boot_id"
    monkeypatch.setattr(module, "_BOOT", file)

    def start():
        file.write_text(f"{file.read_text() if file.exists() else ''}.")

    start()
    return start


@pytest.fixture
def never(monkeypatch):
    """Only the first step is synced."""
    monkeypatch.setattr(module, "_APART", 10**9)


def step(journal, folder):
    """Finish a step: a part, hidden states of the next one, what is known."""
    n = journal.steps
    parts = [folder / f"part-{i}" for i in range(n + 1)]
    parts[n].write_text("part")
    Batches(journal.state.with_name(f"{n + 1:05d}"), "hidden", range(2)).filled([torch.full((2,), float(n))] * 2)
    journal.advance({"H": torch.full((3,), float(n))}, {"n": n, "error": 0.1 + n}, parts)


def states(journal):
    return sorted(int(p.name) for p in (journal.folder / "states").iterdir())


def test_after_a_kill_all_counts_after_a_loss_of_power_what_was_synced(tmp_path, boot, never):
    journal = Journal(tmp_path / "journal")
    assert (journal.steps, journal.parts, journal.made) == (0, 0, False)
    for _ in range(4):
        step(journal, tmp_path)
        (tmp_path / "journal/step-00004.17.new").write_text("torn")
    again = Journal(tmp_path / "journal")
    assert (again.steps, again.parts) == (4, 4) and states(again) == [1, 4]
    assert not list(again.folder.glob("*.new"))
    assert [again.step(i).facts for i in range(4)] == [{"n": n, "error": 0.1 + n} for n in range(4)]
    assert again.step(3).tensors["H"].read().tolist() == [3, 3, 3]
    assert Batches.found(again.state, "hidden", torch.device("cpu"))[1].tolist() == [3, 3]
    (tmp_path / "journal/now.json").write_text("")  # as a file that was not synced can be
    for _ in range(2):
        boot()
        again = Journal(tmp_path / "journal")
        assert (again.steps, again.parts) == (1, 1) and states(again) == [1]


def test_what_is_written_a_step_ahead_stays_and_goes_where_a_killed_run_left_it(tmp_path, boot):
    journal = Journal(tmp_path / "journal")
    step(journal, tmp_path)
    (journal.folder / "states/00003").mkdir()
    step(journal, tmp_path)
    assert states(journal)[-2:] == [2, 3]
    assert 3 not in states(Journal(tmp_path / "journal"))


def test_where_the_system_does_not_tell_its_starts_apart_what_was_synced_counts(tmp_path, never, monkeypatch):
    monkeypatch.setattr(module, "_BOOT", tmp_path / "none")
    journal = Journal(tmp_path / "journal")
    for _ in range(3):
        step(journal, tmp_path)
    assert Journal(tmp_path / "journal").steps == 1


def test_all_that_a_sync_lets_count_was_synced_before_it(tmp_path, boot, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append(path.relative_to(tmp_path).as_posix()))
    monkeypatch.setattr(module, "_APART", 0)
    journal = Journal(tmp_path / "journal")
    for n in range(3):
        synced.clear()
        step(journal, tmp_path)
        files = {f"part-{n}", f"journal/step-{n:05d}", *(f"journal/states/{n + 1:05d}/hidden-00000{b}" for b in (0, 1))}
        assert set(synced) == files | {".", "journal", "journal/states", f"journal/states/{n + 1:05d}"}
        assert states(journal) == [n + 1]


def test_the_next_sync_waits_fifty_times_as_long_as_the_last_took(tmp_path, boot, monkeypatch):
    clock, syncs, took = [0.0], [], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def slow(path):
        clock[0] += 0.25
        syncs.append(path)

    monkeypatch.setattr(module, "sync", slow)
    journal = Journal(tmp_path / "journal")
    for _ in range(200):
        syncs.clear()
        step(journal, tmp_path)
        if syncs:
            took.append((clock[0], 0.25 * len(syncs)))
        clock[0] += 5
    assert len(took) == 3
    for (before, seconds), (after, own) in itertools.pairwise(took):
        assert 0 <= after - own - before - 50 * seconds < 5


def test_what_takes_long_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": torch.arange(3), "b": torch.ones(2, 2).T}, {"answer": [1, "x"]}

    for _ in range(2):
        journal = Journal(tmp_path / "journal")
        kept = journal.once("squares", make)
        assert kept.tensors["a"].read().tolist() == [0, 1, 2] and kept.facts == {"answer": [1, "x"]}
    assert len(made) == 1 and journal.made and journal.steps == 0
    assert journal.read("nothing") is None
    journal.keep("epoch", {}, {"n": 1})
    journal.keep("epoch", {}, {"n": 2})
    assert journal.read("epoch").facts == {"n": 2}
