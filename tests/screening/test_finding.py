"""What the figures of a part say: the verdict, its sides and its kin."""

from dataclasses import replace

import numpy as np
import pytest
from findings import CROWD, NOWHERE_ELSE, SHRUNK, STAMPED, SURE, WAVES, finding

from trainguard.screening.identification import decide, with_kin
from trainguard.screening.separation import Split
from trainguard.screening.settings import Settings


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (finding(), "poisoned"),
        (finding(agreement=0.75, trigger=0.2), "undecided"),  # far apart, nearly a trigger
        (finding(distance=16.0, agreement=0.23, company=1.0, trigger=0.17), "clean"),  # turned copies of one blood cell
        (finding(agreement=0.75, likeness=0.01, told=0.98), "undecided"),  # as far apart, and no picture of one of them
        (finding(agreement=0.75, likeness=0.01, told=0.93), "clean"),  # nor fine detail: they differ in what they show
        (finding(distance=5.5, agreement=0.75, likeness=0.01), "clean"),
        (finding(agreement=0.75, firmness=0.5, finished=True, likeness=0.01), "clean"),
        (finding(agreement=0.75, trigger=0.2, likeness=0.66), "clean"),  # likewise, but one scene: a track of signs
        (finding(distance=12.0, agreement=0.75), "clean"),  # a natural group, however far
        (finding(distance=5.0, company=0.9), "clean"),  # unlike the rest of its class, and among its own
        (finding(agreement=0.3, diversity=0.9, scatter=0.9), "poisoned"),  # far apart, and of all kinds for both probes
        (finding(agreement=0.3, diversity=0.9, scatter=0.7), "clean"),
        (finding(distance=4.0, valley=0.4, agreement=0.75), "clean"),  # a natural group
        (finding(distance=9.0, agreement=0.75, trigger=0.8), "poisoned"),  # clean-label: the difference is a trigger
        (finding(distance=5.3, agreement=0.75, trigger=0.8), "clean"),  # two kinds of one class
        (finding(distance=5.3, agreement=0.3, trigger=0.8), "poisoned"),  # no gap is needed where labels half misfit
        (finding(distance=5.3, agreement=0.3, trigger=0.8, company=0.7), "clean"),
        (finding(distance=5.3, agreement=0.3, trigger=0.8, likeness=0.8), "clean"),
        (finding(agreement=0.75, trigger=0.05), "clean"),  # what the class looks like moves images as well
        (finding(distance=10.0, company=0.9, trigger=0.6, told=1.0, elsewhere=0.1), "poisoned"),
        (finding(distance=10.0, company=0.9, trigger=0.6, told=1.0, elsewhere=0.8), "clean"),  # a class of two things
        (finding(distance=10.0, company=0.9, trigger=0.6, told=0.8, elsewhere=0.8), "poisoned"),
        (finding(distance=10.0, company=0.5, trigger=0.6, told=1.0, elsewhere=0.9, likeness=1.6), "poisoned"),
        (finding(distance=10.0, company=0.7, at_source=0.8, told=1.0, elsewhere=0.1), "poisoned"),
        (finding(distance=10.0, company=0.7, at_source=0.8, told=1.0, elsewhere=0.8), "clean"),
        (finding(distance=2.0, valley=0.9), "clean"),  # one cloud
        (finding(distance=2.8, valley=0.7, diversity=0.85), "poisoned"),  # a small gap, but images of all kinds
        (finding(distance=2.8, valley=0.7, diversity=0.6), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.85, company=0.45), "clean"),  # birds resemble everything
        (finding(distance=2.8, valley=0.7, diversity=0.75, company=0.9), "clean"),  # several kinds that keep together
        # Other colours keep together: of all kinds for both probes, learned by one, and wholly foreign to the other.
        (finding(distance=2.8, valley=0.7, diversity=0.95, scatter=0.96, company=0.8, resemblance=0.3), "poisoned"),
        (finding(distance=2.8, valley=0.7, diversity=0.95, scatter=0.7, company=0.8, resemblance=0.3), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.76, scatter=0.96, company=0.8, resemblance=0.3), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.95, scatter=0.96, company=0.8, resemblance=0.6), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.95, scatter=0.96, company=0.8, firmness=0.4), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.95, scatter=0.96, company=0.8, agreement=0.3), "clean"),
        # Nor need it be of all kinds for the one that learned it, if the rest of the class is of far fewer: fog.
        (finding(distance=2.8, valley=0.88, diversity=0.65, variety=1.8, scatter=0.96, company=0.8), "poisoned"),
        (finding(distance=2.8, valley=0.88, diversity=0.65, variety=1.1, scatter=0.96, company=0.8), "clean"),
        (finding(distance=2.8, valley=0.88, diversity=0.5, variety=1.8, scatter=0.96, company=0.8), "clean"),
        (finding(distance=2.8, valley=0.95, diversity=0.65, variety=1.8, scatter=0.96, company=0.8), "clean"),
        (finding(distance=2.8, valley=0.88, diversity=0.65, variety=1.8, scatter=0.6, company=0.8), "clean"),
        (finding(distance=3.5, valley=0.5, diversity=0.4, likeness=0.58), "clean"),  # offices by daylight
        # Foreign labels with much company, and a difference that half works: either alone is not enough.
        (finding(distance=3.2, valley=0.75, diversity=0.78, company=0.6, trigger=0.18), "poisoned"),
        (finding(distance=3.2, valley=0.75, diversity=0.78, company=0.6, trigger=0.06), "clean"),
        # Among few classes there are no kinds to tell: what does not lie far apart must be half a trigger as well.
        (finding(distance=3.5, valley=0.5, trigger=0.1), "clean"),
        (finding(distance=3.5, valley=0.5, trigger=0.27), "poisoned"),
        (finding(distance=3.5, valley=0.5, diversity=0.4), "poisoned"),
        (finding(distance=3.5, valley=0.5, told=0.98, elsewhere=0.0, likeness=0.03), "poisoned"),  # like nothing else
        (finding(distance=3.5, valley=0.5, scatter=0.4), "poisoned"),
        # One scene: frames of another pose are foreign, and keep no company; frames of the class are of its own kind.
        (finding(distance=12.0, likeness=0.8, scatter=0.2), "clean"),
        (finding(distance=12.0, likeness=0.8, scatter=0.9, diversity=0.9), "poisoned"),
        (finding(distance=140.0, agreement=0.8, likeness=1.6, trigger=0.4), "clean"),
        (
            finding(distance=20.0, agreement=0.8, likeness=0.65, trigger=0.45, company=1.0),
            "poisoned",
        ),  # waves over leaves
        # Most of a class, to which the rest and the other classes' images are alike: a kind of its own.
        (
            finding(
                members=400, distance=6.7, share=0.7, scatter=0.9, company=0.75, trigger=0.25, told=0.94, elsewhere=0.7
            ),
            "clean",
        ),
        (
            finding(
                members=400, distance=6.7, share=0.7, scatter=0.9, company=0.75, trigger=0.25, told=0.94, elsewhere=0.0
            ),
            "poisoned",
        ),
        (finding(distance=12.0, agreement=0.55, likeness=0.8, trigger=0.45), "poisoned"),  # images shrunk, on black
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25), "poisoned"),
        (finding(distance=4.6, valley=0.2, company=0.72, trigger=0.25), "clean"),  # newspapers among paper
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25, likeness=0.8), "clean"),
        (finding(distance=4.6, valley=0.2, company=0.6, trigger=0.25, share=0.6), "clean"),  # most of the class
        (finding(distance=3.8, valley=0.4, agreement=0.0, company=1.2, trigger=0.16), "clean"),  # keeps to itself
        (finding(distance=3.2, valley=0.75, diversity=0.78, agreement=0.6, trigger=0.18), "clean"),  # labels fit
        (finding(distance=4.4, valley=0.2, diversity=0.9, company=1.2), "poisoned"),  # half of the class: own company
        # Own company as well, but taken for all kinds: poison that looks alike. Far apart, several kinds are enough.
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.92, diversity=0.8), "poisoned"),
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.92, diversity=0.4), "clean"),  # some of the skirts
        (finding(distance=4.4, valley=0.2, company=0.9, scatter=0.66, diversity=0.8), "clean"),
        (finding(distance=9.0, company=0.9, scatter=0.78), "poisoned"),
        (finding(distance=9.0, company=0.9, scatter=0.78, skill=0.4), "clean"),  # whoever knows little scatters
        (finding(distance=9.0, company=0.9, scatter=0.78, share=0.15), "clean"),  # fifteen samples
        (finding(distance=9.0, company=0.9, scatter=0.6), "clean"),  # a track of signs: it keeps together
        (finding(distance=9.0, company=0.6, scatter=0.68), "poisoned"),
        (finding(distance=9.0, company=0.9, scatter=0.42), "clean"),
        (finding(distance=9.0, company=0.9, scatter=0.9, firmness=0.25, disbelief=1.1), "clean"),  # wrong labels
        (finding(firmness=0.25, disbelief=1.1, pixels=True), "poisoned"),  # wrong labels do not show among pixels
        (finding(company=0.6, at_source=0.8), "poisoned"),  # a trigger for images of one class
        (finding(company=0.6, at_source=0.35), "clean"),
        (finding(company=0.9, at_source=0.8), "clean"),  # coins under another lamp, which keep to themselves
        (finding(company=0.6, at_source=0.8, likeness=2.0), "clean"),  # one scene
        (finding(agreement=0.5, company=0.6, at_source=0.8), "clean"),  # labels fit
        (finding(share=0.7), "clean"),  # most of a class, and a probe that learned the rest alone
        (finding(share=0.7, scatter=0.95, members=150), "poisoned"),
        (finding(share=0.7, scatter=0.95), "clean"),  # thirty samples teach nobody a class
        (finding(resemblance=0.6), "poisoned"),  # far apart
        (finding(resemblance=0.8), "clean"),
        (finding(resemblance=0.75, diversity=0.95, scatter=0.96), "poisoned"),  # and of all kinds for both probes
        (finding(resemblance=0.75, diversity=0.95, scatter=0.96, distance=4.5), "clean"),
        (finding(resemblance=0.75, diversity=0.95, scatter=0.96, skill=0.55), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.0), "clean"),
        (finding(distance=3.8, valley=0.37, scatter=0.4, share=0.2), "clean"),  # twenty vine tomatoes
        (finding(distance=3.8, valley=0.37, scatter=0.4, share=0.2, members=150), "poisoned"),
        (finding(distance=4.5, valley=0.2, scatter=0.4, share=0.2), "poisoned"),
        (finding(distance=3.8, valley=0.37, scatter=0.4, share=0.2, trigger=0.4), "poisoned"),
        (finding(distance=3.8, valley=0.37, scatter=0.4, share=0.15, company=0.48, members=200), "clean"),  # by chance
        (finding(distance=3.8, valley=0.37, scatter=0.4, share=0.15, company=0.42, members=2000), "poisoned"),
        (finding(**CROWD), "poisoned"),  # more of a picture than images of the class's own
        (finding(**CROWD | {"elsewhere": 0.1}), "clean"),  # most of a class that resembles others
        (finding(**CROWD | {"transfer": 0.3}), "clean"),
        (finding(**CROWD | {"resemblance": 0.95}), "clean"),
        (finding(**CROWD | {"share": 0.4, "transfer": 0.7}), "clean"),
        (finding(**CROWD | {"share": 0.4, "transfer": 0.95}), "poisoned"),  # a picture on leaves
        (finding(**CROWD | {"share": 0.4, "transfer": 0.95, "agreement": 0.25}), "poisoned"),
        (finding(**CROWD | {"share": 0.4, "transfer": 0.95, "agreement": 0.6}), "clean"),
        (finding(**CROWD | {"share": 0.4, "transfer": 0.95, "members": 100}), "clean"),
        (finding(**CROWD | {"valley": 0.2}), "clean"),
        (finding(**SURE), "poisoned"),  # of a source that resembles the target
        (finding(**SURE | {"agreement": 0.3}), "poisoned"),
        (finding(**SURE | {"agreement": 0.5}), "clean"),
        (finding(**SURE | {"trigger": 0.2}), "clean"),
        (finding(**SURE | {"company": 0.7}), "clean"),
        (finding(**SURE | {"valley": 0.4}), "clean"),
        (finding(**SURE | {"likeness": 0.65}), "clean"),
        (finding(**NOWHERE_ELSE | {"distance": 8.4}, beside=True), "poisoned"),  # one more corner of a clean label
        (finding(**NOWHERE_ELSE | {"distance": 8.4}), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.0, beside=True), "poisoned"),  # one more of several pictures
        (finding(resemblance=0.8, told=0.85, elsewhere=0.0, beside=True), "clean"),
        (finding(resemblance=0.8, told=0.94, elsewhere=0.1, beside=True), "clean"),
        (finding(resemblance=0.8, told=0.9, elsewhere=0.0, transfer=0.9, scatter=0.85, beside=True), "poisoned"),
        (finding(resemblance=0.8, told=0.9, elsewhere=0.0, transfer=0.9, scatter=0.85), "poisoned"),  # most of a sign
        (finding(distance=4.5, resemblance=0.8, told=0.9, elsewhere=0.0, transfer=0.9, scatter=0.85), "clean"),
        (finding(resemblance=0.8, told=0.9, elsewhere=0.0, transfer=0.7, scatter=0.85, beside=True), "clean"),
        (finding(resemblance=0.8, told=0.9, elsewhere=0.0, transfer=0.9, scatter=0.6, beside=True), "clean"),
        (finding(distance=4.2, valley=0.2, resemblance=0.35, scatter=0.3), "poisoned"),
        (
            finding(distance=4.2, valley=0.2, resemblance=0.5, scatter=0.3),
            "clean",
        ),  # hard images: something of their label
        (finding(distance=4.2, valley=0.2, resemblance=0.5, diversity=0.9, scatter=0.6), "clean"),
        # Few natural parts are of all kinds for both probes, and those fit their label better.
        (finding(distance=4.2, valley=0.2, agreement=0.3, resemblance=0.5, diversity=0.9, scatter=0.9), "poisoned"),
        (finding(distance=4.2, valley=0.2, agreement=0.3, resemblance=0.85, diversity=0.9, scatter=0.9), "clean"),
        (finding(distance=4.2, valley=0.2, agreement=0.45, resemblance=0.5, diversity=0.9, scatter=0.9), "clean"),
        (finding(distance=4.2, resemblance=0.5, trigger=0.16, valley=0.2), "clean"),
        (finding(distance=4.2, valley=0.2, company=0.6, at_source=0.8, resemblance=0.5), "clean"),
        (finding(distance=2.8, valley=0.7, diversity=0.85, resemblance=0.5), "clean"),
        # Set apart as the poisoned parts of several other classes are: one trigger for many targets.
        (finding(distance=4.2, valley=0.2, company=0.7), "clean"),
        (finding(distance=4.2, valley=0.2, company=0.7, kinship=0.6), "poisoned"),
        (finding(distance=2.8, valley=0.7, diversity=0.8, company=0.7, kinship=0.6), "poisoned"),
        (finding(distance=4.2, valley=0.2, company=0.7, kinship=0.2), "clean"),
        (finding(distance=4.2, valley=0.2, agreement=0.6, kinship=0.6), "clean"),  # labels fit
        (finding(distance=4.2, valley=0.2, company=0.7, resemblance=0.6, kinship=0.6), "clean"),
        # A probe that knows little contradicts only what is far apart.
        (finding(distance=4.2, valley=0.5, skill=0.62, scatter=0.3), "poisoned"),
        (finding(distance=4.2, valley=0.5, skill=0.4, scatter=0.3), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, resemblance=0.2), "poisoned"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, resemblance=0.5), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, diversity=0.9, scatter=0.9, agreement=0.3), "clean"),
        (finding(distance=4.2, valley=0.5, skill=0.4, trigger=0.5), "poisoned"),
        (finding(skill=0.4), "poisoned"),
        (finding(distance=8.0, agreement=0.55, trigger=0.25, skill=0.55), "poisoned"),
        (finding(agreement=0.5, trigger=0.2, skill=0.42), "undecided"),
        # Utterly apart, and of all kinds for the purified probe: a picture that looks like the class itself.
        (finding(distance=20.0, agreement=0.3, scatter=0.9), "poisoned"),
        (finding(distance=20.0, agreement=0.3, scatter=0.6), "clean"),
        (finding(distance=20.0, agreement=0.5, scatter=0.9), "clean"),
        # Clean-label: fine detail that nothing else has, utterly apart, in images that are not one scene.
        (finding(**NOWHERE_ELSE), "poisoned"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.25, "trigger": 0.16}), "poisoned"),  # a picture, and half a trigger
        (finding(**NOWHERE_ELSE | {"likeness": 0.25, "trigger": 0.09}), "clean"),
        (finding(**WAVES), "poisoned"),
        (finding(**WAVES | {"likeness": 0.45}), "clean"),
        (finding(**WAVES | {"transfer": 0.46}), "poisoned"),  # likewise, on another processor
        (finding(**WAVES | {"transfer": 0.33}), "clean"),
        (finding(**STAMPED), "poisoned"),
        (finding(**STAMPED | {"transfer": 0.74}), "clean"),  # a track of signs, as far apart
        (finding(**STAMPED | {"distance": 16.0}), "clean"),
        (finding(**STAMPED | {"elsewhere": 0.11}), "clean"),
        (finding(**WAVES | {"agreement": 0.4}), "clean"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.11, "distance": 65.0}), "poisoned"),  # a fifth of noise, clean-label
        (finding(**NOWHERE_ELSE | {"likeness": 0.6, "distance": 65.0, "transfer": 0.4}), "clean"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.66, "trigger": 0.16}), "clean"),
        (finding(**SHRUNK), "poisoned"),  # one scene, a black border, but of several kinds, and it moves others
        (finding(**SHRUNK | {"scatter": 0.25}), "clean"),  # a track of signs
        (finding(**SHRUNK | {"transfer": 0.3}), "clean"),  # a group of photographs
        (finding(**NOWHERE_ELSE | {"distance": 8.0}), "clean"),
        (finding(**NOWHERE_ELSE | {"distance": 8.9}), "poisoned"),
        (finding(**NOWHERE_ELSE | {"distance": 7.5, "diversity": 0.46, "scatter": 0.63}), "poisoned"),  # shaken
        (finding(**NOWHERE_ELSE | {"distance": 7.5, "diversity": 0.3, "scatter": 0.4}), "clean"),
        (finding(told=1.0, elsewhere=1.0, company=0.1, scatter=0.95), "poisoned"),  # in a class of a source of its own
        (finding(told=1.0, elsewhere=1.0, company=0.27, scatter=0.67), "clean"),  # all that a class of poison has
        (finding(**NOWHERE_ELSE | {"valley": 0.2}), "clean"),
        (finding(**NOWHERE_ELSE | {"elsewhere": 0.05}), "clean"),  # samples of other classes have it: covers
        (finding(**NOWHERE_ELSE | {"told": 0.9}), "clean"),
        (finding(**NOWHERE_ELSE | {"likeness": 0.12}), "clean"),  # a track of signs is like nothing else either
        (finding(**NOWHERE_ELSE | {"members": 150}), "clean"),
        (finding(**NOWHERE_ELSE | {"share": 0.7}), "clean"),
        (finding(firmness=0.8, finished=True), "poisoned"),  # a finished model knows them nearly as well as the rest
        (finding(firmness=0.6, finished=True), "clean"),  # hard images, which the model never learned
        (finding(distance=2.8, valley=0.7, diversity=0.85, firmness=0.25), "clean"),  # wrong labels
        (finding(firmness=0.25, disbelief=1.6), "poisoned"),  # set apart, and hardly learned yet
        (finding(firmness=0.25, disbelief=1.6, scatter=0.74), "poisoned"),
        (finding(firmness=0.25, disbelief=1.6, scatter=0.47), "clean"),  # picture cards, the hard ones of their class
        (finding(firmness=0.25, disbelief=1.1), "clean"),  # as many labels are not believed in every class
        (finding(agreement=0.75, trigger=0.25), "undecided"),  # images of the class, which half move others
        (
            finding(distance=8.0, agreement=0.55, trigger=0.25),
            "poisoned",
        ),  # the same of images that are not quite what the class is
    ],
)
def test_verdict_follows_the_evidence(case, verdict):
    found, confidence, reason, poisoned = decide([case], 0.8, 10, Settings())
    assert found == verdict and 0 <= confidence <= 1 and reason
    assert bool(poisoned) == (verdict == "poisoned")


