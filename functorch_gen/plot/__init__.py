"""Pictures as PNG files: image grids, curves, confusions, gradient norms, loss landscapes; no global state is used."""

from functorch_gen.plot.curves import curve, curves
from functorch_gen.plot.images import image_grid, image_path
from functorch_gen.plot.judgement import confusion, gradient_flow, scatter
from functorch_gen.plot.landscape import landscape

__all__ = ["confusion", "curve", "curves", "gradient_flow", "image_grid", "image_path", "landscape", "scatter"]
