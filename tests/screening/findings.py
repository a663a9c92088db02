"""Findings to judge: a part of poison unless the case says otherwise."""

import numpy as np

from trainguard.screening.finding import Finding
from trainguard.screening.separation import Split


def finding(
    distance=6.0,
    agreement=0.05,
    reference=0.8,
    trigger=0.0,
    valley=0.05,
    company=0.2,
    diversity=0.0,
    transfer=0.9,
    share=0.3,
    likeness=0.1,
    members=100,
    **more,
):
    half = (np.arange(members) >= members * (1 - share)).astype(float)
    split = Split(half, half, distance, valley)
    seen = (transfer, agreement, reference, company, trigger, diversity)
    return Finding(1, np.arange(members), split, *seen, likeness=likeness, **more)


NOWHERE_ELSE = {"distance": 12.0, "agreement": 0.75, "likeness": 0.05, "told": 0.99, "elsewhere": 0.0, "members": 200}
SURE = {"distance": 4.5, "resemblance": 0.5, "trigger": 0.45, "company": 0.5, "scatter": 0.4}
SHRUNK = NOWHERE_ELSE | {"likeness": 2.6, "transfer": 0.8, "diversity": 0.57, "scatter": 0.6}
WAVES = NOWHERE_ELSE | {"agreement": 0.0, "likeness": 0.25, "transfer": 0.52, "company": 1.4}  # over one kind of scenes
STAMPED = NOWHERE_ELSE | {"distance": 79.0, "likeness": 1.6, "transfer": 0.96, "company": 1.1}  # a picture, on leaves
CROWD = NOWHERE_ELSE | {"agreement": 0.0, "likeness": 1.4, "share": 0.7, "company": 0.9, "scatter": 0.45}
CROWD |= {"resemblance": 0.6, "transfer": 0.9}
