"""Data efficiency as a number: loss surfaces L(N, D), tokens to parity, and how sure one may be of either.

    found = gather(["runs/hybrid-60m", ..., "points.json"])
    law = fit(usable(found.points), shared=("E", "A", "a", "b"))
    parity(law, bootstrap(law), "hybrid 3:1", "transformer", params=1e9, tokens=160e9)

numpy alone; plots import matplotlib when drawn.
"""

from hybridlm.scaling.bootstrap import Bootstrap, bootstrap, interval
from hybridlm.scaling.parity import Parity, parity
from hybridlm.scaling.points import Point, constrained, seed_noise, usable
from hybridlm.scaling.runs import Gathered, Run, gather, read_run
from hybridlm.scaling.surface import Fit, FTest, Surface, f_test, fit, held_out_error
from hybridlm.scaling.trajectory import Crossing, by_decays, by_phase

__all__ = [
    "Bootstrap", "Crossing", "FTest", "Fit", "Gathered", "Parity", "Point", "Run", "Surface", "bootstrap", "by_decays",
    "by_phase", "constrained", "f_test", "fit", "gather", "held_out_error", "interval", "parity", "read_run",
    "seed_noise", "usable",
]
