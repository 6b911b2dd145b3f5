"""Meshes, engines and sharding: how one model runs on many devices."""

from core.registry import load_from

load_from("engine", "parallel.native", "parallel.deepspeed_engine", "parallel.megatron_engine")
