"""Drawings of detections and plots of a run."""

from samdetr.visualize.curves import plot_curves
from samdetr.visualize.predictions import (
    GridItem,
    class_colours,
    draw_detections,
    prediction_grid,
    save_png,
)

__all__ = ["GridItem", "class_colours", "draw_detections", "plot_curves", "prediction_grid", "save_png"]
