"""How long a step takes: model and GPU specs, KV capacity, calibrations, uncertainty."""

from ersim.steptime.calibration import Calibration, list_files, load, save
from ersim.steptime.expert import ExpertModel, Frontend, ResolvedEngine, build_expert_model, load_prices
from ersim.steptime.fit import fit_live_calibration
from ersim.steptime.roofline import build_roofline
from ersim.steptime.specs import GpuSpec, ModelSpec, load_gpu, load_model

__all__ = [
    "Calibration",
    "ExpertModel",
    "Frontend",
    "GpuSpec",
    "ModelSpec",
    "ResolvedEngine",
    "build_expert_model",
    "build_roofline",
    "fit_live_calibration",
    "list_files",
    "load",
    "load_gpu",
    "load_model",
    "load_prices",
    "save",
]
