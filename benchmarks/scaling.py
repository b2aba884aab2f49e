"""How well savings factors come back from noisy ladders: the Monte Carlo of docs/scaling.md.

    python benchmarks/scaling.py [--draws 500] [--seed N]

The truth: two arms that differ in B alone, so that the factor is 0.625 at every N and D; 7 sizes from 60M to 1B at 0.5
to 8 times 20 tokens a parameter, noise on log loss. Each draw is fitted anew, jointly and apart, and its 90% interval
asked whether it holds the truth. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from hybridlm.scaling import Point, Surface, bootstrap, fit, parity

SIZES = (60e6, 100e6, 190e6, 370e6, 600e6, 760e6, 1e9)
MULTIPLES = (0.5, 1, 2, 4, 8)
FACTOR = 0.625
EXPONENT = float(np.log(360 / 410.7) / np.log(FACTOR))
TRUTH = {"transformer": Surface(1.69, 406.4, 0.34, 410.7, EXPONENT), "hybrid": Surface(1.69, 406.4, 0.34, 360.0,
                                                                                     EXPONENT)}
PLACES = {"1B/160B (measured)": (1e9, 160e9), "7B/6T": (7e9, 6e12), "70B/15T": (70e9, 15e12)}
SHARINGS = {"joint, E A a b shared": ("E", "A", "a", "b"), "joint, E A a shared": ("E", "A", "a"),
            "joint, E shared": ("E",), "separate": ()}


def ladder(noise: float, rng: np.random.Generator) -> list[Point]:
    """One noisy ladder of both arms."""
    return [Point(arm, n, 20 * m * n, float(law.loss(n, 20 * m * n) * np.exp(noise * rng.standard_normal())))
            for arm, law in TRUTH.items() for n in SIZES for m in MULTIPLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--refits", type=int, default=300, help="of each draw's bootstrap")
    parser.add_argument("--noise", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--resample", choices=("residuals", "points", "runs"), default="residuals")
    parser.add_argument("--seed", type=int, default=None, help="fresh when left out")
    given = parser.parse_args()
    seed = given.seed if given.seed is not None else int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
    print(f"seed {seed}, {given.draws} ladders, {given.refits} refits each; the truth is {FACTOR}\n")
    print(f"{'noise':>6}  {'fit':<22}  {'read at':<19}  {'5%':>6} {'50%':>6} {'95%':>6}  {'within 5%':>9}  "
          f"{'covered':>7}")
    rows = []
    for noise in given.noise:
        for name, shared in SHARINGS.items():
            began, factors, hits = time.perf_counter(), [], []
            for draw in range(given.draws):
                law = fit(ladder(noise, np.random.default_rng([seed, draw])), shared)
                boot = bootstrap(law, given.refits, given.resample, seed=draw)
                found = [parity(law, boot, "hybrid", "transformer", n, d) for n, d in PLACES.values()]
                factors.append([p.factor for p in found])
                hits.append([p.low <= FACTOR <= p.high for p in found])
            seconds = (time.perf_counter() - began) / given.draws
            for i, place in enumerate(PLACES):
                values = np.array(factors)[:, i]
                low, mid, high = (float(v) for v in np.quantile(values, (0.05, 0.5, 0.95), method="inverted_cdf"))
                near = float(np.mean(np.abs(values / FACTOR - 1) < 0.05))
                covered = float(np.mean(np.array(hits)[:, i]))
                print(f"{noise:>6.1%}  {name:<22}  {place:<19}  {low:6.3f} {mid:6.3f} {high:6.3f}  {near:>9.1%}  "
                      f"{covered:>7.1%}", flush=True)
                rows.append({"noise": noise, "fit": name, "at": place, "low": low, "median": mid, "high": high,
                             "within_5_percent": near, "coverage_of_90_percent_interval": covered,
                             "seconds_a_ladder": seconds})
    print(json.dumps({"seed": seed, "draws": given.draws, "refits": given.refits,
                      "rows": [{k: (v if not isinstance(v, float) or np.isfinite(v) else None) for k, v in r.items()}
                               for r in rows]}))


if __name__ == "__main__":
    main()
