"""Study mixes: how many scans studies have.

`SCANS[mix][m - 1]` is the weight of studies with m scans. pub_brain_5 was counted: 18,343 studies, from the public
processing logs of the released HLIP data tools. The other two are synthetic fits to the paper's figures (arXiv
2505.21862): BrainMRI220K, 220,993 studies, 3.13 million scans, 1 to 162 a study, third quartile 17; HeadCT240K, 244,253
studies, 1.44 million scans, 1 to 71 a study, third quartile 6. The brain MRI fit ends at 80, short of the real tail.
"""

from __future__ import annotations

import numpy as np

# fmt: off
SCANS: dict[str, tuple[float, ...]] = {
    "pub_brain_5": (
        4633, 1756, 942, 7186, 1461, 232, 170, 256, 506, 727, 126, 56, 269, 23,
    ),
    "brain_mri": (
        0, 3.5127e-06, 0.00016489, 0.0016542, 0.0071667, 0.018728, 0.035357, 0.053583, 0.069579, 0.08077,
        0.086262, 0.086481, 0.082574, 0.075893, 0.067684, 0.058932, 0.050334, 0.042329, 0.035153, 0.028898,
        0.023562, 0.019084, 0.015374, 0.012332, 0.0098589, 0.0078607, 0.0062548, 0.0049695, 0.0039441,
        0.0031282, 0.0024801, 0.0019662, 0.001559, 0.0012365, 0.00098123, 0.00077917, 0.0006192, 0.0004925,
        0.00039211, 0.00031251, 0.00024935, 0.00019918, 0.0001593, 0.00012756, 0.00010228, 8.2114e-05,
        6.6011e-05, 5.3137e-05, 4.2831e-05, 3.4571e-05, 2.7942e-05, 2.2615e-05, 1.8328e-05, 1.4875e-05,
        1.2088e-05, 9.8368e-06, 8.0156e-06, 6.5404e-06, 5.3437e-06, 4.3718e-06, 3.5814e-06, 2.9377e-06,
        2.4128e-06, 1.9843e-06, 1.6339e-06, 1.3471e-06, 1.112e-06, 9.1907e-07, 7.6055e-07, 6.3012e-07,
        5.2269e-07, 4.3409e-07, 3.6092e-07, 3.0044e-07, 2.5038e-07, 2.0889e-07, 1.7447e-07, 1.4589e-07,
        1.2212e-07, 1.0233e-07,
    ),
    "head_ct": (
        0.025934, 0.14728, 0.21079, 0.1838, 0.13114, 0.085638, 0.053768, 0.034211, 0.021838, 0.014404, 0.009983,
        0.0073625, 0.0058057, 0.0048703, 0.0042931, 0.0039186, 0.0036558, 0.003452, 0.0032775, 0.0031164,
        0.0029604, 0.002806, 0.0026521, 0.002499, 0.0023477, 0.0021992, 0.0020546, 0.0019149, 0.0017807,
        0.0016527, 0.0015312, 0.0014165, 0.0013086, 0.0012076, 0.0011132, 0.0010252, 0.00094353, 0.00086778,
        0.00079769, 0.00073293, 0.00067318, 0.00061813, 0.00056745, 0.00052083, 0.000478, 0.00043866,
        0.00040255, 0.00036942, 0.00033903, 0.00031117, 0.00028563, 0.00026223, 0.00024078, 0.00022113,
        0.00020313, 0.00018663, 0.00017151, 0.00015765, 0.00014496, 0.00013332, 0.00012265, 0.00011286,
        0.00010389, 9.5663e-05, 8.8113e-05, 8.1184e-05, 7.4825e-05, 6.8985e-05, 6.3623e-05, 5.8696e-05,
        5.4169e-05,
    ),
}
# fmt: on


def draw_scans(mix: str, studies: int, seed: int = 0, most: int | None = None) -> np.ndarray:
    """Scans of so many studies of a mix, in random order.

    Stratified: one study from each of `studies` equal parts of the distribution, so that a few studies stand for the
    mix.

    Args:
        most: scans of a study beyond this are left out.

    Returns:
        (studies) int64.
    """
    random = np.random.default_rng(seed)
    weights = np.cumsum(SCANS[mix])
    places = (np.arange(studies) + random.random(studies)) / studies
    scans = np.searchsorted(weights / weights[-1], places, side="right") + 1
    return random.permutation(scans if most is None else np.minimum(scans, most))
