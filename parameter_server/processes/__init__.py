"""Coordinator and shards as processes: servers, metrics, logs, and their commands."""
