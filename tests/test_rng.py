import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from trainguard.rng import isolated_rng, seed_streams


def draws(*generators):
    values = [torch.rand(1).item(), np.random.rand(), random.random()]
    for generator in generators:
        values.append(
            torch.rand(1, generator=generator).item() if isinstance(generator, torch.Generator) else generator.random()
        )
    return values


def own_generators():
    return [torch.Generator().manual_seed(3), np.random.default_rng(3), random.Random(3)]


def test_isolated_rng_leaves_every_stream_as_it_was():
    seed_streams(1)
    expected = draws(*own_generators())
    seed_streams(1)
    generators = own_generators()
    with isolated_rng(7, generators):
        draws(*generators)
    assert draws(*generators) == expected


def test_isolated_rng_restores_when_the_block_raises():
    seed_streams(1)
    expected = draws()
    seed_streams(1)
    with pytest.raises(KeyError), isolated_rng(7):
        draws()
        raise KeyError
    assert draws() == expected


def test_new_tensors_are_ours_wherever_the_user_s_go():
    torch.set_default_device("meta")
    try:
        with isolated_rng(7):
            assert torch.rand(1).device.type == "cpu"
        assert torch.rand(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_isolated_rng_keeps_the_initial_seed_that_workers_and_samplers_read():
    torch.manual_seed(42)
    with isolated_rng(7):
        pass
    assert torch.initial_seed() == 42


def test_isolated_rng_is_decided_by_its_seed_alone():
    inside = []
    for before in (1, 2):
        seed_streams(before)
        generators = own_generators()
        with isolated_rng(7, generators):
            inside.append(draws(*generators))
    assert inside[0] == inside[1]
    with isolated_rng(8):
        assert draws() != inside[0][:3]


def test_legacy_numpy_state_is_restored():
    state = np.random.RandomState(3)
    with isolated_rng(7, [state]):
        state.rand(5)
    assert state.rand() == np.random.RandomState(3).rand()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_cuda_streams_are_left_as_they_were():
    torch.cuda.manual_seed_all(1)
    expected = torch.rand(3, device="cuda").tolist()
    torch.cuda.manual_seed_all(1)
    with isolated_rng(7):
        torch.rand(5, device="cuda")
    assert torch.rand(3, device="cuda").tolist() == expected


@needs_cuda
@pytest.mark.parametrize("seeding", ["torch.manual_seed(5)", "pass"])
def test_cuda_started_inside_is_seeded_as_it_would_have_been(seeding):
    use = "with isolated_rng(7): torch.rand(5, device='cuda')"
    code = "import torch; from trainguard.rng import isolated_rng\n{}\n{}\nprint(torch.rand(3, device='cuda').tolist())"
    drawn = [
        subprocess.run([sys.executable, "-c", code.format(seeding, middle)], capture_output=True, text=True, check=True)
        for middle in (use, "pass")
    ]
    assert drawn[0].stdout == drawn[1].stdout
