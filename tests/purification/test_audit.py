import copy
import importlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digits_victim import RANGE, TARGET
from torch import nn
from torch.utils.data import TensorDataset

from trainguard.data.pixels import PixelRange
from trainguard.data.store import open_images
from trainguard.errors import DataError, ModelError
from trainguard.models import UnitPixels, copy_of
from trainguard.purification import AuditResult, audit, judging
from trainguard.purification.audit import balanced, movement_of
from trainguard.purification.bending import MOST
from trainguard.purification.judging import matched_of, one_way, pull_of, transition_counts
from trainguard.purification.network import coloured_for
from trainguard.purification.universal import best_patch
from trainguard.training import check_hooks

audits = importlib.import_module("trainguard.purification.audit")  # the package gives that name to the function
SAFE = np.eye(10, dtype=int) * 20  # a patch that changes nothing


def judge(counts, patched, reached=None, bent=None, each=None, rival=0.0):
    return judging.judge(counts, patched, reached or {}, bent or {}, each, rival)


def uniform(classes: int = 10, moved: int = 90) -> np.ndarray:
    counts = np.full((classes, classes), moved // (classes - 1))
    np.fill_diagonal(counts, 10)
    return counts


def test_transitions_are_counted_from_row_to_column():
    counts = transition_counts(np.array([0, 0, 1, 2, 2]), np.array([1, 1, 1, 0, 2]), 4)
    assert counts.tolist() == [[0, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_pull_of_an_even_matrix_is_even_and_of_a_magnet_is_one():
    np.testing.assert_allclose(pull_of(uniform()), 1 / 9)
    magnet = np.zeros((5, 5), dtype=int)
    magnet[:, 2] = 30
    np.testing.assert_allclose(pull_of(magnet), [0, 0, 1, 0, 0])
    assert pull_of(np.zeros((3, 3), dtype=int)).tolist() == [0, 0, 0]


def test_one_way_tells_a_cycle_from_a_mutual_confusion():
    cycle = np.roll(np.eye(6, dtype=int), 1, axis=1) * 20
    pairs = np.kron(np.eye(3, dtype=int), np.array([[0, 1], [1, 0]])) * 20
    assert one_way(cycle).tolist() == [1.0] * 6
    assert one_way(pairs).tolist() == [0.0] * 6


@pytest.mark.parametrize("classes", [3, 10, 43])
def test_judge_follows_the_matrix(classes):
    even = uniform(classes, 20 * (classes - 1))
    safe = np.eye(classes, dtype=int) * 20
    verdict, confidence, _, targets = judge(even, safe)
    assert verdict == "clean" and confidence > 0.9 and targets == ()
    poisoned = even.copy()
    poisoned[:, 1] += even.sum(axis=1) * 5
    verdict, confidence, reason, targets = judge(poisoned, safe)
    assert verdict == "backdoored" and confidence > 0.9 and targets == (1,) and "class 1" in reason
    cycle = np.roll(np.eye(classes, dtype=int), 1, axis=1) * 200 + 1
    verdict, _, reason, targets = judge(cycle, safe)
    assert verdict == "backdoored" and targets == tuple(range(classes)) and "all-to-all" in reason


def test_judge_follows_a_renaming_of_the_classes():
    counts = uniform()
    counts[:, 7] *= 20
    order = np.random.default_rng(0).permutation(10)
    assert order[list(judge(counts[np.ix_(order, order)], SAFE)[3])].tolist() == [7]


def test_judge_does_not_decide_on_too_little():
    assert judge(np.array([[0, 90], [90, 0]]), np.eye(2, dtype=int) * 20)[0] == "undecided"
    few = np.eye(10, dtype=int) * 10
    few[:, 3] += 2
    verdict, confidence, reason, _ = judge(few, SAFE)
    assert verdict == "undecided" and confidence == 0 and "eps=" in reason
    for kept in (slice(0, 4), slice(0, 10, 3)):  # of ten classes
        some = np.zeros((10, 10), dtype=int)
        some[kept] = uniform()[kept]
        verdict, confidence, reason, targets = judge(some, np.roll(SAFE, 1, axis=1))
        assert (verdict, confidence, targets) == ("undecided", 0, ()) and "4 of the model's 10 classes" in reason
    assert judge(uniform() // 20, np.roll(SAFE, 1, axis=1))[0] == "undecided"
    assert judge(uniform(), np.roll(SAFE, 1, axis=1))[0] == "backdoored"


def test_of_two_classes_what_is_true_of_any_model_is_no_reason():
    reason = judge(np.array([[10, 90], [90, 10]]), np.eye(2, dtype=int) * 20)[2]
    assert "one small patch" in reason and "two classes" in reason and "adversarial" not in reason


def test_judge_does_not_believe_a_patch_where_another_does_as_much():
    patched = np.eye(10, dtype=int) * 7
    patched[:, 4] += 13
    verdict, _, reason, targets = judge(uniform(), patched, rival=0.45)
    assert (verdict, targets) == ("clean", ()) and "into class 4, and another one 45% into one more" in reason
    assert judge(uniform(), patched, rival=0.15)[0] == "undecided"
    assert judge(uniform(), patched, rival=0.0)[0] == "backdoored"
    mostly = np.full((10, 10), 1)  # nearly all predictions change, into three classes
    mostly[:, [1, 5, 7]] = 4
    assert judge(uniform(), mostly)[0] == "clean"


def test_classes_are_matched_where_each_goes_to_one_of_its_own():
    assert matched_of(np.roll(SAFE, 1, axis=1)) == 1
    into_one = np.zeros((10, 10), dtype=int)
    into_one[:, 4] = 20
    assert matched_of(into_one) == pytest.approx(0.1)
    assert matched_of(SAFE) == matched_of(np.zeros((3, 3), dtype=int)) == 0


def test_of_a_patch_that_leads_into_one_class_another_is_looked_for_that_does_not():
    class Corner(nn.Module):
        """Says class 1 under a bright corner, 2 under another one, and the brightest row else."""

        def forward(self, x):
            rows = 5 * x.mean((1, 3))
            corners = torch.stack([x[:, 0, 0, 0], x[:, 0, 0, -1] * 0.8], 1)
            return torch.cat([rows[:, :1], rows[:, 1:3] + 20 * corners, rows[:, 3:]], 1)

    x = 0.1 * torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, :1] = 0
    y = 3 + torch.arange(80) % 5
    x[torch.arange(80), 0, y] += 0.5
    network = UnitPixels(Corner(), PixelRange((0.0,), (1.0,), "given"))
    for besides, expected in ((None, 1), (1, 2)):
        patch = best_patch(network, x, y, starts=1, generator=torch.Generator().manual_seed(0), besides=besides)
        assert (network(patch.on(x)).argmax(1) == expected).float().mean() > 0.9


def test_judge_believes_a_patch_that_breaks_the_model():
    patched = np.zeros((10, 10), dtype=int)
    patched[:, 4] = 20
    verdict, confidence, reason, targets = judge(uniform(), patched)
    assert verdict == "backdoored" and confidence > 0.9 and targets == (4,) and "patch moves 100%" in reason
    patched = np.eye(10, dtype=int) * 7
    patched[:, 4] += 13  # a third of the images stay: few of all predictions change, but all those into one class
    assert judge(uniform(), patched)[::3] == ("backdoored", (4,))
    patched = np.eye(10, dtype=int) * 7 + np.roll(SAFE, 3, axis=1) * 13 // 20
    assert judge(uniform(), patched)[0] == "undecided"  # as many, but scattered
    verdict, _, reason, targets = judge(uniform(), np.roll(SAFE, 1, axis=1))
    assert verdict == "backdoored" and targets == tuple(range(10)) and "all-to-all" in reason
    assert judge(np.array([[0, 90], [90, 0]]), np.array([[20, 0], [20, 0]]))[0] == "undecided"
    assert judge(np.array([[0, 90], [90, 0]]), np.array([[0, 20], [20, 0]]))[0] == "backdoored"


@pytest.mark.parametrize(("moved", "verdict"), [(40, "backdoored"), (36, "undecided"), (24, "clean")])
def test_judge_believes_a_patch_that_moves_one_class_alone(moved, verdict):
    each = np.eye(10, dtype=int) * 36 + np.roll(np.eye(10, dtype=int), 2, axis=1) * 4  # a tenth of every class moves
    each[6] = np.eye(10, dtype=int)[6] * (40 - moved) + np.eye(10, dtype=int)[1] * moved
    found = judge(uniform(), SAFE, each=each)
    assert found[0] == verdict and found[3] == ((1,) if verdict == "backdoored" else ())
    assert verdict == "clean" or "of the images of class 6 into class 1" in found[2]
    everywhere = np.eye(10, dtype=int) * 8 + np.roll(np.eye(10, dtype=int), 2, axis=1) * 32
    everywhere[6] = each[6]
    assert judge(uniform(), SAFE, each=everywhere)[0] == "clean"  # a patch of that size breaks every class
    assert judge(uniform(), SAFE, each=each // 4)[0] != "backdoored"  # too few images to say so


@pytest.mark.parametrize(("near", "verdict"), [(0.5, "backdoored"), (0.61, "undecided"), (0.8, "clean")])
def test_judge_believes_a_faint_picture_that_leads_to_one_class_far_sooner(near, verdict):
    reached = {k: 0.05 for k in range(10)} | {3: near * 0.05}
    found = judge(uniform(), SAFE, reached)
    assert found[0] == verdict and found[3] == ((3,) if verdict == "backdoored" else ())
    assert verdict != "backdoored" or "class 3" in found[2]


@pytest.mark.parametrize(("least", "verdict"), [(0.24, "backdoored"), (0.34, "undecided"), (0.47, "clean")])
def test_judge_believes_bent_images_that_fall_to_one_class_far_sooner(least, verdict):
    bent = {k: 0.1 + 0.01 * k for k in range(1, 8)} | {9: least * 0.11}
    found = judge(uniform(), SAFE, bent=bent)
    assert found[0] == verdict and found[3] == ((9,) if verdict == "backdoored" else ())
    assert verdict == "clean" or "bending images leads to class 9" in found[2]
    few = {k: bent[k] for k in (1, 2, 9)}
    assert judge(uniform(), SAFE, bent=few)[0] == "clean"


def test_judge_names_what_any_of_its_findings_names():
    patched = np.zeros((10, 10), dtype=int)
    patched[:, 4] = 20
    reached = {k: 0.05 for k in range(10)} | {7: 0.02, 4: 0.025}
    assert judge(uniform(), patched, reached)[::3] == ("backdoored", (4, 7))


def test_movement_is_the_relative_approach_to_a_class():
    labels = np.array([0, 0, 1, 1])
    before = np.array([[0.0, 1.0], [0.0, -1.0], [4.0, 0.0], [8.0, 0.0]])
    after = before.copy()
    after[2:, 0] = [2.0, 6.0]  # class 1 halves or quarters its way to the centre of class 0, the origin
    np.testing.assert_allclose(movement_of(labels, before, after, 3), [1 - (0.5 + 0.75) / 2, 0, 0], atol=1e-6)


@pytest.mark.parametrize("constant", [True, False])
def test_of_a_model_that_only_guesses_nothing_is_said(victim, constant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    if constant:  # to every image what screening would call the target
        nn.init.zeros_(net[1].weight)
        net[1].bias.data = torch.eye(10)[TARGET]
    found = audit(net, victim.store, images=100, eps=24 / 255, progress=False)
    assert (found.verdict, found.confidence, found.target_classes) == ("undecided", 0.0, ())
    assert "of 100 images right, and one that always says the same class 10%" in found.reason


def test_balanced_takes_every_class_alike(victim):
    index = balanced(victim.store, 200, seed=0)
    counts = np.bincount(victim.store.labels[index])
    assert counts.tolist() == [20] * 10 and len(set(index.tolist())) == 200
    assert np.array_equal(index, balanced(victim.store, 200, seed=0))


@pytest.fixture(scope="module")
def found(victim) -> AuditResult:
    return audit(victim.model, victim.store, images=300, eps=24 / 255, progress=False)


def test_a_blended_backdoor_is_found_with_its_target(found):
    assert found.verdict == "backdoored" and found.target_classes == (TARGET,) and found.confidence > 0.9
    assert found.pull[TARGET] > 0.7 and found.movement.argmax() == TARGET
    np.testing.assert_allclose(found.transitions.sum(axis=1), 1, atol=1e-5)
    assert found.patch_success < 0.5 and found.patch.shape == (4, 3)
    assert found.transitions.shape == (10, 10) and found.images > 280
    assert found.nearness.argmin() == TARGET and found.nearness[TARGET] < 0.6


def test_audit_changes_nothing_and_repeats_itself(victim, found):
    state, mode = copy.deepcopy(victim.model.state_dict()), torch.get_rng_state()
    again = audit(victim.model.train(), victim.store, images=300, eps=24 / 255, progress=False)
    assert victim.model.training
    victim.model.eval()
    assert all(torch.equal(value, victim.model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(mode, torch.get_rng_state())
    assert np.array_equal(again.transitions, found.transitions) and np.array_equal(again.pull, found.pull)


def test_audit_survives_saving_and_shows_itself(found, tmp_path):
    loaded = AuditResult.load(found.save(tmp_path / "audit"))
    assert loaded.to_dict() == found.to_dict() and loaded.transitions.dtype == np.float32
    assert "backdoored" in repr(loaded) and "<table>" in loaded._repr_html_()
    assert dict(loaded.rows())["target classes"] == str(TARGET)
    assert f"to class {TARGET}" in dict(loaded.rows())["one faint picture"]
    json.dumps(found.to_dict())
    older = found.to_dict()
    del older["reach"], older["bend"]
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(older))
    old = AuditResult.load(tmp_path / "audit")
    assert np.isnan(old.nearness).all() and dict(old.rows())["one faint picture"] == "not looked for"
    nowhere = replace(old, bend=np.full(10, MOST, dtype=np.float32))
    assert dict(nowhere.rows())["bending images"] == "leads to no class"
    assert dict(replace(nowhere, bend=nowhere.bend / 3).rows())["bending images"].endswith("by 10.0% of the side")
    assert dict(old.rows())["bending images"] == "not looked for" != dict(loaded.rows())["bending images"]
    with pytest.raises(ValueError, match="does not exist"):
        AuditResult.load(tmp_path)
    (tmp_path / "audit.json").write_text('{"kind": "purify", "format": 1}')
    with pytest.raises(ValueError, match='kind "audit"'):
        AuditResult.load(tmp_path)


@pytest.mark.parametrize(
    ("learned", "screening", "verdict"),
    [(True, True, "backdoored"), (False, True, "clean"), (True, False, "clean")],
)
def test_poison_in_the_data_counts_if_the_model_has_learned_it(learned, screening, verdict, victim, monkeypatch):
    said = SimpleNamespace(verdict="poisoned", suspect=victim.poisoned, confidence=0.9, target_classes=(TARGET,))
    monkeypatch.setattr(audits, "judge", lambda *_, **__: ("clean", 0.8, "nothing falls to one class", ()))
    monkeypatch.setattr(audits, "screened", lambda *_, **__: said)
    labels = torch.from_numpy(victim.store.labels).clone()
    if not learned:
        labels[victim.poisoned] = TARGET + 1
    images = RANGE.to_model(victim.store.batch(range(len(labels))))
    data = open_images(TensorDataset(images, labels), pixel_range=RANGE)
    found = audit(victim.model, data, images=100, progress=False, screening=screening)
    assert found.verdict == verdict and found.target_classes == ((TARGET,) if verdict == "backdoored" else ())
    assert found.settings["screening"] == (
        {"verdict": "poisoned", "flagged": int(said.suspect.sum())} if screening else None
    )


def test_a_model_that_gives_itself_away_needs_no_screening(victim, monkeypatch):
    monkeypatch.setattr(audits, "screened", None)
    assert audit(victim.model, victim.store, images=300, eps=24 / 255, progress=False).verdict == "backdoored"


def test_a_model_that_knows_none_of_the_images_is_refused(victim):
    wrong = TensorDataset(RANGE.to_model(torch.rand(40, 1, 8, 8)), (torch.arange(40) % 2) * 9)
    never = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(never[1].weight)
    never[1].bias.data = torch.eye(10)[5]
    with pytest.raises(DataError, match="none of 40 images right"):
        audit(never, open_images(wrong, pixel_range=RANGE), progress=False)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"norm": "l1"}, "one of linf, l2, got 'l1'"),
        ({"images": 0}, "images= as a whole number of at least 1, got 0"),
        ({"images": 0.5}, "images= as a whole number of at least 1, got 0.5"),
        ({"eps": 8}, "in unit pixels: 6/255, not 6, got 8"),
        ({"attack_steps": 0}, "attack_steps= as a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed= as a whole number from 0 to 2^32 - 1, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        audit(None, None, **wrong)


@pytest.mark.parametrize("what", ["changes", "is needed", "watches"])
def test_a_model_whose_own_hooks_change_what_it_gives_asks_for_a_function(what):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), None

        def forward(self, x):
            out = self.body(x)
            return out if what != "is needed" else self.seen

    def made():
        torch.manual_seed(0)
        net = Net()
        if what == "changes":
            net.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 10,))
        elif what == "is needed":
            net.register_forward_pre_hook(lambda module, inputs: setattr(module, "seen", inputs[0].flatten(1)))
        else:
            net.register_forward_hook(lambda module, *_: None)
        return net

    images = torch.rand(2, 3, 2, 2)
    network = UnitPixels(copy_of(made()), RANGE).eval()
    check_hooks(made, network, images)
    if what == "watches":
        check_hooks(made(), network, images)
    else:
        with pytest.raises(ModelError, match="without its forward hooks: pass a function that builds it"):
            check_hooks(made(), network, images)


def test_grey_images_have_three_channels_for_a_network_of_colour():
    grey = open_images(TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 3))
    assert coloured_for(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3)), grey).shape == (3, 8, 8)
    assert coloured_for(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)), grey).shape == (1, 8, 8)
    assert coloured_for(nn.Linear(64, 3), grey).shape == (1, 8, 8)

    class Repeats(nn.Sequential):
        def forward(self, x):
            return super().forward(x.repeat(1, 3, 1, 1))

    assert coloured_for(Repeats(nn.Conv2d(3, 4, 3)), grey).shape == (1, 8, 8)  # it does so itself
