"""Measures a training step and generation against the original's arithmetic, in one process, in turns."""

from .growth import growth_table, measure_growth, plot_growth
from .measure import Benchmark
from .models import SIZES
from .variants import BASELINES


__all__ = ["BASELINES", "SIZES", "Benchmark", "growth_table", "measure_growth", "plot_growth"]