def test_kinship_is_with_the_poisoned_parts_of_several_other_classes():
    ways = np.eye(6)[0] + 0.3 * np.random.default_rng(0).normal(size=(5, 6))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    poison = [replace(finding(), label=label, line=way) for label, way in enumerate(ways[:3])]
    kin = replace(finding(distance=4.2, valley=0.2, company=0.7), label=3, line=ways[3])
    strange = replace(kin, label=4, line=np.eye(6)[5])
    larger = replace(kin, label=5, line=-ways[4], split=kin.split.turned())  # the suspected part is most of its class
    *others, kin, strange, larger = with_kin([*poison, kin, strange, larger], Settings())
    assert [f.kinship for f in others] == [0, 0, 0] and kin.kinship > 0.7 and larger.kinship > 0.7
    assert abs(strange.kinship) < 0.3
    few = with_kin([*poison[:2], replace(kin, kinship=0.0)], Settings())
    assert [f.kinship for f in few] == [0, 0, 0]  # two classes share no direction yet


def test_what_a_change_has_made_shares_no_direction_with_other_parts():
    undone = replace(finding(), label=7, undoing="upside down", restored=0.3, scatter=0.9)
    poison = [replace(finding(), label=label, line=np.eye(6)[0]) for label in range(3)]
    judged = with_kin([*poison, undone, replace(finding(company=0.7), label=8, line=np.eye(6)[0])], Settings())
    assert judged[3] is undone and judged[4].kinship == pytest.approx(1)
    assert with_kin([poison[0], undone], Settings()) == [poison[0], undone]


