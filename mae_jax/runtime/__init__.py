"""Processes and devices: sharding, discovery and connection of processes, signals, the watchdog, process exit."""
