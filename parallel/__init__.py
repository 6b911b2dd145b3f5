"""Meshes, engines and sharding: how one model runs on many devices."""
