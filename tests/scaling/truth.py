"""A law that is known: what fits are held against. The design of the published ladder, 7 sizes at 5 lengths each."""

import numpy as np

from hybridlm.scaling import Point, Surface

SIZES = (60e6, 100e6, 190e6, 370e6, 600e6, 760e6, 1e9)
MULTIPLES = (0.5, 1, 2, 4, 8)
FACTOR = 0.625
b = np.log(360 / 410.7) / np.log(FACTOR)
TRUTH = {"transformer": Surface(1.69, 406.4, 0.34, 410.7, b), "hybrid": Surface(1.69, 406.4, 0.34, 360.0, b)}
INSIDE, AT_7B, AT_70B = (1e9, 160e9), (7e9, 6e12), (70e9, 15e12)
JOINT = ("E", "A", "a", "b")


def points(noise=0.0, seed=0, truth=None, common=0.0, sizes=SIZES):
    """Points with `noise` on the log loss, a share `common` of its variance the same in all arms."""
    rng = np.random.default_rng(seed)
    cells = [(n, 20 * m * n) for n in sizes for m in MULTIPLES]
    together = rng.standard_normal(len(cells))
    out = []
    for arm, law in (truth or TRUTH).items():
        z = common**0.5 * together + (1 - common) ** 0.5 * rng.standard_normal(len(cells))
        out += [Point(arm, n, d, float(law.loss(n, d) * np.exp(noise * e))) for (n, d), e in zip(cells, z, strict=True)]
    return out
