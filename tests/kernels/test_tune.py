"""Autotune choices: what is measured, what is kept, what is on disk."""

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
import torch
from triton.runtime.errors import OutOfResources

from llmq_kernels import layout, tune, weight_only
from llmq_kernels.errors import KernelError
from llmq_kernels.layout import PackedWeight

A, B = tune.Config(16, 64, 1, 4, 3), tune.Config(16, 128, 2, 4, 4, 128)
DEVICE = torch.device("cuda")


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Give a device that is not there a name, and configurations a speed; count what is measured."""
    measured = []

    def times(run, options):
        measured.extend(options)
        return {config: {A: 2.0, B: 1.0}[config] for config in options}

    monkeypatch.setattr(tune, "_times", times)
    monkeypatch.setattr(tune, "_slug", lambda device: "some-gpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = tune.cache_folder()
    tune.cache_folder(tmp_path)
    yield measured
    tune.measuring(True)
    tune.cache_folder(before)


def choose(key=(1,)):
    return tune.choose("op", DEVICE, key, lambda: [A, B], lambda c: None)


def test_the_fastest_is_chosen_once_and_found_on_disk_by_the_next_process(clock, tmp_path):
    assert choose() == B
    assert choose() == B
    tune.cache_folder(tmp_path)  # forgets what is in memory
    assert choose() == B
    assert clock == [A, B]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["op 1"]["registers"] == 128


def test_what_was_chosen_is_looked_up_and_nothing_else(clock, monkeypatch):
    choose()
    monkeypatch.setattr(tune, "_slug", None)
    assert tune.choose("op", DEVICE, (1,), None, None) == B


def test_the_first_candidate_of_a_capture_is_not_kept(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == A
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == B


def test_two_processes_keep_each_other_s_choices(clock, tmp_path):
    choose((1,))
    tune._known.clear()
    (file,) = tmp_path.iterdir()
    theirs = json.loads(file.read_text())
    file.write_text(json.dumps(theirs | {"op 2": asdict(A)}))
    choose((3,))
    assert choose((2,)) == A
    assert set(json.loads(file.read_text())) == {"op 1", "op 2", "op 3"}


def test_what_is_no_candidate_any_more_is_measured_again(clock, tmp_path):
    choose()
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"op 1": asdict(A) | {"BM": 32}}))
    tune.cache_folder(tmp_path)
    assert choose() == B
    assert json.loads(file.read_text())["op 1"] == asdict(B)


def test_choices_for_another_layout_of_the_words_are_not_found():
    assert weight_only._KERNEL.name == f"weight_only {layout.REVISION}" != "weight_only"


def test_nothing_is_measured_when_told_so_or_in_a_graph_capture(clock, monkeypatch, tmp_path):
    tune.measuring(False)
    assert choose() == A
    tune.measuring(True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == A
    assert not clock
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_said_and_replaced(clock, tmp_path, caplog):
    choose()
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    tune.cache_folder(tmp_path)
    assert choose() == B
    assert "no autotune choices" in caplog.text
    assert json.loads(file.read_text())


def test_a_configuration_that_does_not_fit_the_device_is_passed_over(clock, monkeypatch):
    monkeypatch.setattr(tune, "_fits", lambda run, config: config != B)
    assert choose() == A


def test_resources_that_are_not_there_do_not_fit_and_other_errors_are_errors():
    def run(config):
        if config == B:
            raise OutOfResources(300_000, 200_000, "shared memory")
        raise RuntimeError("broken")

    assert not tune._fits(run, B)
    with pytest.raises(RuntimeError, match="broken"):
        tune._fits(run, A)


class NoisyGpu:
    """Times as a GPU gives them: true ones, longer by a percent or so, half of them disturbed by up to many times.

    drift: by how much the first times are longer still, because the clock has not risen; or with time, as it heats.
    """

    def __init__(self, seed, drift):
        self.draw, self.drift, self.calls = random.Random(seed), drift, 0
        self.true = {c: self.draw.choice((1, 1.02, 1.06, 1.1, 1.5, 3)) for c in weight_only.configs(256, W4, asm=True)}
        self.true[self.draw.choice(list(self.true))] = 0.99

    def run(self, config):
        self.config = config

    def milliseconds(self, run, repeats):
        run()
        return [self.time() for _ in range(repeats)]

    def time(self):
        self.calls += 1
        slow = 1 + (self.drift * math.exp(-self.calls / 40) if self.drift > 0 else -self.drift * self.calls / 200)
        late = 0.1 * self.draw.paretovariate(0.8) if self.draw.random() < 0.5 else 0
        return self.true[self.config] * (slow * (1 + abs(self.draw.gauss(0, 0.005))) + late)

    def regret(self, config):
        return self.true[config] / min(self.true.values()) - 1


def one_by_one(gpu, pick, repeats):
    """Return the choice of another rule: all times of a configuration before those of the next."""
    return min(gpu.true, key=lambda c: pick(gpu.milliseconds(lambda: gpu.run(c), repeats)))


W4 = PackedWeight(torch.empty(0), torch.empty(0), None, 4096, 4096, 4, 128, True)


@pytest.mark.parametrize("drift", [0, 0.5, -0.2], ids=["steady", "rising clock", "falling clock"])
def test_the_choice_is_within_five_percent_of_an_exhaustive_run_s_in_heavy_noise(monkeypatch, drift):
    regrets = []
    for seed in range(200):
        gpu = NoisyGpu(seed, drift)
        monkeypatch.setattr(tune, "milliseconds", gpu.milliseconds)
        times = tune._times(gpu.run, list(gpu.true))
        assert gpu.calls == 20 * len(gpu.true)
        regrets.append(gpu.regret(min(times, key=times.get)))
    assert max(regrets) <= 0.05


def test_that_noise_does_mislead_other_rules():
    assert (
        max(gpu.regret(one_by_one(gpu, statistics.median, 10)) for gpu in (NoisyGpu(s, 0) for s in range(200))) > 0.05
    )
    assert max(gpu.regret(one_by_one(gpu, min, 20)) for gpu in (NoisyGpu(s, 0.5) for s in range(200))) > 0.05


def test_a_device_that_takes_no_configuration_is_named(clock, monkeypatch):
    monkeypatch.setattr(tune, "_fits", lambda run, config: False)
    with pytest.raises(KernelError, match="some-gpu has too little shared memory for any configuration of op 1"):
        choose()


@pytest.mark.parametrize(("M", "bucket"), [(1, 1), (3, 4), (16, 16), (17, 32), (100_000, 2048)])
def test_buckets_of_tokens(M, bucket):
    assert tune.bucket(M) == bucket
