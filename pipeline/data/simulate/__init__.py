"""Multi-surface ads logs whose true probabilities are known. See docs/simulator.md for the formulas."""

from pipeline.data.simulate.config import SimulationConfig, SurfaceKnobs
from pipeline.data.simulate.oracle import OracleFigures, oracle_figures
from pipeline.data.simulate.run import simulate
from pipeline.data.simulate.schema import TASKS, simulation_schema

__all__ = [
    "TASKS",
    "OracleFigures",
    "SimulationConfig",
    "SurfaceKnobs",
    "oracle_figures",
    "simulate",
    "simulation_schema",
]
