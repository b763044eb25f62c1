"""Writes initializers.json: what jax.nn.initializers 0.10 draw for (out, in, ...): ``python make_initializers.py``."""

import json
from pathlib import Path
from typing import Any

import jax

SHAPES = [(3, 5), (4, 2, 3), (2, 3, 2, 2)]
SCALINGS: list[tuple[float, Any, Any]] = [
    (scale, mode, law)
    for scale in (1.0, 2.0)
    for mode in ("fan_in", "fan_out", "fan_avg")
    for law in ("truncated_normal", "normal", "uniform")
]


def main() -> None:
    """One draw for each shape and law; axis 1 is the inputs', axis 0 the outputs'."""
    key = jax.random.key(7)
    drawn = []
    for scale, mode, law in SCALINGS:
        draw = jax.nn.initializers.variance_scaling(scale, mode, law, in_axis=1, out_axis=0)
        for shape in SHAPES:
            values = [float(x) for x in draw(key, shape).flatten()]
            drawn.append({"scale": scale, "mode": mode, "distribution": law, "shape": shape, "values": values})
    path = Path(__file__).with_name("initializers.json")
    path.write_text(json.dumps(drawn, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