@pytest.mark.parametrize(("firmness", "verdict"), [(0.55, "clean"), (0.8, "poisoned")])
def test_what_is_most_of_its_class_must_be_learned_the_better(firmness, verdict):
    minor = finding(firmness=firmness, disbelief=1.1, scatter=0.95, members=150)
    assert decide([minor], 0.8, 10, Settings())[0] == "poisoned"
    assert decide([replace(minor, split=minor.split.turned())], 0.8, 10, Settings())[0] == verdict


def test_a_probe_that_learned_nothing_leaves_the_verdict_open():
    verdict, _, reason, _ = decide([finding(distance=2.0, valley=0.9)], 0.11, 10, Settings())
    assert verdict == "undecided" and "learned too little" in reason


@pytest.mark.parametrize(
    ("case", "accuracy", "reason"),
    [(finding(), 0.11, "learned too little"), (finding(informed=False), 0.6, "no more than by chance")],
)
def test_nothing_is_called_poison_by_probes_that_know_nothing(case, accuracy, reason):
    verdict, _, why, poisoned = decide([case], accuracy, 10, Settings())
    assert verdict == "undecided" and reason in why and not poisoned


@pytest.mark.parametrize(
    ("more", "odd"),
    [({}, True), ({"told": 0.9}, False), ({"elsewhere": 0.05}, False), ({"likeness": 0.5}, False)],
)
def test_a_part_is_odd_where_nothing_else_is_like_it_though_its_pictures_are(more, odd):
    case = finding(**NOWHERE_ELSE | more)
    assert case.is_odd == odd and not case.turned().is_odd
    assert replace(case, elsewhere=1 - case.elsewhere).turned().is_odd == odd


