"""The bars that a part of a class must pass to count as poison, each with what was measured on either side of it.

Those that a preset may set differently are in `settings`.
"""

import numpy as np

DOUBTFUL = 0.05  # probability of the suspected part from which a sample is kept from the purified probe
KNOWN = 0.2  # agreement with trusted samples of a class from which the purified probe may judge its labels
SURE_TRIGGER = 0.3  # trigger from which a class need not fall into two parts far apart; natural groups had 0.14 at most
LEAST_TRUSTED = 15  # samples that a class must keep when its suspected parts are left out
LEFT = 0.15  # share of a class that the suspected part must leave: the purified probe learns the class from it
CROWDED = 2.5  # times the median class from which a class counts no larger there: most of it may be poison
HELD = 0.7  # firmness from which a finished model has learned the labels of a part; triggers 0.79 and more, others 0.64
BELIEVED = 0.4  # firmness likewise, of our own probe, where kinds alone speak for a part; wrong labels had 0.25
LEARNED = 0.5  # firmness from which a part is no heap of wrong labels; its share of the class, where that is more
DISBELIEVED = 1.3  # disbelief from which likewise; triggers that are hardly learned yet had 1.6, wrong labels 1.1
OF_MANY_KINDS = 0.6  # scatter from which that counts; such triggers had 0.72, picture cards among plain ones 0.47
OWN_COMPANY = 0.66  # company above which half a trigger is none; poison had 0.64, newspapers among paper 0.64 to 0.73
OWN_KIND = 0.75  # relative agreement from which a part is what its label says: only a sure trigger speaks against it
MOVED = 0.8  # transfer of what was put on all of a part; a picture on leaves had 0.99, natural foreign parts 0.74
MOVED_BY_MOST = 0.4  # the same of most of a class, and of what looks not alike; waves had 0.46, natural ones 0.33
TRIGGER_AT_SOURCE = 0.5  # at_source from which it is one; such triggers had 0.55 to 0.96, natural groups 0.34 at most
COMPANY_AT_SOURCE = 0.75  # company up to which it counts; poison of one source had 0.57 at most, natural groups 0.85
ONE_SCENE = 0.6  # likeness from which a part is one scene, not poison by its company; triggers had 0.52, tracks 0.66 up
ONE_LIGHT = 0.51  # likewise where company is all that speaks for it; poison had 0.45, bright offices 0.58
FRAMES = 1.0  # likewise of a trigger between parts far apart; waves over seedlings had 0.65, frames of one scene 1.5
TRIGGER_OF_SCENE = 0.6  # the trigger asked of one scene of its own kind; 15 frames of one lettuce had 0.31 at D 141
STRANGE = 0.4  # resemblance up to which a part is foreign; poison had 0.39 at most, hard images mostly more
STRANGE_FAR = 0.7  # likewise where hardly a sample lies between, or of all kinds; poison had 0.69, hard images 0.85
STRANGE_BOTH = 0.8  # likewise of both, for a probe that knows its classes; a picture on signs had 0.72
SKILLED = 0.6  # skill from which a small gap will do; 10,000 photographs gave 0.58 and more, 2,000 gave 0.34 to 0.49
UNSKILLED = 0.2  # below that, by how much, only a sure trigger counts; natural groups in small sets had up to 0.2
GAP_OF_UNSKILLED = 18.0  # gap that a probe asks for that knows nothing at all, over SKILLED; less as it knows more
VERY_FAR, DEEP = 5.0, 0.15  # Ashman's D and valley of parts between which hardly a sample lies
FAR, HOLLOW = 4.0, 0.3  # the same where few do: of parts that may be looked at both ways, or beside clearer ones
TOLD = 0.95  # from which fine detail tells the two parts of a class; poison mostly 0.96 and more
TOLD_BESIDE = 0.92  # the same of further parts of a class; natural ones of photographs had 0.90 at most
TOLD_COMMON = 0.9  # the same of parts that other classes' images lie with
NOWHERE = 0.02  # share of other classes' samples on its side up to which a part is like nothing else; poison had 0.01
COMMON = 0.5  # share of them from which it is no trigger; parts that a trigger alone speaks for had 0.02 at most
NO_SCENE = 0.09  # likeness up to which that counts; large tracks of signs had 0.16, threes among all digits 1.0
BEYOND, NO_SCENE_BEYOND = 20.0, 0.3  # the same so far apart; noise had D 65 and 0.11, scenes as far 1.4, at D 9.5 0.18
SEVERAL_KINDS = 0.42  # diversity and scatter from which what moves others is no scene; shrunk images 0.57, tracks 0.25
ALONE = 8.5  # Ashman's D of such a part from which it is poison by that; natural ones had 7.8, tracks of signs 15.7
ALONE_OF_KINDS = 6.5  # the same of a part of several kinds; shaken images had 7.5, natural ones at most 0.40 of both
ALONE_BESIDE = 8.0  # the same of a further part of a class; corners of one cross had 8.3, natural parts mostly less
MANY = 50  # samples that such a part must have; two tracks of signs have as many
TOGETHER = 0.65  # company above which a part far apart must scatter more; a track of signs, a way to write a one
FEW = 25  # samples under which what a part looks like says nothing unless it is quite apart; natural ones had 15 to 23
STRAYS = 0.1  # by so much
CHANCE = 0.6  # over the root of the samples, beyond the bars of scatter and company; 15 starfish had 0.14
LEARNED_FROM = 40  # trusted samples from which a class is known well enough to contradict; 15 and 23 were of one kind
EVERY_KIND = 0.5  # relative agreement up to which a part of all kinds is foreign; poison had 0.45, hard images 0.53
UNDONE = 0.48  # restored and transfer together of what a change has made; exchanged colours had 0.60, odd cats 0.37
WELL_UNDONE = 0.56  # the same of a half disowned part; another hue had 0.64, odd cats 0.37
KINDS_UNDONE = 0.65  # scatter that such a part must have; negatives had 0.71
HALF_DISOWNED = 0.65  # relative agreement up to which such a part may be poison; upside down among cats had 0.51
MANY_KINDS, MORE_KINDS = 0.6, 1.5  # diversity and variety of another such part; fog had 0.65, 1.9, horses 0.57, 1.8
SHALLOW = 0.9  # valley up to which it gets a closer look; fog had 0.85
BETTER_KNOWN = 1.5  # relative agreement and company of an odd part; beside poison one had 2.1, natural ones 1.2
UTTERLY_FAR = 8.0  # gap from which all kinds for the purified probe will do; natural parts so far had 0.6 of scatter


def passes(margin: float, width: float) -> float:
    """0.5 at a margin of zero, towards 1 above and 0 below, in units of `width`."""
    return float(1 / (1 + np.exp(-np.clip(margin / width, -30, 30) * 2)))


def like_nothing_else(told: float, elsewhere: float) -> bool:
    """Whether fine detail sets a further part of a class apart, and finds nothing like it; see `finding.Finding`."""
    return told >= TOLD_BESIDE and elsewhere <= NOWHERE
