"""When things happen: users, gateway and replicas as SimPy processes on one clock."""

from ersim.system.run import Counts, RunOutput, System, engine_config, noise_chunks, request_target

__all__ = ["Counts", "RunOutput", "System", "engine_config", "noise_chunks", "request_target"]