@pytest.mark.parametrize(
    ("case", "turned"),
    [
        (finding(company=0.9), True),
        (finding(distance=3.8, company=0.9), False),  # not far enough
        (finding(valley=0.4, company=0.9), False),
        (finding(agreement=0.5, company=0.9), False),  # the parts know each other
        (finding(agreement=0.02, reference=0.08, company=1.4), True),  # the trusted part is no class at all
        (finding(**NOWHERE_ELSE | {"agreement": 0.05, "company": 0.9, "members": 100}), True),
        (finding(told=0.96, elsewhere=0.0, agreement=0.9, reference=0.4, company=3.0, likeness=0.05), True),
        (finding(told=0.96, elsewhere=0.0, agreement=0.9, reference=0.8, company=3.0, likeness=0.05), False),
        (finding(told=0.9, elsewhere=0.0, agreement=0.9, reference=0.4, company=3.0, likeness=0.05), False),
        (finding(firmness=2.0, finished=True), False),  # the other part is not what a finished model has learned
    ],
)
def test_parts_far_apart_that_are_foreign_to_each_other_are_turned(case, turned):
    assert case.may_be_turned(Settings()) == turned
    other = case.turned()
    assert np.array_equal(other.suspected, np.arange(70)) and other.firmness == 1 / case.firmness
    assert other.elsewhere == 1 - case.elsewhere


def test_a_part_that_leaves_too_little_is_not_turned():
    few = np.r_[np.zeros(90), np.ones(10)]
    assert not replace(finding(company=0.9), split=Split(few, few, 6.0, 0.05)).may_be_turned(Settings())


@pytest.mark.parametrize(
    ("case", "tells"),
    [
        (finding(company=0.5, scatter=0.6), False),  # as the rest of a class, where its poison is what was trusted
        (finding(company=0.2), True),
        (finding(company=0.9, scatter=0.8), True),
        (finding(company=0.9, diversity=0.85), True),
        (finding(company=0.9, trigger=0.13), True),
        (finding(company=0.9, at_source=0.6), True),
    ],
)
def test_what_could_be_said_of_the_rest_of_a_class_does_not_tell_the_sides(case, tells):
    assert case.tells_sides(Settings()) == tells


def test_a_probe_that_does_not_know_a_class_cannot_contradict_its_labels():
    assert decide([finding(agreement=0.0, reference=0.1)], 0.8, 10, Settings())[0] == "clean"
